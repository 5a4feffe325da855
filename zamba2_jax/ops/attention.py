"""Softmax attention: a plain reference, three backends, and the choice between them."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from zamba2_jax.ops._checks import check_boolean, check_choice, check_floating, check_integer, check_rank, check_shape
from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.ops._platform import compute_capability, platform
from zamba2_jax.ops.blocked_attention import causal_attention, masked_attention, rows_per_block
from zamba2_jax.ops.cudnn_attention import cudnn_attention
from zamba2_jax.ops.sequence_attention import causal_attention as sequence_attention
from zamba2_jax.sharding import (
    BATCH_AXES,
    RULES,
    automatic_axes,
    constrain,
    dividing,
    length_axis,
    length_parts,
)

Implementation = Literal["reference", "xla", "cudnn", "splash"]
IMPLEMENTATIONS = ("reference", "xla", "cudnn", "splash")

# Added to the scores of hidden keys. Finite, so that a query that may see nothing gets the mean of all values instead
# of NaN.
MASKED_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)

# The name, for policies of checkpointing, of what the backward pass needs of the forward one, so that this is not run
# again. cuDNN's has none: there it is the results of the primitive.
ATTENTION = "attention"

# The TPU kernel's tiles: lengths must be multiples of the smaller, and the larger is used where it divides them.
SPLASH_BLOCKS = (512, 256, 128)


@functools.partial(jax.jit, static_argnames=("scale", "is_causal", "implementation"))
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    token_mask: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(scale query keyᵀ) value, the softmax in float32 over the keys that a query may see.

    Letters: b batch, l queries, s keys. Query head i reads key head i // (heads // kv_heads).

    Args:
      query: (b, l, heads, head_dim), floating.
      key, value: (b, s, kv_heads, head_dim), of query's dtype; heads is a multiple of kv_heads.
      scale: None is head_dim^-1/2. (Zamba2 uses (head_dim / 2)^-1/2.)
      mask: (b, 1, l, s) or (b, l, s) bool or None, True where the query may see the key. This is the way to attend to a
        preallocated cache.
      is_causal: query i may see keys 0...i; needs l = s.
      segment_ids: None, or a pair of integer arrays (b, l) and (b, s): a query may see the keys of its own segment.
      token_mask: (b, l) bool or None, False at padding, with is_causal: real queries do not see its keys, and its own
        results are unspecified but finite.
        The four conditions are joined by "and". A query that may see nothing gets an unspecified but finite result.
      implementation: "reference", einsum and softmax; "xla", blocks of queries where there are many (scores of all
        of them are never in memory), else jax.nn.dot_product_attention; "cudnn", the latter's kernel; "splash", the TPU
        kernel of jax.experimental. None takes cudnn on a GPU and splash on a TPU where they can serve, and else xla.
        With is_causal and without a mask, only "reference" makes an array of a number for every pair of tokens. On a
        mesh (`jax.set_mesh`), each device has its own rows and heads; where a row's tokens are spread over devices,
        xla and splash gather the keys and values of a causal call.

    Returns:
      (b, l, heads, head_dim) in query's dtype.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument; or an implementation that cannot serve,
        saying why.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    mask = _check(query, key, value, mask, is_causal, segment_ids, token_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    obstacles = {"cudnn": _cudnn_obstacle, "splash": _splash_obstacle}
    if implementation is None:
        served = (
            name for name, obstacle in obstacles.items() if obstacle(query, key, mask, is_causal, segment_ids) is None
        )
        implementation = next(served, "xla")
    elif implementation in obstacles:
        obstacle = obstacles[implementation](query, key, mask, is_causal, segment_ids)
        if obstacle is not None:
            raise ValueError(f"implementation {implementation!r} cannot serve: {obstacle}")

    if implementation == "cudnn" and mask is None:
        return cudnn_attention(query, key, value, scale=scale, mask=None, is_causal=is_causal, token_mask=token_mask)
    if token_mask is not None:
        segment_ids = _apart(segment_ids, token_mask)
    if implementation == "splash":
        return _splash_on_mesh(query, key, value, scale, segment_ids)
    if implementation == "cudnn":  # with a mask, to which padding is joined
        mask = _join(mask, False, segment_ids, query, key)
        return cudnn_attention(query, key, value, scale=scale, mask=mask, is_causal=is_causal, token_mask=None)
    if implementation == "reference":
        out, _ = _reference(query, key, value, scale, _join(mask, is_causal, segment_ids, query, key))
    else:
        out = _in_xla(query, key, value, scale, mask, is_causal, segment_ids)
    return checkpoint_name(out, ATTENTION)


def _in_xla(query, key, value, scale, mask, is_causal, segment_ids) -> jax.Array:
    if is_causal and mask is None:
        return _causal_on_mesh(query, key, value, scale, segment_ids)
    if mask is not None and not is_causal and segment_ids is None and _is_large(query, key):
        return masked_attention(query, key, value, mask, scale=scale, masked_score=MASKED_SCORE)
    mask = _join(mask, False, segment_ids, query, key)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, is_causal=is_causal, implementation="xla"
    )


def prefill_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cached_key: jax.Array,
    cached_value: jax.Array,
    start: jax.Array,
    *,
    mask: jax.Array,
    token_mask: jax.Array | None = None,
    scale: float | None = None,
    beginning_apart: bool | None = None,
) -> jax.Array:
    """`attention` of the tokens that a call appends to a cache, to the cache they are in already.

    A cache that was empty holds nothing but these tokens, so that attention to them alone, causal and without a mask
    of every slot, is the same.

    Args:
      query, key, value: (b, l, heads, head_dim) and (b, l, kv_heads, head_dim), of the call's own tokens.
      cached_key, cached_value: (b, slots, kv_heads, head_dim), those keys and values among them, in query's dtype.
      start: () integer, the slot of the first of them: 0 for an empty cache.
      mask: (b, l, slots) bool, the slots that each token may see.
      token_mask: (b, l) bool or None, the call's real tokens; says no more than mask where start is 0.
      scale: as in `attention`.
      beginning_apart: whether the program holds both forms, and chooses when it runs. None: on a GPU, where causal
        attention without a mask is a kernel that skips half the work.

    Returns:
      (b, l, heads, head_dim) in query's dtype.

    Raises:
      ValueError: as in `attention`.
    """
    if beginning_apart is None:
        beginning_apart = platform() == "gpu"

    def to_cache():
        return attention(query, cached_key, cached_value, mask=mask, scale=scale)

    def to_themselves():
        return attention(query, key, value, is_causal=True, token_mask=token_mask, scale=scale)

    return jax.lax.cond(start == 0, to_themselves, to_cache) if beginning_apart else to_cache()


@functools.partial(jax.jit, static_argnames=("scale", "is_causal", "dropout_rate"))
def attention_with_weights(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    token_mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The reference form of `attention`, which also returns its weights and can drop some of them.

    Args:
      dropout_rate: the probability with which a weight is set to zero; the others are divided by 1 - dropout_rate.
      dropout_key: a jax.random key, needed where dropout_rate is not 0.
      The others as in `attention`.

    Returns:
      The result (b, l, heads, head_dim) and the weights (b, heads, l, s) that made it, after dropout, both in query's
      dtype.

    Raises:
      ValueError: as in `attention`; a dropout rate outside [0, 1), or one without a key.
    """
    mask = _check(query, key, value, mask, is_causal, segment_ids, token_mask)
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate is {dropout_rate}; it must be at least 0 and less than 1")
    if dropout_rate > 0.0 and dropout_key is None:
        raise ValueError(f"dropout_key is None and dropout_rate is {dropout_rate}; dropout needs a jax.random key")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if token_mask is not None:
        segment_ids = _apart(segment_ids, token_mask)
    mask = _join(mask, is_causal, segment_ids, query, key)
    return _reference(query, key, value, scale, mask, dropout_rate, dropout_key)


