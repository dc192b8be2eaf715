"""Paged attention in blocks of keys and queries, in plain jax.

The engine compares runs bit by bit, so a row must not notice what it is computed beside:

- Blocks of keys begin at position 0 and have one size, whatever the table's. The order of summation
  is a function of a query's position alone.
- A block beyond a query's position leaves its sums as they are by selection, not by adding zeros.
- Weights are added in an order written here.
- Products have the batch and the key heads as batch dimensions, one matrix a row and key head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import accumulation_dtype, einsum
from pallas_kernels.paged_attention.reference import gather

KEY_BLOCK = 512  # keys, rounded down to whole pages
QUERY_BLOCK = 128


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
    """Blockwise form of `pallas_kernels.paged_attention`.

    The blocks of keys visited follow from the positions as they are at run time, so one program
    serves all lengths. More than `QUERY_BLOCK` queries are padded to whole blocks; fewer are one
    block as they are, a decode step of one query too.
    """
    batch, length, heads, key_dim = q.shape
    slots, kv_heads = key_pages.shape[1:3]
    positions = jnp.minimum(positions, page_table.shape[1] * slots - 1)
    table = _padded(page_table, _pages_per_block(slots), 0)

    def block(inputs):
        queries, at = inputs
        return _query_block(queries, key_pages, value_pages, table, at, scale)

    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, key_dim)
    if length <= QUERY_BLOCK:
        out, lse = block((grouped, positions))
    else:
        split = (
            jnp.moveaxis(x.reshape(batch, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)
            for x in (_padded(grouped, QUERY_BLOCK, 0), _padded(positions, QUERY_BLOCK, -1))
        )
        out, lse = (jnp.moveaxis(x, 0, 1) for x in jax.lax.map(block, tuple(split)))
    out = out.reshape(batch, -1, heads, key_dim)[:, :length]
    if not return_lse:
        return out.astype(q.dtype)
    return out, lse.reshape(batch, -1, heads)[:, :length]


def _pages_per_block(slots: int) -> int:
    return max(1, KEY_BLOCK // slots)


def _padded(x, multiple, value):
    """Axis 1 lengthened to a multiple."""
    widths = ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, constant_values=value)


def _sum(x):
    """Sum over the last axis; the order of `jnp.sum` on CPU varies with the size of other axes."""
    while x.shape[-1] > 1:
        x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % 8)))
        x = functools.reduce(jnp.add, jnp.split(x, 8, axis=-1))
    return x[..., 0]


def _query_block(q, key_pages, value_pages, table, positions, scale):
    """Q [B, T, G, R, K], table of whole blocks, positions [B, T] -> (out [B, T, G, R, K], lse)."""
    batch, length, groups, repeats, key_dim = q.shape
    slots = key_pages.shape[1]
    pages = _pages_per_block(slots)
    block = pages * slots
    dtype = accumulation_dtype(q.dtype)
    reach = jnp.max(positions, axis=1, initial=-1)  # [B], last key of each row
    # The heads that read one key head are more rows (M = T R) of its product.
    rows = jnp.moveaxis(q, 2, 1).reshape(batch, groups, length * repeats, key_dim)
    at = jnp.repeat(positions, repeats, axis=1)[:, None]  # [B, 1, M]

    def attend(i, carry):
        top, total, acc = carry
        index = i * block + jnp.arange(block, dtype=jnp.int32)
        exists = index <= reach[:, None]  # [B, block]
        numbers = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        keys = gather(key_pages, numbers, q.dtype)
        # Zero weight does not hide a value: 0 * NaN is NaN.
        values = jnp.where(exists[..., None, None], gather(value_pages, numbers, q.dtype), 0)
        scores = einsum("bgmk,bsgk->bgms", rows, keys) * scale
        scores = jnp.where(index <= at[..., None], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        product = einsum("bgms,bsgk->bgmk", weights.astype(q.dtype), values)
        new_total = total * shrink + _sum(weights)
        new_acc = acc * shrink[..., None] + product
        # A query that sees no key of this block keeps its sums; its new ones are NaN if it has
        # seen none before either.
        sees = at >= i * block
        return (
            jnp.where(sees, new_top, top),
            jnp.where(sees, new_total, total),
            jnp.where(sees[..., None], new_acc, acc),
        )

    shape = (batch, groups, length * repeats)
    start = (
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, key_dim), dtype),
    )
    num_blocks = (jnp.max(reach, initial=-1) + block) // block  # ceil((position + 1) / block)
    top, total, acc = jax.lax.fori_loop(0, num_blocks, attend, start)
    out = acc / jnp.where(at < 0, 1, total)[..., None]
    out = out.reshape(batch, groups, length, repeats, key_dim)
    lse = (top + jnp.log(total)).reshape(batch, groups, length, repeats)
    return jnp.moveaxis(out, 1, 2), jnp.moveaxis(lse, 1, 2)
