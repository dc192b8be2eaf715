"""Lightning attention in chunks, in plain jax: every backend, any length, differentiable.

Inside a chunk of C tokens attention is a masked C x C product; between chunks only the state moves.
With n_i the number of real tokens up to i, every decay is exp(-s (n_i - n_j)) of a difference >= 0,
so nothing overflows whatever the slope.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import accumulation_dtype, einsum
from pallas_kernels.lightning_attention.segments import segment_runs


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Scan over whole chunks, then the remainder; see `pallas_kernels.lightning_attention`."""
    batch, length, heads, key_dim = q.shape
    dtype = accumulation_dtype(v.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[3]), dtype)
    if segment_ids is None:
        # One row of bookkeeping serves the batch: the decay matrices stay [1, H, C, C].
        real = jnp.ones((1, length), bool)
        runs = jnp.zeros((1, length), jnp.int32)
    else:
        real, runs = segment_runs(segment_ids)
    inputs = (q, k, v, real, runs)
    # The chunk's scores are cheaper to compute twice than to keep for the backward pass.
    chunk = jax.checkpoint(functools.partial(_chunk, decay_slopes.astype(dtype)), prevent_cse=False)

    carry = (initial_state.astype(dtype), jnp.zeros((runs.shape[0],), jnp.int32))
    whole = length // chunk_size * chunk_size
    out = []
    if whole:
        stacked = [
            jnp.moveaxis(x[:, :whole].reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)
            for x in inputs
        ]
        carry, chunks = jax.lax.scan(chunk, carry, tuple(stacked))
        out.append(jnp.moveaxis(chunks, 0, 1).reshape(batch, whole, heads, v.shape[3]))
    if whole < length:
        carry, remainder = chunk(carry, tuple(x[:, whole:] for x in inputs))
        out.append(remainder)
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0], carry[0]


def _chunk(slopes, carry, inputs):
    """One chunk: (state, run) before it -> (state, run) after it, and its output."""
    state, entering_run = carry
    q, k, v, real, runs = inputs
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)  # n_i, [b, C]
    last_run = runs[:, -1]

    causal = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    sees = causal & (runs[:, :, None] == runs[:, None, :]) & real[:, :, None] & real[:, None, :]
    within = _decay(slopes, count[:, :, None] - count[:, None, :], sees)  # [b, H, C, C]
    scores = einsum("bihk,bjhk->bhij", q, k) * within
    intra = einsum("bhij,bjhv->bihv", scores.astype(v.dtype), v)

    reads = real & (runs == entering_run[:, None])
    from_start = _decay(slopes, count, reads)  # [b, H, C]
    # Products with the state in fp32 whatever the inputs: it is what a model remembers.
    inter = einsum("bihk,bhkv->bihv", q.astype(state.dtype), state) * from_start.mT[..., None]

    writes = real & (runs == last_run[:, None])
    to_end = _decay(slopes, count[:, -1:] - count, writes)  # [b, H, C]
    decayed_v = v.astype(state.dtype) * to_end.mT[..., None]
    written = einsum("bjhk,bjhv->bhkv", k.astype(state.dtype), decayed_v)
    kept = jnp.where(
        (last_run == entering_run)[:, None],
        jnp.expm1(-slopes * count[:, -1:]),
        -1.0,
    )[..., None, None]
    state = state + (kept * state + written)
    return (state, last_run), (intra + inter).astype(v.dtype)


def _decay(
    slopes: Float[Array, "H"], steps: Int[Array, "b *rest"], mask: Bool[Array, "b *rest"]
) -> Float[Array, "b H *rest"]:
    """exp(-slope * steps) where the mask is set, 0 elsewhere; masked before exp, never after."""
    steps = jnp.where(mask, steps, 0)[:, None].astype(slopes.dtype)
    slopes = slopes.reshape(-1, *(1,) * (steps.ndim - 2))
    return jnp.where(mask[:, None], jnp.exp(-slopes * steps), 0)


def lightning_state(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    segment_ids: Int[Array, "B T"] | None,
    reverse: bool,
    chunk_size: int,
) -> Float[Array, "B H K V"]:
    """See `pallas_kernels.lightning_state`; XLA drops the output, which nobody asks for."""
    if reverse:
        k, v = jnp.flip(k, 1), jnp.flip(v, 1)
        segment_ids = None if segment_ids is None else jnp.flip(segment_ids, 1)
    _, state = lightning_attention(
        k, k, v, decay_slopes, initial_state=None, segment_ids=segment_ids, chunk_size=chunk_size
    )
    return state


def lightning_decode_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    decay_slopes: Float[Array, "H"],
    states: Float[Array, "L B H K V"],
    layer: Int[Array, ""],
    real: Bool[Array, "B"],
    continues: Bool[Array, "B"],
) -> tuple[Float[Array, "B H V"], Float[Array, "L B H K V"]]:
    """`pallas_kernels.lightning_decode_step` of a layer among several."""
    held = jax.lax.dynamic_index_in_dim(states, layer, keepdims=False)
    q, k, value = (x.astype(held.dtype) for x in (q, k, v))
    forgotten = jnp.expm1(-decay_slopes.astype(held.dtype))[:, None, None]
    old = jnp.where(continues[:, None, None, None], held, 0)
    new = old + (forgotten * old + k[..., :, None] * value[..., None, :])
    out = jnp.sum(q[..., :, None] * new, axis=-2).astype(v.dtype)
    new = jnp.where(real[:, None, None, None], new, held)
    states = jax.lax.dynamic_update_index_in_dim(states, new, layer, 0)
    return jnp.where(real[:, None, None], out, 0), states
