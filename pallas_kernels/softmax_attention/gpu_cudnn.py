"""Softmax attention on NVIDIA GPUs: cuDNN's fused kernels.

One sample a row is here; packed rows, whose borders are traced, are in `gpu_cudnn_packed`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels import platform
from pallas_kernels.dispatch import concrete
from pallas_kernels.softmax_attention import cudnn_calls as calls
from pallas_kernels.softmax_attention import gpu_cudnn_packed as packed
from pallas_kernels.softmax_attention import xla
from pallas_kernels.softmax_attention.reference import filled, residuals

MAX_HEAD_DIM = 128  # more on some chips and versions; nobody here needs it
MIN_CAPABILITY = (8, 0)
MIN_CAPABILITY_PACKED = (9, 0)
# Tokens of a row up to which causal attention is one call. Of longer rows L2 does not hold the keys
# and values: with 16 query and 4 key heads 128K tokens took 125.7 ms on an H200, and take 116.2 by
# halves. The backward pass is not faster by halves.
WHOLE = 1 << 16


def unsupported(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_offset: int | Int[Array, ""],
    *,
    causal: bool,
    scale: float,
) -> str | None:
    """Why `softmax_attention` cannot take these arguments here, or None."""
    capability = platform.gpu_compute_capability()
    several = _packed(segment_ids, kv_segment_ids)
    needed = MIN_CAPABILITY_PACKED if several else MIN_CAPABILITY
    if capability is None or capability < needed:
        seen = platform.backend() if capability is None else f"compute capability {capability}"
        return f"{seen}: cuDNN's fused attention needs an NVIDIA GPU of {needed} or later here"
    return unsupported_arguments(
        q, k, v, segment_ids, kv_segment_ids, q_offset, causal=causal, scale=scale
    )


def unsupported_arguments(
    q, k, v, segment_ids, kv_segment_ids, q_offset, *, causal: bool, scale: float
) -> str | None:
    """The part of `unsupported` that does not depend on the machine."""
    del scale
    if q.dtype != jnp.bfloat16:
        return f"dtype {q.dtype}: it must be bfloat16"
    for size in (q.shape[3], v.shape[3]):
        if size > MAX_HEAD_DIM or size % 8:
            return f"head size {size}: it must be a multiple of 8 and at most {MAX_HEAD_DIM}"
    if v.shape[3] != q.shape[3]:
        return f"head sizes {q.shape[3]} and {v.shape[3]}: they must be equal"
    if causal:
        offset = q_offset if isinstance(q_offset, int) else concrete(q_offset)
        if offset is None or offset != 0:
            return "a q_offset that is traced or not 0: the causal mask begins at the first key"
    if causal and _packed(segment_ids, kv_segment_ids) and segment_ids is not kv_segment_ids:
        return "traced or packed segment_ids, with causal, that are not those of the keys as well"
    return None


def _packed(segment_ids, kv_segment_ids) -> bool:
    """Whether rows may hold more than one sample, and not from their first token on."""
    both = (segment_ids, kv_segment_ids)
    return any(ids is not None and _lengths(ids) is None for ids in both)


def _lengths(ids) -> np.ndarray | None:
    """Tokens of each row when the ids are known to be ones and then zeros."""
    values = concrete(ids)
    if values is None or values.min() < 0 or values.max() > 1:
        return None
    if np.any(np.diff(values, axis=1) > 0):
        return None
    return values.sum(axis=1).astype(np.int32)


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
    """`pallas_kernels.softmax_attention` by cuDNN; returns (out, log-sum-exp).

    Differentiable in both results; a gradient that reaches the log-sum-exp takes the XLA form's
    backward pass.
    """
    del q_offset  # 0, says `unsupported`
    if _packed(segment_ids, kv_segment_ids):
        ids = _packed_ids(q, k, segment_ids, kv_segment_ids)
        return packed.attend(calls.Mask(causal, True, scale), q, k, v, *ids)
    lengths = _row_lengths(q, k, segment_ids, kv_segment_ids)
    return _attend(calls.Mask(causal, lengths[0] is not None, scale), q, k, v, *lengths)


def _row_lengths(q, k, segment_ids, kv_segment_ids):
    """Tokens of each row of queries and of keys; None, None if the rows are full."""
    lengths = [None if ids is None else _lengths(ids) for ids in (segment_ids, kv_segment_ids)]
    sizes = (q.shape[1], k.shape[1])
    if all(a is None or np.all(a == size) for a, size in zip(lengths, sizes, strict=True)):
        return None, None
    return tuple(
        jnp.asarray(np.full(q.shape[0], size, np.int32) if a is None else a)
        for a, size in zip(lengths, sizes, strict=True)
    )


def _packed_ids(q, k, segment_ids, kv_segment_ids):
    """Ids of queries and of keys; None for the keys' if they are those of the queries."""
    if segment_ids is kv_segment_ids:
        return segment_ids, None
    return filled(q, k, segment_ids, kv_segment_ids, 0)[:2]


# ---------------------------------------------------------------- one sample a row