def _check(query, key, value, mask, is_causal, segment_ids, token_mask) -> jax.Array | None:
    """Checks all arguments; returns the mask as (b, 1, l, s)."""
    check_rank("query", query, 4, "(b, l, heads, head_dim)")
    check_rank("key", key, 4, "(b, s, kv_heads, head_dim)")
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    check_shape("key", key, (batch, keys, kv_heads, head_dim), "(b, s, kv_heads, head_dim)")
    check_shape("value", value, key.shape, "the shape of key, (b, s, kv_heads, head_dim)")
    check_floating("query", query)
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {array.dtype}; it must be query's, {query.dtype}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"key has {kv_heads} heads and query has {heads}; query's must be a multiple of key's")
    if is_causal and queries != keys:
        raise ValueError(
            f"is_causal is True with {queries} queries and {keys} keys; it needs as many queries as keys: say "
            "with mask which keys each query may see"
        )
    if segment_ids is not None:
        if not isinstance(segment_ids, tuple) or len(segment_ids) != 2:
            raise ValueError(
                "segment_ids must be a tuple of two arrays, (b, l) for the queries and (b, s) for the keys"
            )
        check_shape("segment_ids[0]", segment_ids[0], (batch, queries), "(b, l)")
        check_shape("segment_ids[1]", segment_ids[1], (batch, keys), "(b, s)")
        check_integer("segment_ids[0]", segment_ids[0])
        check_integer("segment_ids[1]", segment_ids[1])
    if token_mask is not None:
        if not is_causal:
            raise ValueError("token_mask was given and is_causal is False; say with mask which keys a query may see")
        check_shape("token_mask", token_mask, (batch, queries), "(b, l)")
        check_boolean("token_mask", token_mask)
    if mask is not None:
        if mask.shape not in ((batch, 1, queries, keys), (batch, queries, keys)):
            raise ValueError(
                f"mask has shape {mask.shape}; it must be (b, 1, l, s) = {(batch, 1, queries, keys)} or (b, l, s) = "
                f"{(batch, queries, keys)}"
            )
        check_boolean("mask", mask)
        mask = mask.reshape(batch, 1, queries, keys)
    return mask


