"""The public function of paged attention: argument checks and the choice of implementation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import gpu_cudnn, gpu_decode, reference, xla

# Few queries a row are decoding, and read memory; many are a prompt, and multiply.
IMPLEMENTATIONS = (
    dispatch.Implementation(
        "pallas_gpu", gpu_decode.paged_attention, unsupported=gpu_decode.unsupported
    ),
    dispatch.Implementation("cudnn", gpu_cudnn.paged_attention, unsupported=gpu_cudnn.unsupported),
    dispatch.Implementation("xla", xla.paged_attention),
    dispatch.Implementation("reference", reference.paged_attention, automatic=False),
)


def paged_attention(
    q: Float[Array, "B T H K"],
    key_pages: Float[Array, "P S G K"],
    value_pages: Float[Array, "P S G K"],
    page_table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    *,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Grouped-query attention of new queries to the pages of their row, causal by position.

        out_t = sum_s softmax_s(scale q_t . k_s) v_s    over the keys s = 0 .. positions[t]

    Key s of row b lies in page `page_table[b, s // S]` at slot `s % S`; the pages already hold the
    keys of the queries themselves. Query head h reads key/value head h // (H / G). The softmax runs
    in fp32. Forward only.

    A row has the keys up to its greatest position. What lies beyond is without influence on any
    bit: entries of the table there may be any number, slots there may hold NaN. The result of a row
    depends neither on the other rows nor on N. `xla` keeps that promise bit for bit on CPU; with
    `pallas_gpu` last bits depend on the lengths of all rows, by which it shares out the work.

    Args:
      q: bf16 or fp32, H a multiple of G.
      key_pages, value_pages: of q's dtype, or bf16 or float8_e4m3fn, then cast to it; P pages of S
        slots, which rows may share.
      page_table: int32, pages of each row in order.
      positions: int32, positions of the queries, below N * S (a greater one sees all N * S keys),
        in any order; below 0 is padding, which gives exactly 0.
      scale: 1/sqrt(K) when None.
      implementation: 'pallas_gpu' (Hopper; few queries a row), 'cudnn' (NVIDIA; many), 'xla',
        'reference' (dense), or None for the best that takes these arguments.
      return_lse: also return log sum_s exp(scale q_t . k_s), for merging with other keys.

    Returns:
      [B, T, H, K] of q's dtype; with `return_lse` in fp32, and fp32 [B, T, H], -inf at padding.

    Raises:
      ValueError: shapes or dtypes that disagree.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "paged_attention"
    if q.ndim != 4 or key_pages.ndim != 4:
        raise ValueError(
            f"{name}: q and key_pages have shapes {q.shape} and {key_pages.shape}; "
            "they must be [B, T, H, K] and [P, S, G, K]"
        )
    batch, length, heads, key_dim = q.shape
    pages, slots, kv_heads, _ = key_pages.shape
    dispatch.require_shape(name, "key_pages", key_pages, (pages, slots, kv_heads, key_dim))
    dispatch.require_shape(name, "value_pages", value_pages, key_pages.shape)
    wanted = (batch, max((1, *page_table.shape[1:2])))
    dispatch.require_shape(name, "page_table", page_table, wanted)
    dispatch.require_shape(name, "positions", positions, (batch, length))
    if 0 in key_pages.shape:
        raise ValueError(f"{name}: key_pages has shape {key_pages.shape}; no axis may be empty")
    if heads % kv_heads:
        raise ValueError(f"{name}: {heads} query heads are no multiple of {kv_heads} key heads")
    dispatch.require_floating(name, q=q)
    if not key_pages.dtype == value_pages.dtype == jnp.float8_e4m3fn:
        dispatch.require_one_dtype(name, key_pages=key_pages, value_pages=value_pages)
    narrow = (jnp.bfloat16, jnp.float8_e4m3fn)
    if key_pages.dtype not in (q.dtype, *narrow):
        wanted = " or ".join(dict.fromkeys((str(q.dtype), *(str(jnp.dtype(x)) for x in narrow))))
        raise ValueError(
            f"{name}: key_pages has dtype {key_pages.dtype}; q's is {q.dtype}, "
            f"so it must be {wanted}"
        )
    for index, array in (("page_table", page_table), ("positions", positions)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name}: {index} has dtype {array.dtype}; it must be int32")
    arrays = (q, key_pages, value_pages, page_table, positions)
    static: dict[str, Any] = dict(scale=1 / math.sqrt(key_dim) if scale is None else float(scale))
    if return_lse:
        static["return_lse"] = True
    chosen = dispatch.select(name, IMPLEMENTATIONS, implementation, *arrays, **static)
    with jax.named_scope("attend"):
        return chosen.call(*arrays, **static)