def _attend_primal(mask: calls.Mask, q, k, v, q_length, kv_length) -> tuple[jax.Array, jax.Array]:
    if _by_halves(mask, q, k):
        return _attend_halves(mask, q, k, v)
    out, lse = calls.forward(mask, q, k, v, calls.Place(q_length, kv_length))
    lse = jnp.moveaxis(lse, 1, 2)
    if mask.padded:
        seen = _seen(q, q_length, kv_length)
        out = jnp.where(seen[..., None], out, 0)
        lse = jnp.where(seen, lse, -jnp.inf)
    return out, lse


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _by_halves(mask: calls.Mask, q, k) -> bool:
    """Whether a call is cut: each half with its own keys, and the second with the first's."""
    length = q.shape[1]
    whole = length <= WHOLE or length % 2 or k.shape[1] != length
    return mask.causal and not mask.padded and not whole


def _halves_as_rows(x: Float[Array, "B T ..."]) -> Float[Array, "2B T/2 ..."]:
    return x.reshape(2 * x.shape[0], x.shape[1] // 2, *x.shape[2:])


def _half(x: Float[Array, "B T ..."], which: int) -> Float[Array, "B T/2 ..."]:
    return jnp.split(x, 2, axis=1)[which]


def _attend_halves(mask: calls.Mask, q, k, v) -> tuple[jax.Array, jax.Array]:
    rows = (_halves_as_rows(x) for x in (q, k, v))
    out, lse = (x.reshape(*q.shape[:2], *x.shape[2:]) for x in _attend_rows(mask, *rows))
    own = _half(out, 1), _half(lse, 1)
    before = _attend_rows(mask._replace(causal=False), _half(q, 1), _half(k, 0), _half(v, 0))
    total = jnp.logaddexp(own[1], before[1])
    weights = (jnp.exp(part[1] - total)[..., None] for part in (own, before))
    merged, more = (part[0] * weight for part, weight in zip((own, before), weights, strict=True))
    second = (merged + more).astype(out.dtype)  # in fp32 until here
    return (
        jnp.concatenate([_half(out, 0), second], axis=1),
        jnp.concatenate([_half(lse, 0), total], axis=1),
    )


def _attend_rows(mask: calls.Mask, q, k, v) -> tuple[jax.Array, jax.Array]:
    return _attend_primal(mask, q, k, v, None, None)


def _seen(q, q_length, kv_length):
    """Which queries are no padding and have a key, [B, T, 1]; causal queries all see key 0."""
    real = jnp.arange(q.shape[1]) < q_length[:, None]
    return (real & (kv_length > 0)[:, None])[..., None]


def _attend_forward(mask, q, k, v, q_length, kv_length):
    arrays = [x if x is None else x.value for x in (q, k, v, q_length, kv_length)]
    out, lse = residuals(*_attend(mask, *arrays))
    return (out, lse), (*arrays, out, lse)


def _attend_backward(mask, saved, grads):
    q, k, v, q_length, kv_length, out, lse = saved
    grad_out, grad_lse = (None if isinstance(g, SymbolicZero) else g for g in grads)
    grad_out = jnp.zeros_like(out) if grad_out is None else grad_out
    if grad_lse is None:
        return *_backward(mask, q, k, v, out, lse, grad_out, q_length, kv_length), None, None
    q_ids, kv_ids = (
        None if length is None else (jnp.arange(x.shape[1]) < length[:, None]).astype(jnp.int32)
        for x, length in ((q, q_length), (k, kv_length))
    )
    gradients = xla.attention_block_backward(
        q, k, v, out, lse, grad_out, q_ids, kv_ids, 0, grad_lse=grad_lse,
        causal=mask.causal, scale=mask.scale,
    )  # fmt: skip
    return *gradients, None, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _backward(mask: calls.Mask, q, k, v, out, lse, grad_out, q_length, kv_length):
    if mask.padded:
        grad_out = jnp.where(_seen(q, q_length, kv_length)[..., None], grad_out, 0)
    place = calls.Place(q_length, kv_length)
    return calls.backward(mask, q, k, v, place, _statistics(jnp.moveaxis(lse, 2, 1)), out, grad_out)


def _statistics(lse):
    return jnp.where(jnp.isfinite(lse), lse, calls.NOTHING_SEEN).astype(jnp.float32)


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
    """`pallas_kernels.attention_block_backward` by cuDNN."""
    del q_offset  # 0, says `block_unsupported`
    if _packed(segment_ids, kv_segment_ids):
        ids = _packed_ids(q, k, segment_ids, kv_segment_ids)
        return packed.backward(calls.Mask(causal, True, scale), q, k, v, *ids, out, lse, grad_out)
    lengths = _row_lengths(q, k, segment_ids, kv_segment_ids)
    mask = calls.Mask(causal, lengths[0] is not None, scale)
    grad_q, grad_k, grad_v = _backward(mask, q, k, v, out, lse, grad_out, *lengths)
    return grad_q, grad_k, grad_v


def block_unsupported(
    q, k, v, out, lse, grad_out, segment_ids, kv_segment_ids, q_offset, **static
) -> str | None:
    """Why `attention_block_backward` cannot take these arguments here, or None."""
    del out, lse, grad_out
    return unsupported(q, k, v, segment_ids, kv_segment_ids, q_offset, **static)
