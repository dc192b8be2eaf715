"""Paged attention of many queries a row on NVIDIA GPUs: cuDNN over gathered blocks of pages.

The chunks of a prompt ask for queries at consecutive positions, with padding after them. What such
a row sees is a rectangle, the keys before its first query, and a triangle, its own keys:

    rectangle   pages side by side, a block of keys at a time, as many blocks as there are keys
    triangle    the keys of the queries' own positions, causal

Each is one call of cuDNN's fused attention, which gives the log-sum-exp in fp32; outputs are merged
by it, in fp32. Rows may begin at different positions. Pages of fp8 are cast as they are gathered.
Positions of any other kind (a step of several queries that are not consecutive, say) take the XLA
form, chosen on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.reference import gather
from pallas_kernels.softmax_attention import cudnn_calls
from pallas_kernels.softmax_attention import gpu_cudnn as fused

BLOCK_BYTES = 256 << 20  # of the keys and values of one block
MAX_BLOCK = 32_768  # keys; merging costs some percent of attending to so many
LOWEST = -1e38  # below any log-sum-exp, and its differences are finite


def unsupported(
    q: Float[Array, "B T H K"],
    key_pages: Float[Array, "P S G K"],
    value_pages: Float[Array, "P S G K"],
    page_table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    return_lse: bool = False,
) -> str | None:
    """Why `paged_attention` cannot take these arguments here, or None."""
    del page_table, positions
    if return_lse:
        return "return_lse"
    if key_pages.dtype not in (q.dtype, jnp.float8_e4m3fn):
        return f"pages of {key_pages.dtype}: they must be {q.dtype} or float8_e4m3fn"
    if key_pages.dtype != q.dtype and q.shape[1] == 1:
        return f"one query a row and pages of {key_pages.dtype}: they would all be cast for it"
    if 0 in q.shape:
        return f"empty queries, of shape {q.shape}"
    if q.size >= 1 << 31:
        return f"{q.size} elements of q: cuDNN's offsets have 32 bits"
    return fused.unsupported(q, key_pages, value_pages, None, None, 0, causal=True, scale=scale)


class _Spans(NamedTuple):
    """Positions start .. start + count - 1 of each row, and whether those are all there are."""

    starts: Int[Array, "B"]
    counts: Int[Array, "B"]
    consecutive: Bool[Array, ""]


def _spans(positions: Int[Array, "B T"], keys: int) -> _Spans:
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)
    real = positions >= 0
    counts = jnp.sum(real, axis=1, dtype=jnp.int32)
    starts = jnp.maximum(positions[:, 0], 0)
    wanted = jnp.where(index < counts[:, None], positions == starts[:, None] + index, ~real)
    return _Spans(starts, counts, jnp.all(wanted) & (jnp.max(positions) < keys))


def paged_attention(
    q: Float[Array, "B T H K"],
    key_pages: Float[Array, "P S G K"],
    value_pages: Float[Array, "P S G K"],
    page_table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    """`pallas_kernels.paged_attention` by cuDNN, in bf16."""
    spans = _spans(positions, page_table.shape[1] * key_pages.shape[1])

    def consecutive(q, key_pages, value_pages, page_table):
        return _attend(spans, q, key_pages, value_pages, page_table, scale=scale)

    def any_positions(q, key_pages, value_pages, page_table):
        return xla.paged_attention(q, key_pages, value_pages, page_table, positions, scale=scale)

    arrays = (q, key_pages, value_pages, page_table)
    return jax.lax.cond(spans.consecutive, consecutive, any_positions, *arrays)


def _pages_per_block(batch: int, pages: tuple[int, ...], table: int) -> int:
    """Of each row, for pages [P, S, G, K] of bf16 and rows of so many."""
    _, slots, kv_heads, dim = pages
    keys = min(BLOCK_BYTES // (2 * 2 * batch * kv_heads * dim), MAX_BLOCK)
    return min(max(keys // slots, 1), table)


def _attend(spans: _Spans, q, key_pages, value_pages, page_table, *, scale: float):
    pages = _pages_per_block(q.shape[0], key_pages.shape, page_table.shape[1])
    block = pages * key_pages.shape[1]
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))

    def add_block(i, carry):
        numbers = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        keys, values = (gather(x, numbers, q.dtype) for x in (key_pages, value_pages))
        before = spans.starts - i * block
        more = _fused(q, keys, values, spans.counts, before, causal=False, scale=scale)
        return _merge(carry, more)

    own = _own_keys(spans, q.shape[1], key_pages, value_pages, page_table)
    keys, values = (x.astype(q.dtype) for x in own)
    out, lse = _fused(q, keys, values, spans.counts, spans.counts, causal=True, scale=scale)
    number = -(-jnp.max(spans.starts) // block)
    out, _ = jax.lax.fori_loop(0, number, add_block, (out.astype(jnp.float32), lse))
    return out.astype(q.dtype)


def _own_keys(spans: _Spans, length: int, key_pages, value_pages, page_table):
    """Keys and values of the positions of the queries, [B, T, G, K]."""
    at = spans.starts[:, None] + jnp.arange(length, dtype=jnp.int32)
    slots = key_pages.shape[1]
    numbers = jnp.take_along_axis(page_table, at // slots, axis=1, mode="clip")
    return (x.at[numbers, at % slots].get(mode="clip") for x in (key_pages, value_pages))


def _fused(q, k, v, q_length, kv_length, *, causal: bool, scale: float):
    """(out, log-sum-exp) of the first queries of each row and its first keys, perhaps none.

    The others give 0, and so does the one query that stands for a row without any.
    """
    # cuDNN's lengths are at least 1; what lies past them it multiplies by 0, which hides no NaN.
    exists = (jnp.arange(k.shape[1]) < kv_length[:, None])[..., None, None]
    k, v = (jnp.where(exists, x, 0) for x in (k, v))
    mask = cudnn_calls.Mask(causal, True, scale)
    q_length, length = (jnp.clip(n, 1, x.shape[1]) for n, x in ((q_length, q), (kv_length, k)))
    out, lse = fused._attend_primal(mask, q, k, v, q_length, length)
    return out, jnp.where((kv_length > 0)[:, None, None], lse, -jnp.inf)


def _merge(first, second):
    """Attention to the keys of both, and its log-sum-exp; the first in fp32."""
    (out, lse), (more, more_lse) = first, second
    total = jnp.logaddexp(lse, more_lse)
    top = jnp.maximum(total, LOWEST)  # of a query that has seen nothing
    before, after = (jnp.exp(x - top)[..., None] for x in (lse, more_lse))
    return out * before + more.astype(jnp.float32) * after, total
