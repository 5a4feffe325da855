"""The Mamba2 mixer and the layer around it (arXiv 2405.21060, section 7; transformers' `Zamba2MambaMixer`)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from zamba2_jax.cache import MambaState
from zamba2_jax.config import Zamba2Config
from zamba2_jax.layers import decoding
from zamba2_jax.layers.linear import DepthwiseConv, Linear, param, side_by_side
from zamba2_jax.layers.lora import Loras, with_lora
from zamba2_jax.layers.norms import GatedRMSNorm, RMSNorm
from zamba2_jax.layers.projection import apart, projection, together
from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.ops.conv import causal_conv_step, mixer_convs
from zamba2_jax.ops.gate import Gate, X
from zamba2_jax.ops.ssd import RawSteps, ssd, ssd_step, time_step
from zamba2_jax.sharding import automatic_axes, constrain
from zamba2_jax.tentative import MambaSteps
from zamba2_jax.tokens import TokenLayout


class Mamba2Mixer(nnx.Module):
    """Maps a sequence to a sequence through h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ, y_t = h_t C_t + D x_t, per head.

    1. Project the input to gate z, x, B, C and raw time step dt.
    2. Convolve x, B and C causally over the last k tokens, then SiLU.
    3. dt = softplus(dt + dt_bias), A = -exp(A_log); run the state-space recurrence.
    4. Normalise y · silu(z) by groups and project back.

    The reference's one `in_proj` is three here (z and x; B and C; dt), and its one convolution two (x; B and C), so
    that each part splits evenly by heads or groups over devices.
    """

    def __init__(self, config: Zamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        inner = config.mamba_intermediate_size
        groups_state = config.mamba_ngroups * config.mamba_d_state
        heads = config.n_mamba_heads
        linear = {
            "std": config.initializer_range,
            "use_bias": config.add_bias_linear,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        conv = {"use_bias": config.use_conv_bias, "param_dtype": param_dtype, "rngs": rngs}

        self.zx_proj = Linear(config.hidden_size, (2, inner), axes=("embed", None, "mamba_inner"), **linear)
        self.bc_proj = Linear(config.hidden_size, (2, groups_state), axes=("embed", None, "mamba_groups"), **linear)
        self.dt_proj = Linear(config.hidden_size, heads, axes=("embed", "mamba_heads"), **linear)
        self.conv_x = DepthwiseConv(config.mamba_d_conv, (inner,), axes=("mamba_inner",), **conv)
        self.conv_bc = DepthwiseConv(config.mamba_d_conv, (2, groups_state), axes=(None, "mamba_groups"), **conv)
        # float32 whatever param_dtype is: they pass through exp and softplus, where bfloat16's eight bits cost whole
        # percents of a decay.
        self.A_log = param(jnp.log(jnp.arange(1, heads + 1, dtype=jnp.float32)), ("mamba_heads",))
        self.D = param(jnp.ones((heads,), jnp.float32), ("mamba_heads",))
        self.dt_bias = param(_initial_dt_bias(config, rngs), ("mamba_heads",))
        self.norm = GatedRMSNorm(inner, groups=config.mamba_ngroups, dtype=dtype, param_dtype=param_dtype)
        self.out_proj = Linear(inner, config.hidden_size, axes=("mamba_inner", "embed"), **linear)
        self.lora: Loras = None

    def __call__(
        self,
        hidden: Float[Array, "b l d"],
        layout: TokenLayout,
        state: MambaState | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "b l d"], MambaState | MambaSteps | None]:
        """Mixes the tokens of `hidden`; with a state, continues from it and returns the next one, or of a tentative
        call what it takes to make one."""
        if layout.token_mask is not None:
            hidden = jnp.where(layout.token_mask[..., None], hidden, 0)

        # One token is served best by one product of all three.
        rest = hidden if hidden.shape[1] == 1 else apart(hidden)
        if self._reads_columns(hidden, layout):
            zx = projection(self.zx_proj(hidden))
            bc, raw_dt = projection(side_by_side(rest, self.bc_proj, self.dt_proj)), None
        else:
            in_proj = (self.zx_proj(hidden), self.bc_proj(rest), self.dt_proj(rest))
            zx, bc, raw_dt = with_lora(in_proj, "in_proj", rest, dropout_key, self.lora)
            zx = projection(constrain(zx, "batch", "length", None, "mamba_inner"))
            bc = projection(constrain(bc, "batch", "length", None, "mamba_groups"))
            raw_dt = projection(constrain(raw_dt, "batch", "length", "mamba_heads"))

        if state is not None and layout.is_step:
            y, state = self._step(zx, bc, raw_dt, layout, state)
            gate = Gate(zx)
        else:
            y, gate, state = self._sequence(zx, bc, raw_dt, layout, state)
        y = self.norm(y, gate)
        return with_lora(self.out_proj(y), "out_proj", y, dropout_key, self.lora), state

    def _reads_columns(self, hidden: Float[Array, "b l d"], layout: TokenLayout) -> bool:
        """Whether B, C and the raw time steps are left in one product, whose columns the kernels read: of many tokens
        on one GPU."""
        if hidden.shape[1] == 1 or layout.tentative or (self.lora is not None and "in_proj" in self.lora):
            return False
        plain = all(type(layer) is Linear for layer in (self.bc_proj, self.dt_proj))
        return plain and fused_gpu_obstacle() is None and math.prod(automatic_axes().values()) == 1

    def _sequence(
        self,
        zx: Float[Array, "b l 2 inner"],
        bc: Float[Array, "b l 2 groups_state"] | Float[Array, "b l columns"],
        raw_dt: Float[Array, "b l h"] | None,
        layout: TokenLayout,
        state: MambaState | None,
    ) -> tuple[Float[Array, "b l inner"], Gate, MambaState | MambaSteps | None]:
        x, B, C, windows, gate, behind = mixer_convs(
            zx,
            bc,
            self._conv_params(self.conv_x),
            self._conv_params(self.conv_bc),
            initial_windows=(state.conv_x, state.conv_bc) if state else None,
            run_start=layout.run_start,
            run_end=layout.run_end,
            segment_ids=layout.segment_ids,
            activation="silu",
            keep_windows=state is not None and not layout.tentative,
        )
        if layout.token_mask is not None:  # the window spills from real tokens onto masked ones
            x = jnp.where(layout.token_mask[..., None], x, 0)

        by_head, B = self._by_head(x), self._by_group(B)
        if behind is not None:
            limit = self.config.time_step_limit
            dt, A = RawSteps(behind, self.dt_bias[...], self.A_log[...], layout.time_mask, limit), None
        else:
            dt = time_step(raw_dt, self.dt_bias[...], limit=self.config.time_step_limit, mask=layout.time_mask)
            A = -jnp.exp(self.A_log[...])
        y, ssm = ssd(
            by_head,
            dt,
            A,
            B,
            self._by_group(C),
            self.D[...],
            initial_state=state.ssm if state else None,
            segment_ids=layout.segment_ids,
            chunk_size=self.config.chunk_size,
            keep_states=layout.recomputed,
        )
        y = y.reshape(x.shape)
        if state is None:
            return y, gate, None
        if layout.tentative:
            y, steps = together((y, MambaSteps(state, zx[:, :, X], bc, by_head, B, dt, A)))
            return y, gate, steps
        # In the cache's dtypes, whatever they are: a loop that carries the cache must find it as it was.
        window_x, window_bc = windows
        state = MambaState(
            window_x.astype(state.conv_x.dtype), window_bc.astype(state.conv_bc.dtype), ssm.astype(state.ssm.dtype)
        )
        y, state = together((y, state))
        return y, gate, state

    def _step(
        self,
        zx: Float[Array, "b 1 2 inner"],
        bc: Float[Array, "b 1 2 groups_state"],
        raw_dt: Float[Array, "b 1 h"],
        layout: TokenLayout,
        state: MambaState,
    ) -> tuple[Float[Array, "b 1 inner"], MambaState]:
        if decoding.recurrence_obstacle(self) is None:
            y, state = decoding.recurrence_step(self, zx[:, 0], bc[:, 0], raw_dt[:, 0], layout, state)
            return y[:, None], state
        x, window_x = causal_conv_step(zx[:, 0, X], state.conv_x, *self._conv_params(self.conv_x), activation="silu")
        bc, window_bc = causal_conv_step(bc[:, 0], state.conv_bc, *self._conv_params(self.conv_bc), activation="silu")
        if layout.token_mask is not None:  # a masked token leaves the row as it was
            keep = layout.token_mask[:, 0]
            window_x = _where_row(keep, window_x, state.conv_x)
            window_bc = _where_row(keep, window_bc, state.conv_bc)

        mask = None if layout.time_mask is None else layout.time_mask[:, 0]
        y, ssm = ssd_step(
            state.ssm,
            self._by_head(x),
            time_step(raw_dt[:, 0], self.dt_bias[...], limit=self.config.time_step_limit, mask=mask),
            -jnp.exp(self.A_log[...]),
            self._by_group(bc[:, 0]),
            self._by_group(bc[:, 1]),
            self.D[...],
        )
        return y.reshape(x.shape)[:, None], MambaState(window_x, window_bc, ssm.astype(state.ssm.dtype))

    def _conv_params(self, conv: DepthwiseConv) -> tuple[jax.Array, jax.Array | None]:
        return conv.kernel[...], None if conv.bias is None else conv.bias[...]

    def _by_head(self, x: Float[Array, "... inner"]) -> Float[Array, "... h p"]:
        return x.reshape(*x.shape[:-1], self.config.n_mamba_heads, self.config.mamba_headdim)

    def _by_group(self, x: Float[Array, "... groups_state"]) -> Float[Array, "... g n"]:
        return x.reshape(*x.shape[:-1], self.config.mamba_ngroups, self.config.mamba_d_state)


class MambaLayer(nnx.Module):
    """Pre-norm Mamba2 layer. A hybrid layer's transformer output t joins the mixer's input but not the residual stream:
    h + mixer(norm(h + t))."""

    def __init__(self, config: Zamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype
        )
        self.mamba = Mamba2Mixer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "b l d"],
        layout: TokenLayout,
        state: MambaState | None,
        transformer_output: Float[Array, "b l d"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "b l d"], MambaState | MambaSteps | None]:
        if state is not None and layout.is_step and decoding.mamba_obstacle(self, hidden.shape[0]) is None:
            return decoding.mamba_layer_step(self, hidden, layout, state, transformer_output)[:2]
        if transformer_output is None:
            mixer_input, hidden = self.input_layernorm.and_input(hidden)
        else:
            mixer_input = self.input_layernorm(hidden + transformer_output)
        mixed, state = self.mamba(mixer_input, layout, state, dropout_key)
        return constrain(hidden + mixed, "batch", "length", None), state


def _initial_dt_bias(config: Zamba2Config, rngs: nnx.Rngs) -> Float[Array, " h"]:
    """The inverse softplus of time steps drawn log-uniformly from [time_step_min, time_step_max]."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    uniform = jax.random.uniform(rngs.params(), (config.n_mamba_heads,), jnp.float32)
    dt = jnp.maximum(jnp.exp(low + uniform * (high - low)), config.time_step_floor)
    return dt + jnp.log(-jnp.expm1(-dt))


def _where_row(keep: Bool[Array, " b"], new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(keep.reshape(-1, *[1] * (new.ndim - 1)), new, old)
