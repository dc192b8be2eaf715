"""Softmax attention on NVIDIA GPUs: cuDNN's fused kernels, through jax's own bindings.

The primitives are bound directly, and not through `jax.nn.dot_product_attention`, for three things
it does not offer: the log-sum-exp in fp32, the backward pass with a log-sum-exp and an output that
were merged over several blocks of keys (ring attention), and packed samples whose borders are
traced. cuDNN wants a bound on the samples of a row (`_max_segments`); a batch that has more, or ids
in an order that is not that of packing, takes the XLA form, chosen on the device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import platform
from pallas_kernels.dispatch import concrete
from pallas_kernels.softmax_attention import xla

MAX_HEAD_DIM = 128  # more on some chips and versions; nobody here needs it
MIN_CAPABILITY = (8, 0)
MIN_CAPABILITY_PACKED = (9, 0)
# Stands for the log-sum-exp of a query that saw nothing: exp(score - this) is 0, and no NaN.
NOTHING_SEEN = 1e30
MAX_SEGMENTS = 64  # of a row; each costs launches of tiles that find nothing to do
STATISTICS_BYTES = 2 << 30  # fp32 statistics of packed rows are padded to [segments, H, T]


class _Mask(NamedTuple):
    """The static part of a call."""

    causal: bool
    padded: bool
    scale: float

    @property
    def type(self) -> cudnn.MaskType:
        if self.padded:
            return cudnn.MaskType.PADDING_CAUSAL if self.causal else cudnn.MaskType.PADDING
        return cudnn.MaskType.CAUSAL if self.causal else cudnn.MaskType.NO_MASK


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
    packed = segment_ids is not None and _lengths(segment_ids) is None
    needed = MIN_CAPABILITY_PACKED if packed else MIN_CAPABILITY
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
    known = [ids is None or _lengths(ids) is not None for ids in (segment_ids, kv_segment_ids)]
    if all(known):
        return None
    if segment_ids is not kv_segment_ids:
        return "traced or packed segment_ids that are not those of the keys as well"
    if _max_segments(q.shape) < 2:
        return f"packed rows of {q.shape[1]} tokens and {q.shape[2]} heads: they are too long"
    return None


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
    lengths = [None if ids is None else _lengths(ids) for ids in (segment_ids, kv_segment_ids)]
    if segment_ids is not None and lengths[0] is None:
        return _attend_packed(_Mask(causal, True, scale), q, k, v, segment_ids)
    sizes = (q.shape[1], k.shape[1])
    if all(a is None or np.all(a == size) for a, size in zip(lengths, sizes, strict=True)):
        return _attend(_Mask(causal, False, scale), q, k, v, None, None)
    rows = q.shape[0]
    q_length, kv_length = (
        jnp.asarray(np.full(rows, size, np.int32) if a is None else a)
        for a, size in zip(lengths, sizes, strict=True)
    )
    return _attend(_Mask(causal, True, scale), q, k, v, q_length, kv_length)


# ---------------------------------------------------------------- one sample a row


def _attend_primal(mask: _Mask, q, k, v, q_length, kv_length) -> tuple[jax.Array, jax.Array]:
    out, lse = cudnn._dot_product_attention_fwd_p_wrapper.bind(
        *_operands(q, k, v, q_length, kv_length), **_parameters(mask), is_training=True
    )
    lse = jnp.moveaxis(lse, 1, 2)
    if mask.padded:
        seen = _seen(q, q_length, kv_length)
        out = jnp.where(seen[..., None], out, 0)
        lse = jnp.where(seen, lse, -jnp.inf)
    return out, lse


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _seen(q, q_length, kv_length):
    """Which queries are no padding and have a key, [B, T, 1]; causal queries all see key 0."""
    real = jnp.arange(q.shape[1]) < q_length[:, None]
    return (real & (kv_length > 0)[:, None])[..., None]


def _operands(q, k, v, q_length, kv_length, q_begins=None, kv_begins=None):
    """Operands of both primitives up to their own: no bias, no pages."""
    none = jnp.zeros(0, q.dtype)
    lengths = (none, none) if q_length is None else (q_length, kv_length)
    begins = (none, none) if q_begins is None else (q_begins, kv_begins)
    return q, k, v, none, *lengths, *begins, none, none


def _parameters(mask: _Mask):
    return dict(
        scale=mask.scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask.type,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )


def _attend_forward(mask, q, k, v, q_length, kv_length):
    arrays = [x if x is None else x.value for x in (q, k, v, q_length, kv_length)]
    out, lse = _attend(mask, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_backward(mask, residuals, grads):
    q, k, v, q_length, kv_length, out, lse = residuals
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


def _backward(mask: _Mask, q, k, v, out, lse, grad_out, q_length, kv_length):
    if mask.padded:
        grad_out = jnp.where(_seen(q, q_length, kv_length)[..., None], grad_out, 0)
    return cudnn._dot_product_attention_bwd_p_wrapper.bind(
        *_operands(q, k, v, q_length, kv_length),
        _statistics(jnp.moveaxis(lse, 2, 1)),
        out,
        grad_out,
        **_parameters(mask),
    )


def _statistics(lse):
    return jnp.where(jnp.isfinite(lse), lse, NOTHING_SEEN).astype(jnp.float32)


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
    del segment_ids, kv_segment_ids, q_offset  # None, None and 0, says `block_unsupported`
    return tuple(_backward(_Mask(causal, False, scale), q, k, v, out, lse, grad_out, None, None))


def block_unsupported(
    q, k, v, out, lse, grad_out, segment_ids, kv_segment_ids, q_offset, **static
) -> str | None:
    """Why `attention_block_backward` cannot take these arguments here, or None."""
    del out, lse, grad_out
    if segment_ids is not None or kv_segment_ids is not None:
        return "segment ids: they must be None"
    return unsupported(q, k, v, None, None, q_offset, **static)


# ---------------------------------------------------------------- packed rows


class _Segments(NamedTuple):
    """Where the samples of a batch lie, in the form cuDNN takes, and which sample a token is of.

    Attributes:
      lengths, begins: tokens and first token of each sample of a row, -1 past the last one.
      statistic: the sample, counted over the whole batch, that each token belongs to.
      position: place of each token in its sample.
      fits: whether the ids are those of packing and no row has more samples than there is room for.
    """

    lengths: Int[Array, "B M"]
    begins: Int[Array, "B M+1"]
    statistic: Int[Array, "B T"]
    position: Int[Array, "B T"]
    fits: Bool[Array, ""]


def _max_segments(shape: tuple[int, ...]) -> int:
    """Samples that a packed row of this [B, T, H, K] may have."""
    batch, length, heads, _ = shape
    room = STATISTICS_BYTES // (4 * batch * length * heads)
    return min(max(length // 128, 8), MAX_SEGMENTS, room)


def _segments(ids: Int[Array, "B T"], limit: int) -> _Segments:
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
    begins = (ids != 0) & (ids != before)
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32)  # of the sample a token is in, from 1
    highest = jnp.pad(jax.lax.cummax(ids, axis=1)[:, :-1], ((0, 0), (1, 0)))
    in_order = jnp.all(jnp.where(begins, ids > highest, True)) & jnp.all(ids >= 0)
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    count = number[:, -1:]
    # Compared, not scattered: on a GPU that is one fused reduction.
    samples = jnp.arange(1, limit + 1, dtype=jnp.int32)[:, None]
    mine = (number[:, None] == samples) & (ids != 0)[:, None]
    lengths = jnp.sum(mine, axis=2, dtype=jnp.int32)
    first = jnp.max(jnp.where(mine & begins[:, None], index, -1), axis=2)
    first_of_token = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    rows_before = jnp.cumsum(count, axis=0) - count
    return _Segments(
        lengths=jnp.where(lengths > 0, lengths, -1),
        begins=jnp.pad(first, ((0, 0), (0, 1)), constant_values=-1),
        statistic=jnp.maximum(rows_before + number - 1, 0),
        position=index - first_of_token,
        fits=in_order & jnp.all(count <= limit),
    )


def _pieces(shape: tuple[int, ...], kv_heads: int) -> int:
    """Into how many groups of heads to cut, so that cuDNN's 32-bit offsets reach every element."""
    elements = math.prod(shape)
    return next(
        (n for n in range(1, kv_heads) if kv_heads % n == 0 and elements // n < 1 << 31), kv_heads
    )


def _by_heads(x, pieces: int):
    return jnp.split(x, pieces, axis=2)


def _attend_packed_primal(mask: _Mask, q, k, v, ids):
    segments = _segments(ids, _max_segments(q.shape))
    real = (ids != 0)[..., None]

    def fused(q, k, v):
        pieces = _pieces(q.shape, k.shape[2])
        parts = []
        for piece in zip(*(_by_heads(x, pieces) for x in (q, k, v)), strict=True):
            operands = _packed_operands(piece[0], piece[1], piece[2], segments)
            out, statistics = cudnn._dot_product_attention_fwd_p_wrapper.bind(
                *operands, **_parameters(mask), is_training=True
            )
            parts.append((out, statistics[segments.statistic, :, segments.position]))
        out, lse = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
        return jnp.where(real[..., None], out, 0), jnp.where(real, lse, -jnp.inf)

    def plain(q, k, v):
        return xla.softmax_attention(q, k, v, ids, ids, 0, causal=mask.causal, scale=mask.scale)

    return jax.lax.cond(segments.fits, fused, plain, q, k, v)


_attend_packed = jax.custom_vjp(_attend_packed_primal, nondiff_argnums=(0,))


def _packed_operands(q, k, v, segments: _Segments):
    lengths, begins = segments.lengths, segments.begins
    return _operands(q, k, v, lengths, lengths, begins, begins)


def _attend_packed_forward(mask, q, k, v, ids):
    arrays = [x.value for x in (q, k, v, ids)]
    out, lse = _attend_packed(mask, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_packed_backward(mask, residuals, grads):
    q, k, v, ids, out, lse = residuals
    grad_out, grad_lse = (None if isinstance(g, SymbolicZero) else g for g in grads)
    grad_out = jnp.zeros_like(out) if grad_out is None else grad_out
    limit = _max_segments(q.shape)
    segments = _segments(ids, limit)
    real = (ids != 0)[..., None, None]

    def fused(q, k, v, out, lse, grad_out):
        pieces = _pieces(q.shape, k.shape[2])
        parts = []
        arrays = (q, k, v, out, lse, grad_out)
        for q, k, v, out, lse, grad_out in zip(
            *(_by_heads(x, pieces) for x in arrays), strict=True
        ):
            shape = (q.shape[0] * limit, lse.shape[2], q.shape[1])
            # Padding writes to a place that does not exist.
            sample = jnp.where(real[..., 0, 0], segments.statistic, shape[0])
            statistics = jnp.full(shape, NOTHING_SEEN, jnp.float32)
            statistics = statistics.at[sample, :, segments.position].set(lse, mode="drop")
            parts.append(
                cudnn._dot_product_attention_bwd_p_wrapper.bind(
                    *_packed_operands(q, k, v, segments),
                    statistics,
                    out,
                    jnp.where(real, grad_out, 0),
                    **_parameters(mask),
                )
            )
        gradients = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
        return tuple(jnp.where(real, x, 0) for x in gradients)

    def plain(q, k, v, out, lse, grad_out):
        return xla.attention_block_backward(
            q, k, v, out, lse, grad_out, ids, ids, 0, grad_lse=grad_lse,
            causal=mask.causal, scale=mask.scale,
        )  # fmt: skip

    arrays = (q, k, v, out, lse, grad_out)
    if grad_lse is not None:
        return *plain(*arrays), None
    return *jax.lax.cond(segments.fits, fused, plain, *arrays), None


_attend_packed.defvjp(_attend_packed_forward, _attend_packed_backward, symbolic_zeros=True)