def _join(mask, is_causal, segment_ids, query, key) -> jax.Array | None:
    """One mask (b or 1, 1, l, s) of all conditions, or None where there are none."""
    conditions = [] if mask is None else [mask]
    if is_causal:
        conditions.append(jnp.tril(jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)))
    if segment_ids is not None:
        conditions.append(segment_ids[0][:, None, :, None] == segment_ids[1][:, None, None, :])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _apart(segment_ids, token_mask) -> tuple[jax.Array, jax.Array]:
    """Segments in which padding is one of its own."""
    if segment_ids is None:
        ids = token_mask.astype(jnp.int32)
        return ids, ids
    # Apart from every id in use, whichever those are.
    padding = jnp.minimum(*map(jnp.min, segment_ids)) - 1
    return tuple(jnp.where(token_mask, ids, padding) for ids in segment_ids)


def _reference(query, key, value, scale, mask, dropout_rate=0.0, dropout_key=None) -> tuple[jax.Array, jax.Array]:
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("blkgd,bskd->bkgls", grouped, key, preferred_element_type=jnp.float32)
    scores = constrain(scores, "batch", "kv_heads", None, "length", None)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    if dropout_rate > 0.0:
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0).astype(query.dtype)
    out = jnp.einsum("bkgls,bskd->blkgd", weights, value, preferred_element_type=jnp.float32)
    return out.reshape(query.shape).astype(query.dtype), weights.reshape(batch, heads, queries, keys)


def _cudnn_obstacle(query, key, mask, is_causal, segment_ids) -> str | None:
    """Why cuDNN's flash attention cannot serve, or None where it can."""
    head_dim = query.shape[3]
    if platform() != "gpu":
        return f"it needs a GPU, and this runs on {platform()}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype}; it takes bfloat16 and float16"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim is {head_dim}; it takes multiples of 8 up to 256"
    if head_dim > 128 and compute_capability() < 9.0:
        return f"head_dim is {head_dim}; it takes more than 128 on compute capability 9.0 and newer only"
    if segment_ids is not None:
        return "segment_ids were given, which would become a mask with a number for every pair of tokens"
    if is_causal and length_axis(query.shape[1]):
        return "a row's tokens are spread over devices, and causal is to it a query's place among the device's own"
    return None


def _is_large(query, key) -> bool:
    """Whether the scores of all queries at once are more than one block of `masked_attention`."""
    return query.shape[1] > rows_per_block(key.shape[1])


