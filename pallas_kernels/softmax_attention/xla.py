"""Softmax attention in blocks, in plain jax: never holds T x S, forward or backward.

Queries and keys are taken in blocks; the softmax is accumulated online in fp32 and the backward
pass recomputes each block's weights from the log-sum-exp (FlashAttention-2, arXiv 2307.08691).
A `custom_vjp` rather than autodiff of the loops: partial evaluation would hoist the causal masks
of all blocks out of the loop and keep them, which is T x S again.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import accumulation_dtype, einsum
from pallas_kernels.softmax_attention import reference

BLOCK = 512
DENSE_SCORES = 1 << 20  # scores a head for which one dense product is both small and faster


@dataclass(frozen=True)
class _Problem:
    """The static part."""

    causal: bool
    scale: float
    q_block: int
    kv_block: int


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
    """Blockwise form of `pallas_kernels.softmax_attention`; returns (out, log-sum-exp)."""
    length, kv_length = q.shape[1], k.shape[1]
    filled = reference.filled(q, k, segment_ids, kv_segment_ids, q_offset)
    if length == 1 or length * kv_length <= DENSE_SCORES:
        return reference.softmax_attention(q, k, v, *filled, causal=causal, scale=scale)
    problem = _Problem(causal, scale, min(BLOCK, length), min(BLOCK, kv_length))
    out, lse = _attend(problem, _by_kv_head(q, k), k, v, *filled)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


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
    grad_lse: Float[Array, "B T H"] | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G V"]]:
    """`pallas_kernels.attention_block_backward`; `grad_lse` is a gradient that reached the lse."""
    filled = reference.filled(q, k, segment_ids, kv_segment_ids, q_offset)
    problem = _Problem(causal, scale, min(BLOCK, q.shape[1]), min(BLOCK, k.shape[1]))
    grouped, out, grad_out = (_by_kv_head(x, k) for x in (q, out, grad_out))
    grad_lse = jnp.zeros_like(lse) if grad_lse is None else grad_lse
    lse, grad_lse = (_by_kv_head(x[..., None], k)[..., 0] for x in (lse, grad_lse))
    residuals = (grouped, k, v, *filled, out, lse)
    grad_q, grad_k, grad_v, *_ = _attend_backward(problem, residuals, (grad_out, grad_lse))
    return grad_q.reshape(q.shape), grad_k, grad_v


def _by_kv_head(x, k):
    """[B, T, H, ...] -> [B, T, G, H/G, ...]."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, *x.shape[3:])


def _attend_primal(
    problem: _Problem, q, k, v, segment_ids, kv_segment_ids, q_offset
) -> tuple[jax.Array, jax.Array]:
    """Q [B, T, G, R, K] -> out [B, T, G, R, V], lse [B, T, G, R]."""
    length = q.shape[1]
    dtype = accumulation_dtype(q.dtype)

    def q_block(_, inputs):
        queries, segments, first = inputs

        def kv_block(i, carry):
            top, total, acc = carry
            scores, _, values = _scores(
                problem, i, queries, segments, q_offset + first, k, v, kv_segment_ids
            )
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            # A query that has seen nothing yet has top = -inf; exp(-inf - 0) is the 0 it needs.
            safe = jnp.where(jnp.isfinite(new_top), new_top, 0)
            shrink = jnp.exp(top - safe)
            weights = jnp.exp(scores - safe[..., None])
            total = total * shrink + jnp.sum(weights, axis=-1)
            acc = acc * shrink[..., None] + einsum(
                "bgrts,bsgv->bgrtv", weights.astype(v.dtype), values
            )
            return new_top, total, acc

        batch, block, groups, repeats, _ = queries.shape
        shape = (batch, groups, repeats, block)
        top, total, acc = jax.lax.fori_loop(
            0,
            _num_kv_blocks(problem, k.shape[1], q_offset + first),
            kv_block,
            (
                jnp.full(shape, -jnp.inf, dtype),
                jnp.zeros(shape, dtype),
                jnp.zeros((*shape, v.shape[3]), dtype),
            ),
        )
        seen = total > 0
        out = acc / jnp.where(seen, total, 1)[..., None]
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
        return None, (jnp.moveaxis(out, 3, 1).astype(v.dtype), jnp.moveaxis(lse, 3, 1))

    blocks = (*_split(problem, q, segment_ids), _block_starts(problem, length))
    _, (out, lse) = jax.lax.scan(q_block, None, blocks)
    return _join(out, length), _join(lse, length)


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _attend_forward(problem, q, k, v, segment_ids, kv_segment_ids, q_offset):
    out, lse = _attend(problem, q, k, v, segment_ids, kv_segment_ids, q_offset)
    out, lse = reference.residuals(out, lse)
    return (out, lse), (q, k, v, segment_ids, kv_segment_ids, q_offset, out, lse)


