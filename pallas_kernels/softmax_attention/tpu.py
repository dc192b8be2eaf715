"""Softmax attention on TPU: jax's splash attention kernels, given what they leave out.

The kernels (FlashAttention's forward, its gradient of queries, its gradient of keys and values)
take one key head at a time. Here are their masks, their differentiation and their borders:

- The causal mask is computed in the kernel from the index of each query, and a table of blocks
  says which are worth visiting. Both come from `q_offset`, which may be traced.
- The derivative is written out, so that the log-sum-exp is an output like any other, and so that
  a block of keys can be differentiated under the log-sum-exp of all blocks, as a ring does.
- Lengths are padded to blocks. A query that sees nothing gives 0 and -inf.
- Short inputs put the query heads of a key head below one another, as if they were queries: a
  decode step reads its cache once instead of once a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as masks,
)
from jaxtyping import Array, Float, Int

from pallas_kernels import platform
from pallas_kernels.softmax_attention.reference import residuals

LANES = 128
BLOCK = 512
MAX_HEAD_DIM = 256
UNSEEN = splash.DEFAULT_MASK_VALUE
# Segments that no other side has: padding sees nothing and is seen by nothing.
QUERY_PADDING = np.iinfo(np.int32).min
KEY_PADDING = QUERY_PADDING + 1
# Entries of the table of blocks, 3 bytes each, that fit into 1 MiB of scalar memory: those of 256K
# queries and keys. Longer causal rows visit, and mask, the blocks above the diagonal too.
MAX_TABLE = 1 << 18


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
    """See `pallas_kernels.softmax_attention`; returns (out, log-sum-exp), both differentiable.

    bf16 or fp32, head dims up to 256. Segment ids None on both sides means one segment, which is
    quicker than ids that are all 1; None on one side means all 1. `q_offset` may be traced and
    negative. bf16 queries are rounded once more when they are multiplied by a scale that is no
    power of two. fp32 inputs get true fp32 products.
    """
    plan = Plan.make(q, k, causal=causal, scale=scale, interpret=False)
    return _attend(plan, q, k, v, segment_ids, kv_segment_ids, jnp.asarray(q_offset, jnp.int32))


def attention_block_backward(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B T H"],
    grad_out: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_offset: int | Int[Array, ""],
    *,
    causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G V"]]:
    """Gradients of q, k and v through one block of keys of a longer row.

    `out`, `lse` (fp32, natural logarithm) and `grad_out` are those of attention to all keys of the
    row; `k` and `v` are some of these keys, and `q_offset` is the index of the first query counted
    from the first of them. Summed over the blocks of a row this is the gradient of the row.

    Returns:
      The gradients in the dtypes of q, k and v.
    """
    plan = Plan.make(q, k, causal=causal, scale=scale, interpret=False)
    ids = (segment_ids, kv_segment_ids, jnp.asarray(q_offset, jnp.int32))
    return _backward(plan, q, k, v, *ids, out, lse, grad_out, None)


def unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_offset: int | jax.Array,
    *,
    causal: bool,
    scale: float,
) -> str | None:
    """Why these arguments cannot be served, or None.

    The platform is that of the mesh in use if there is one (so that compiling ahead of time for a
    TPU topology is served), else the default backend's.
    """
    del k, segment_ids, kv_segment_ids, q_offset, causal, scale
    target = platform.target()
    if target != "tpu":
        return f"platform {target!r} (it needs a TPU)"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q.dtype} (it takes bfloat16 and float32)"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims K={q.shape[3]}, V={v.shape[3]} (at most {MAX_HEAD_DIM})"
    return None


def block_unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    grad_out: jax.Array,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_offset: int | jax.Array,
    *,
    causal: bool,
    scale: float,
) -> str | None:
    """Why `attention_block_backward` cannot serve these arguments, or None."""
    del out, lse, grad_out
    return unsupported(q, k, v, segment_ids, kv_segment_ids, q_offset, causal=causal, scale=scale)


@dataclass(frozen=True)
class Plan:
    """What the kernels are compiled for.

    Attributes:
      causal, scale, interpret: as the caller says; interpret runs on any device, slowly.
      length, kv_length: of the arrays.
      stacked: query heads below one another; a row of the kernels is query row // stacked.
      q_block, kv_block: queries and keys of a step.
    """

    causal: bool
    scale: float
    interpret: bool
    length: int
    kv_length: int
    stacked: int
    q_block: int
    kv_block: int

    @classmethod
    def make(cls, q, k, *, causal: bool, scale: float, interpret: bool) -> "Plan":
        length, kv_length = q.shape[1], k.shape[1]
        repeats = q.shape[2] // k.shape[2]
        stacked = repeats if length <= BLOCK else 1
        q_block = min(BLOCK, _round_up(length * stacked, LANES))
        kv_block = min(BLOCK, _round_up(kv_length, LANES))
        return cls(causal, scale, interpret, length, kv_length, stacked, q_block, kv_block)

    @property
    def rows(self) -> int:
        """Rows of the kernels: queries times stacked heads, in whole blocks."""
        return _round_up(self.length * self.stacked, self.q_block)

    @property
    def keys(self) -> int:
        """Keys in whole blocks."""
        return _round_up(self.kv_length, self.kv_block)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------- layouts
#
# The kernels take [R, rows, K] and [keys, K]: the R query heads of one key head. Batch and key
# heads are mapped over, which makes them parallel grid axes.


def _to_rows(plan, x: Float[Array, "B T H D"], kv_heads: int) -> Float[Array, "B G R rows D"]:
    batch, length, heads, dim = x.shape
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    if plan.stacked > 1:
        x = jnp.moveaxis(x, 2, 1).reshape(batch, kv_heads, 1, -1, dim)
    else:
        x = jnp.moveaxis(x, 1, 3)
    return _pad(x, 3, plan.rows)


def _from_rows(plan, x: Float[Array, "B G R rows D"]) -> Float[Array, "B T H D"]:
    batch, kv_heads, _, _, dim = x.shape
    x = x[:, :, :, : plan.length * plan.stacked]
    if plan.stacked > 1:
        x = jnp.moveaxis(x.reshape(batch, kv_heads, plan.length, plan.stacked, dim), 1, 2)
    else:
        x = jnp.moveaxis(x, 3, 1)
    return x.reshape(batch, plan.length, -1, dim)


def _to_keys(plan, x: Float[Array, "B S G D"]) -> Float[Array, "B G keys D"]:
    return _pad(jnp.moveaxis(x, 2, 1), 2, plan.keys)


def _from_keys(plan, x: Float[Array, "B G keys D"]) -> Float[Array, "B S G D"]:
    return jnp.moveaxis(x[:, :, : plan.kv_length], 1, 2)


def _pad(x, axis: int, size: int, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _segments(plan, batch: int, segment_ids, kv_segment_ids) -> splash.SegmentIds | None:
    """Ids of rows and keys, in which padding has an id of its own on either side."""
    if segment_ids is None and kv_segment_ids is None:
        return None
    if segment_ids is None:
        segment_ids = jnp.ones((batch, plan.length), jnp.int32)
    if kv_segment_ids is None:
        kv_segment_ids = jnp.ones((batch, plan.kv_length), jnp.int32)
    rows = jnp.where(segment_ids == 0, QUERY_PADDING, segment_ids).astype(jnp.int32)
    rows = jnp.repeat(rows, plan.stacked, axis=1)
    keys = jnp.where(kv_segment_ids == 0, KEY_PADDING, kv_segment_ids).astype(jnp.int32)
    return splash.SegmentIds(
        _pad(rows, 1, plan.rows, QUERY_PADDING), _pad(keys, 1, plan.keys, KEY_PADDING)
    )


# ---------------------------------------------------------------- masks


def _mask_function(plan) -> Callable[..., jax.Array] | None:
    """What the kernels ask of (index of a query, index of a key), or None if all is seen."""
    bounded = plan.keys > plan.kv_length
    if not plan.causal and not bounded:
        return None

    def visible(query, key):
        if not bounded:
            return query >= key
        exists = key < plan.kv_length
        return exists & (query >= key) if plan.causal else exists

    return visible


def _mask_info(plan, q_offset, *, over: str) -> masks.MaskInfo:
    """Which blocks to visit when the innermost loop is over 'keys' or over 'queries'.

    A block that is skipped names the one that is needed next, for it is fetched meanwhile.
    """
    nothing = masks.MaskInfo(None, None, None, None, None)
    if _mask_function(plan) is None:
        return nothing
    row = jnp.arange(plan.rows, dtype=jnp.int32)
    index = q_offset + row // plan.stacked
    info = nothing._replace(q_sequence=index)
    i = jnp.arange(plan.rows // plan.q_block, dtype=jnp.int32)[:, None]
    j = jnp.arange(plan.keys // plan.kv_block, dtype=jnp.int32)[None, :]
    if not plan.causal or i.size * _round_up(j.size, LANES) > MAX_TABLE:
        return info
    last = index[plan.q_block - 1 :: plan.q_block][:, None]
    seen = j * plan.kv_block <= last
    if over == "keys":
        fetch = jnp.where(seen, j, 0)
    else:
        fetch = jnp.where(seen, i, jnp.argmax(seen, axis=0, keepdims=True))
    return info._replace(
        data_next=fetch.astype(jnp.int16)[None], block_mask=seen.astype(jnp.int8)[None]
    )


# ---------------------------------------------------------------- differentiation


def _attend_primal(
    plan: Plan, q, k, v, segment_ids, kv_segment_ids, q_offset
) -> tuple[jax.Array, jax.Array]:
    kv_heads = k.shape[2]
    segments = _segments(plan, q.shape[0], segment_ids, kv_segment_ids)

    def one_key_head(q, k, v, segments):
        out, (lse,) = splash._splash_attention_forward(
            _mask_info(plan, q_offset, over="keys"),
            q,
            k,
            v,
            segments,
            None,
            mask_value=UNSEEN,
            is_mqa=True,
            block_sizes=splash.BlockSizes(block_q=plan.q_block, block_kv=plan.kv_block),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=_mask_function(plan),
            interpret=_interpreter(plan),
        )
        return out, lse

    rows = _to_rows(plan, _scaled(plan, q), kv_heads)
    with _precision(q.dtype):
        out, lse = _over_batch_and_key_heads(
            plan, one_key_head, rows, _to_keys(plan, k), _to_keys(plan, v), segments=segments
        )
    # Without a visible key the sum is over masked scores, or over none.
    out, lse = _from_rows(plan, out), _from_rows(plan, lse[..., None])
    seen = lse > UNSEEN / 2
    return jnp.where(seen, out, 0), jnp.where(seen, lse, -jnp.inf)[..., 0]


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _attend_forward(plan, q, k, v, segment_ids, kv_segment_ids, q_offset):
    out, lse = residuals(*_attend(plan, q, k, v, segment_ids, kv_segment_ids, q_offset))
    return (out, lse), (q, k, v, segment_ids, kv_segment_ids, q_offset, out, lse)


def _attend_backward(plan, saved, gradients):
    grad_q, grad_k, grad_v = _backward(plan, *saved, *gradients)
    return grad_q, grad_k, grad_v, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _backward(
    plan, q, k, v, segment_ids, kv_segment_ids, q_offset, out, lse, grad_out, grad_lse
) -> tuple[jax.Array, jax.Array, jax.Array]:
    kv_heads = k.shape[2]
    segments = _segments(plan, q.shape[0], segment_ids, kv_segment_ids)
    # d score = p (dp - delta), with delta = sum_v out dout, less the gradient of the lse itself.
    delta = jnp.sum(out.astype(jnp.float32) * grad_out.astype(jnp.float32), axis=-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    # All scores of a query that sees nothing are UNSEEN: its weights exp(UNSEEN - lse) are 0.
    seen = jnp.isfinite(lse)
    delta, lse = jnp.where(seen, delta, 0), jnp.where(seen, lse, 0)
    common: dict[str, Any] = dict(
        is_mqa=True,
        bq=plan.q_block,
        bkv=plan.kv_block,
        mask_value=UNSEEN,
        attn_logits_soft_cap=None,
        q_layout=splash.QKVLayout.HEAD_DIM_MINOR,
        k_layout=splash.QKVLayout.HEAD_DIM_MINOR,
        v_layout=splash.QKVLayout.HEAD_DIM_MINOR,
        mask_function=_mask_function(plan),
        interpret=_interpreter(plan),
    )

    def one_key_head(q, k, v, lse, grad_out, delta, segments):
        arrays = (q, k, v, segments, None, lse, grad_out, delta)
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arrays,
            mask_info=_mask_info(plan, q_offset, over="queries"),
            bkv_compute=plan.kv_block,
            use_fused_bwd_kernel=False,
            **common,
        )
        dq = splash._splash_attention_bwd_dq(
            *arrays, mask_info=_mask_info(plan, q_offset, over="keys"), **common
        )
        return dq, dk, dv

    rows = (_to_rows(plan, x, kv_heads) for x in (lse[..., None], grad_out, delta[..., None]))
    lse, grad_out, delta = rows
    # Rows past the last query: their scores are 0, so any weight is finite; grad_out is 0.
    with _precision(q.dtype):
        dq, dk, dv = _over_batch_and_key_heads(
            plan,
            one_key_head,
            _to_rows(plan, _scaled(plan, q), kv_heads),
            _to_keys(plan, k),
            _to_keys(plan, v),
            lse[..., 0],
            grad_out,
            delta[..., 0],
            segments=segments,
        )
    dq = _scaled(plan, _from_rows(plan, dq))
    return dq, _from_keys(plan, dk), _from_keys(plan, dv)


def _over_batch_and_key_heads(plan, function, *arrays, segments):
    """Map `function(*arrays, segments)` over arrays [B, G, ...] and segments [B, ...]."""
    if plan.interpret:
        # The TPU interpreter does not know the grid axes that vmap adds.
        def one_row(inputs):
            arrays, segments = inputs
            return jax.lax.map(lambda arrays: function(*arrays, segments), arrays)

        return jax.lax.map(one_row, (arrays, segments))
    inner = jax.vmap(function, in_axes=(*(0,) * len(arrays), None))
    return jax.vmap(inner)(*arrays, segments)


def _scaled(plan, x):
    return (x.astype(jnp.float32) * plan.scale).astype(x.dtype)


def _precision(dtype):
    """True fp32 products of fp32 operands; the kernels name no precision of their own."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def _interpreter(plan: Plan) -> Any:
    return pltpu.InterpretParams() if plan.interpret else False