def _splash_obstacle(query, key, mask, is_causal, segment_ids) -> str | None:
    """Why the TPU's splash attention cannot serve, or None where it can."""
    queries, keys = query.shape[1], key.shape[1]
    if platform() != "tpu":
        return f"it needs a TPU, and this runs on {platform()}"
    if mask is not None:
        return "mask was given; it takes is_causal and segment_ids only"
    if not is_causal:
        return "is_causal is False; it is set up for causal attention only"
    parts = length_parts(queries)
    if queries % (parts * SPLASH_BLOCKS[-1]) or keys % (parts * SPLASH_BLOCKS[-1]):
        of_device = "" if parts == 1 else f" on {parts} devices"
        return f"there are {queries} queries and {keys} keys{of_device}; it takes multiples of {SPLASH_BLOCKS[-1]}"
    return None


def _specs(query, key) -> tuple[PartitionSpec, PartitionSpec]:
    """How rows, tokens and heads (key heads with those that read them), and rows and tokens, are split on a mesh."""
    sizes = automatic_axes()
    rows = dividing(BATCH_AXES, sizes, query.shape[0])
    tokens = length_axis(query.shape[1])
    return PartitionSpec(rows, tokens, _axes_of_heads(key) or None), PartitionSpec(rows, tokens)


def _axes_of_heads(key) -> tuple[str, ...]:
    """The mesh axes that split heads. A PartitionSpec does not tell: it takes one axis out of its tuple."""
    return dividing((RULES["kv_heads"],), automatic_axes(), key.shape[2]) or ()


def _causal_on_mesh(query, key, value, scale, segment_ids) -> jax.Array:
    options = {"scale": scale, "masked_score": MASKED_SCORE}
    tokens = length_axis(query.shape[1])
    if tokens is not None:
        function = functools.partial(sequence_attention, axis=tokens, **options)
    else:

        def function(query, key, value, segment_ids):
            return causal_attention(query, key, value, segment_ids=segment_ids, **options)

    by_head, by_token = _specs(query, key)
    return on_each_device(function, (query, key, value, segment_ids), (by_head, by_head, by_head, by_token), by_head)


def _splash_on_mesh(query, key, value, scale, segment_ids) -> jax.Array:
    """On a mesh, every device runs the kernel on its own rows and heads; where a row's tokens are spread, on its own
    queries and all keys, with its part of the kernel's table of what to read."""
    by_head, by_token = _specs(query, key)
    tokens = length_axis(query.shape[1])
    heads = query.shape[2] // math.prod(automatic_axes()[axis] for axis in _axes_of_heads(key))
    kernel = _splash_kernel(query.shape[1], heads, length_parts(query.shape[1]))
    of_kernel = PartitionSpec()
    if tokens is not None:
        mesh = jax.sharding.get_abstract_mesh()
        of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, tokens)))

    def local(kernel, query, key, value, segment_ids):
        if tokens is not None:
            key, value = jax.lax.all_gather((key, value), tokens, axis=1, tiled=True)
            if segment_ids is not None:
                segment_ids = segment_ids[0], jax.lax.all_gather(segment_ids[1], tokens, axis=1, tiled=True)
        return _splash(kernel, query, key, value, segment_ids, scale=scale)

    return on_each_device(
        local,
        (kernel, query, key, value, segment_ids),
        (of_kernel, by_head, by_head, by_head, by_token),
        by_head,
    )


def _splash_kernel(length: int, heads: int, parts: int):
    """The kernel for rows of `length` tokens, of whose queries each of `parts` devices has its share."""
    # Imported here: the kernel's module is of use on a TPU only.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        make_splash_mha,
    )

    block = next(size for size in SPLASH_BLOCKS if length % (parts * size) == 0)
    return make_splash_mha(
        MultiHeadMask([CausalMask((length, length), shard_count=parts)] * heads),
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=ATTENTION,
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )


def _splash(kernel, query, key, value, segment_ids, *, scale) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    # The kernel knows no scale, and wants the heads before the length.
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    if segment_ids is None:
        out = jax.vmap(kernel)(query, key, value)
    else:
        out = jax.vmap(kernel)(query, key, value, SegmentIds(*segment_ids))
    return jnp.swapaxes(out, 1, 2)
