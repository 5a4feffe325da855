"""Arithmetic of kernels in Pallas' Triton backend, in the instructions that NVIDIA GPUs have for it.

XLA's compiler rounds every product before it is added to something, divides by a routine of its own and takes the
exponential by another: of a convolution of four taps with its SiLU a number took 32 instructions, of its gradients 59,
more time than reading and writing it. With these they are 14 and 32.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Operations on float32 values.

    Attributes:
        rounded: that results become 16-bit numbers: exponentials and reciprocals are then the hardware's, good to 22
            bits.
        interpret: in interpret mode there are no instructions, and all is plain JAX.
    """

    rounded: bool
    interpret: bool

    @staticmethod
    def of(dtype: jax.typing.DTypeLike, *, interpret: bool) -> Arithmetic:
        """For results of this dtype."""
        return Arithmetic(rounded=jnp.dtype(dtype).itemsize == 2, interpret=interpret)

    def multiply_add(self, one: ArrayLike, other: ArrayLike, added: ArrayLike) -> jax.Array:
        """one · other + added, rounded once; of one shape or made so, as in NumPy."""
        if self.interpret:
            return one * other + added
        return _instruction("fma.rn.f32 $0, $1, $2, $3;", one, other, added)

    def exp2(self, x: jax.Array) -> jax.Array:
        if self.interpret or not self.rounded:
            return jnp.exp2(x)
        return _instruction("ex2.approx.ftz.f32 $0, $1;", x)

    def reciprocal(self, x: jax.Array) -> jax.Array:
        if self.interpret or not self.rounded:
            return 1 / x
        return _instruction("rcp.approx.ftz.f32 $0, $1;", x)

    def sigmoid(self, x: jax.Array) -> jax.Array:
        if self.interpret or not self.rounded:
            return jax.nn.sigmoid(x)
        return _instruction(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"  # -log2(e)
            " add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            x,
        )

    def rounded_to(self, dtype: jax.typing.DTypeLike, x: jax.Array) -> jax.Array:
        """x rounded to dtype, as float32."""
        if self.interpret or jnp.dtype(dtype) != jnp.bfloat16:
            return x.astype(dtype).astype(jnp.float32)
        # The upper half of a float32 is a bfloat16. One number alone is converted at a quarter of the rate.
        return _instruction("cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", x, constraint="=r")


def nibbles(packed: jax.Array, *, high: bool, dtype: jax.typing.DTypeLike, interpret: bool) -> jax.Array:
    """The low or the high four bits of uint8 numbers, less 8, in `dtype`.

    To bfloat16 in five instructions for four numbers: a nibble under the exponent of 128 is 128 more than itself.
    Byte by byte, as the compiler would have it, a number takes eight.
    """
    if interpret or jnp.dtype(dtype) != jnp.bfloat16:
        return ((packed >> 4 if high else packed & 15).astype(jnp.int8) - 8).astype(dtype)
    shift = "shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F;" if high else "and.b32 t, $2, 0x0F0F0F0F;"
    [result] = plgpu.elementwise_inline_asm(
        "{ .reg .b32 t, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308;"  # 1 and -136, twice
        + shift
        + " prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342;"
        # Of two bfloat16 at once, GPUs before Hopper have no sum, but this.
        " fma.rn.bf16x2 $0, $0, one, less; fma.rn.bf16x2 $1, $1, one, less; }",
        args=[packed],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.bfloat16)],
    )
    return result


def _instruction(code: str, *operands: ArrayLike, constraint: str = "=f") -> jax.Array:
    shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
    [result] = plgpu.elementwise_inline_asm(
        code,
        args=[jnp.broadcast_to(jnp.asarray(operand, jnp.float32), shape) for operand in operands],
        constraints=",".join([constraint, *["f"] * len(operands)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result
