"""Paged attention as its definition: every page of every row, the whole T x (N S) matrix."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import einsum


def gather(
    pages: Float[Array, "P S G K"], page_numbers: Int[Array, "B N"], dtype: jnp.dtype
) -> Float[Array, "B N*S G K"]:
    """Pages side by side, cast to `dtype`; a number that is no page gives some page."""
    rows = pages.at[page_numbers].get(mode="clip").astype(dtype)
    return rows.reshape(page_numbers.shape[0], -1, *pages.shape[2:])


def paged_attention(
    q: Float[Array, "B T H K"],
    key_pages: Float[Array, "P S G K"],
    value_pages: Float[Array, "P S G K"],
    page_table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    return_lse: bool = False,
) -> Any:
    """Dense form of `pallas_kernels.paged_attention`."""
    batch, length, heads, key_dim = q.shape
    kv_heads = key_pages.shape[2]
    k = gather(key_pages, page_table, q.dtype)
    v = gather(value_pages, page_table, q.dtype)
    index = jnp.arange(k.shape[1], dtype=jnp.int32)
    reach = jnp.max(positions, axis=1, initial=-1)
    # Zero weight does not hide a value: 0 * NaN is NaN.
    v = jnp.where((index <= reach[:, None])[..., None, None], v, 0)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, key_dim)
    scores = einsum("btgrk,bsgk->bgrts", grouped, k) * scale
    visible = (index <= positions[..., None])[:, None, None]
    padding = (positions < 0)[:, None, None, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.where(padding, 0, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.where(padding, 1, jnp.sum(weights, axis=-1, keepdims=True))
    out = einsum("bgrts,bsgk->btgrk", (weights / total).astype(q.dtype), v).reshape(q.shape)
    if not return_lse:
        return out.astype(q.dtype)
    lse = jnp.where(padding, -jnp.inf, top + jnp.log(total))[..., 0]  # [B, G, R, T]
    return out, jnp.moveaxis(lse, 3, 1).reshape(q.shape[:3])