def _attend_backward(problem, residuals, grads):
    q, k, v, segment_ids, kv_segment_ids, q_offset, out, lse = residuals
    grad_out, grad_lse = grads
    length = q.shape[1]
    dtype = accumulation_dtype(q.dtype)
    # d score = p (dp - delta), with delta = sum_v out dout, less the gradient of the lse itself.
    delta = jnp.sum(out.astype(dtype) * grad_out.astype(dtype), axis=-1) - grad_lse
    # Queries that saw nothing: their scores are all -inf, so p is 0; keep 0 x inf out of it.
    seen = jnp.isfinite(lse)
    lse, delta = jnp.where(seen, lse, 0), jnp.where(seen, delta, 0)

    def q_block(carry, inputs):
        queries, segments, gradient, log_total, correction, first = inputs

        def kv_block(i, carry):
            grad_q, grad_k, grad_v = carry
            scores, keys, values = _scores(
                problem, i, queries, segments, q_offset + first, k, v, kv_segment_ids
            )
            weights = jnp.exp(scores - jnp.moveaxis(log_total, 1, 3)[..., None])
            from_values = einsum("btgrv,bsgv->bgrts", gradient, values)
            grad_scores = weights * (from_values - jnp.moveaxis(correction, 1, 3)[..., None])
            grad_scores = (grad_scores * problem.scale).astype(q.dtype)
            grad_q += einsum("bgrts,bsgk->btgrk", grad_scores, keys)
            block_k = einsum("bgrts,btgrk->bsgk", grad_scores, queries)
            block_v = einsum("bgrts,btgrv->bsgv", weights.astype(v.dtype), gradient)
            at = _kv_start(problem, i, k.shape[1])
            return grad_q, _add_at(grad_k, block_k, at), _add_at(grad_v, block_v, at)

        grad_q, *carry = jax.lax.fori_loop(
            0,
            _num_kv_blocks(problem, k.shape[1], q_offset + first),
            kv_block,
            (jnp.zeros(queries.shape, dtype), *carry),
        )
        return tuple(carry), grad_q.astype(q.dtype)

    carry = (jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype))
    blocks = _split(problem, q, segment_ids, grad_out, lse, delta)
    (grad_k, grad_v), grad_q = jax.lax.scan(
        q_block, carry, (*blocks, _block_starts(problem, length))
    )
    return (
        _join(grad_q, length),
        grad_k.astype(k.dtype),
        grad_v.astype(v.dtype),
        None,
        None,
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(problem, i, queries, segments, q_first, k, v, kv_segment_ids):
    """Scores [B, G, R, block, block] of kv block i with -inf where unseen, and its keys, values."""
    start = _kv_start(problem, i, k.shape[1])
    keys, values, kv_segments = (
        jax.lax.dynamic_slice_in_dim(x, start, problem.kv_block, axis=1)
        for x in (k, v, kv_segment_ids)
    )
    kv_index = start + jnp.arange(problem.kv_block)
    # The last block is moved back to fit; its leading keys were counted by the block before.
    kv_segments = jnp.where(kv_index >= i * problem.kv_block, kv_segments, 0)
    mask = reference.visible(
        segments,
        kv_segments,
        q_first + jnp.arange(problem.q_block),
        kv_index,
        causal=problem.causal,
    )
    scores = einsum("btgrk,bsgk->bgrts", queries, keys)
    return jnp.where(mask, scores * problem.scale, -jnp.inf), keys, values


def _kv_start(problem, i, kv_length):
    return jnp.minimum(i * problem.kv_block, kv_length - problem.kv_block)


def _num_kv_blocks(problem, kv_length, q_first):
    """How many kv blocks the queries from index q_first on can reach."""
    blocks = -(-kv_length // problem.kv_block)
    if not problem.causal:
        return blocks
    reach = q_first + problem.q_block  # one past the last index seen
    return jnp.clip(-(-reach // problem.kv_block), 0, blocks)


def _block_starts(problem, length):
    return jnp.arange(-(-length // problem.q_block), dtype=jnp.int32) * problem.q_block


def _split(problem, *arrays):
    """[B, T, ...] -> [blocks, B, q_block, ...], zeros (so segment 0) in the last block's excess."""
    split = []
    for x in arrays:
        excess = -x.shape[1] % problem.q_block
        x = jnp.pad(x, ((0, 0), (0, excess), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], -1, problem.q_block, *x.shape[2:])
        split.append(jnp.moveaxis(x, 1, 0))
    return tuple(split)


def _join(x, length):
    """[blocks, B, q_block, ...] -> [B, length, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _add_at(total, block, start):
    before = jax.lax.dynamic_slice_in_dim(total, start, block.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, before + block, start, axis=1)
