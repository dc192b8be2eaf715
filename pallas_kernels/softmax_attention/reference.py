"""Softmax attention as its definition: the whole T x S matrix. Quick for short inputs."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import einsum

# The name under which a policy of `jax.checkpoint` finds the output and the log-sum-exp. With these
# two kept, the backward pass need not repeat the forward pass: all else it wants is q, k and v.
RESIDUALS = "softmax_attention"


def residuals(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of a forward pass that is to be differentiated, under `RESIDUALS`."""
    return checkpoint_name(out, RESIDUALS), checkpoint_name(lse, RESIDUALS)


def visible(
    segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    q_index: Int[Array, "T"],
    kv_index: Int[Array, "S"],
    *,
    causal: bool,
) -> Bool[Array, "B 1 1 T S"]:
    """Which keys each query may see, shaped to mask scores [B, G, H/G, T, S]."""
    mask = (segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (segment_ids != 0)[:, :, None]
    if causal:
        mask &= kv_index <= q_index[:, None]
    return mask[:, None, None]


def filled(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_offset: int | Int[Array, ""],
) -> tuple[Int[Array, "B T"], Int[Array, "B S"], Int[Array, ""]]:
    """Arrays for what a caller may leave out: ids of None are all 1, the offset becomes int32."""
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    if kv_segment_ids is None:
        kv_segment_ids = jnp.ones(k.shape[:2], jnp.int32)
    return segment_ids, kv_segment_ids, jnp.asarray(q_offset, jnp.int32)


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_offset: int | Int[Array, ""],
    *,
    causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Dense form of `pallas_kernels.softmax_attention`; returns (out, log-sum-exp)."""
    segment_ids, kv_segment_ids, q_offset = filled(q, k, segment_ids, kv_segment_ids, q_offset)
    batch, length, heads, key_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, key_dim)
    scores = einsum("btgrk,bsgk->bgrts", grouped, k) * scale
    q_index = q_offset + jnp.arange(length)
    mask = visible(segment_ids, kv_segment_ids, q_index, jnp.arange(k.shape[1]), causal=causal)
    top = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = total > 0
    probabilities = (weights / jnp.where(seen, total, 1)).astype(v.dtype)
    out = einsum("bgrts,bsgv->btgrv", probabilities, v)
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)) + top, -jnp.inf)
    lse = jnp.moveaxis(lse[..., 0], 3, 1).reshape(batch, length, heads)
    return out.reshape(batch, length, heads, -1).astype(v.dtype), lse
