"""Softmax attention on NVIDIA GPUs: cuDNN's fused kernels, through jax's own bindings.

The primitives are bound directly, and not through `jax.nn.dot_product_attention`, for three things
it does not offer: the log-sum-exp in fp32, the backward pass with a log-sum-exp and an output that
were merged over several blocks of keys (ring attention), and packed samples whose borders are
traced. Those go to cuDNN some at a time, since what it keeps on the side grows with their number;
ids in an order that is not that of packing take the XLA form, chosen on the device. Queries and
keys with ids of their own, without the causal mask, are taken for two pieces of a packed row, the
keys before the queries: all they can have in common is one sample, that which the piece of keys
ends with and that of queries begins with.
"""

import math
from collections.abc import Callable
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
from pallas_kernels.softmax_attention.reference import filled, residuals

MAX_HEAD_DIM = 128  # more on some chips and versions; nobody here needs it
MIN_CAPABILITY = (8, 0)
MIN_CAPABILITY_PACKED = (9, 0)
# Stands for the log-sum-exp of a query that saw nothing: exp(score - this) is 0, and no NaN.
NOTHING_SEEN = 1e30
# Tokens of a row up to which causal attention is one call. Of longer rows L2 does not hold the keys
# and values: with 16 query and 4 key heads 128K tokens took 125.7 ms on an H200, and take 116.2 by
# halves. The backward pass is not faster by halves.
WHOLE = 1 << 16
MAX_SAMPLES = 64  # of a row in one call; each costs launches of tiles that find nothing to do
MIN_SAMPLES = 2  # jax's bindings take one sample a row for a whole row and ignore where it begins
STATISTICS_BYTES = 1 << 30  # of one forward call for packed rows
WORKSPACE_BYTES = 4 << 30  # of one backward call for packed rows


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
    packed = _packed(segment_ids, kv_segment_ids)
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
        return _attend_packed(_Mask(causal, True, scale), q, k, v, *ids)
    lengths = _row_lengths(q, k, segment_ids, kv_segment_ids)
    return _attend(_Mask(causal, lengths[0] is not None, scale), q, k, v, *lengths)


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


def _attend_primal(mask: _Mask, q, k, v, q_length, kv_length) -> tuple[jax.Array, jax.Array]:
    if _by_halves(mask, q, k):
        return _attend_halves(mask, q, k, v)
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


def _by_halves(mask: _Mask, q, k) -> bool:
    """Whether a call is cut: each half with its own keys, and the second with the first's."""
    length = q.shape[1]
    whole = length <= WHOLE or length % 2 or k.shape[1] != length
    return mask.causal and not mask.padded and not whole


def _halves_as_rows(x: Float[Array, "B T ..."]) -> Float[Array, "2B T/2 ..."]:
    return x.reshape(2 * x.shape[0], x.shape[1] // 2, *x.shape[2:])


def _half(x: Float[Array, "B T ..."], which: int) -> Float[Array, "B T/2 ..."]:
    return jnp.split(x, 2, axis=1)[which]


def _attend_halves(mask: _Mask, q, k, v) -> tuple[jax.Array, jax.Array]:
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


def _attend_rows(mask: _Mask, q, k, v) -> tuple[jax.Array, jax.Array]:
    return _attend_primal(mask, q, k, v, None, None)


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
    del q_offset  # 0, says `block_unsupported`
    if _packed(segment_ids, kv_segment_ids):
        ids = _packed_ids(q, k, segment_ids, kv_segment_ids)
        return _backward_packed(_Mask(causal, True, scale), q, k, v, *ids, out, lse, grad_out)
    lengths = _row_lengths(q, k, segment_ids, kv_segment_ids)
    mask = _Mask(causal, lengths[0] is not None, scale)
    grad_q, grad_k, grad_v = _backward(mask, q, k, v, out, lse, grad_out, *lengths)
    return grad_q, grad_k, grad_v


def block_unsupported(
    q, k, v, out, lse, grad_out, segment_ids, kv_segment_ids, q_offset, **static
) -> str | None:
    """Why `attention_block_backward` cannot take these arguments here, or None."""
    del out, lse, grad_out
    return unsupported(q, k, v, segment_ids, kv_segment_ids, q_offset, **static)


# ---------------------------------------------------------------- packed rows


class _Samples(NamedTuple):
    """The samples of packed rows.

    Attributes:
      number: which sample of its row a token is of, from 1; 0 is padding.
      position: place of each token in its sample.
      numbers: samples of each row.
      in_order: whether the ids are those of packing: rising along the row, a sample unbroken.
    """

    number: Int[Array, "B T"]
    position: Int[Array, "B T"]
    numbers: Int[Array, "B"]
    in_order: Bool[Array, ""]


class _Side(NamedTuple):
    """Some consecutive samples of every row, of queries or of keys, in the form that cuDNN takes.

    Attributes:
      lengths, begins: tokens and first token of each sample, -1 where a row has no more of them.
      mine: the tokens of these samples.
    """

    lengths: Int[Array, "B M"]
    begins: Int[Array, "B M+1"]
    mine: Bool[Array, "B T"]


class _Group(NamedTuple):
    """Samples of one call.

    Attributes:
      statistic: the sample, counted over the rows of this group, of each query.
      position: place of each query in its sample.
    """

    queries: _Side
    keys: _Side
    statistic: Int[Array, "B T"]
    position: Int[Array, "B T"]


def _samples(ids: Int[Array, "B T"]) -> _Samples:
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
    begins = (ids != 0) & (ids != before)
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    highest = jnp.pad(jax.lax.cummax(ids, axis=1)[:, :-1], ((0, 0), (1, 0)))
    return _Samples(
        number=jnp.where(ids != 0, number, 0),
        position=index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1),
        numbers=number[:, -1],
        in_order=jnp.all(jnp.where(begins, ids > highest, True)) & jnp.all(ids >= 0),
    )


def _group(samples: _Samples, start: Int[Array, ""], limit: int) -> _Group:
    """The samples start + 1 .. start + limit of each row, of queries that are the keys as well."""
    index = jnp.arange(samples.number.shape[1], dtype=jnp.int32)
    which = start + jnp.arange(1, limit + 1, dtype=jnp.int32)
    # Compared, not scattered: on a GPU that is one fused reduction.
    member = samples.number[:, None] == which[:, None]
    lengths = jnp.sum(member, axis=2, dtype=jnp.int32)
    first = jnp.where(member & (samples.position == 0)[:, None], index, -1)
    here = jnp.clip(samples.numbers - start, 0, limit)
    local = samples.number - 1 - start
    mine = (local >= 0) & (local < limit)
    statistic = (jnp.cumsum(here) - here)[:, None] + local
    side = _side(lengths, jnp.max(first, axis=2), mine)
    return _Group(side, side, jnp.where(mine, statistic, 0), samples.position)


def _side(lengths, begins, mine) -> _Side:
    begins = jnp.pad(begins, ((0, 0), (0, 1)), constant_values=-1)
    return _Side(jnp.where(lengths > 0, lengths, -1), begins, mine)


class _Groups(NamedTuple):
    """How packed rows go to cuDNN: whether they can, in how many calls, and the i-th call."""

    in_order: Bool[Array, ""]
    number: Int[Array, ""]
    group: Callable[[Int[Array, ""]], _Group]


def _groups(ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"] | None, limit: int) -> _Groups:
    if kv_ids is not None:
        return _common(ids, kv_ids)
    samples = _samples(ids)
    number = -(-jnp.max(samples.numbers) // limit)
    return _Groups(samples.in_order, number, lambda i: _group(samples, i * limit, limit))


def _common(ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"]) -> _Groups:
    """The sample at the end of the keys and the beginning of the queries, if that is the same."""
    last = jnp.max(kv_ids, axis=1, keepdims=True)
    queries, keys = (ids == last) & (last != 0), (kv_ids == last) & (last != 0)
    common = jnp.any(queries, axis=1, keepdims=True)
    keys &= common

    def side(mine):
        length, begin = jnp.sum(mine, axis=1), jnp.where(common[:, 0], jnp.argmax(mine, axis=1), -1)
        absent = ((0, 0), (0, MIN_SAMPLES - 1))
        lengths = jnp.pad(length.astype(jnp.int32)[:, None], absent)
        begins = jnp.pad(begin.astype(jnp.int32)[:, None], absent, constant_values=-1)
        return _side(lengths, begins, mine)

    sides = side(queries), side(keys)
    before = jnp.cumsum(common, axis=0, dtype=jnp.int32) - common
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    position = jnp.where(queries, index - sides[0].begins[:, :1], 0)
    group = _Group(*sides, jnp.where(queries, before, 0), position)
    in_order = _samples(ids).in_order & _samples(kv_ids).in_order
    in_order &= jnp.all((ids == 0) | (ids >= last))
    return _Groups(in_order, jnp.any(common).astype(jnp.int32), lambda _: group)


def _plan(
    shape: tuple[int, ...], kv_heads: int, bytes_per_element: float, budget: int, most: int
) -> tuple[int, int]:
    """How to cut a packed batch of this [B, T, H, K]: pieces of heads, samples of a row at a time.

    What cuDNN keeps on the side it keeps for every sample as if that filled the row. Its 32-bit
    offsets must reach every element of a piece. `most` is the number of samples worth having.
    """
    elements, wanted = math.prod(shape), min(max(shape[1] // 1024, 8), most)

    def samples(pieces: int) -> int:
        return int(budget / (bytes_per_element * elements / pieces))

    pieces = next(
        n
        for n in range(1, kv_heads + 1)
        if kv_heads % n == 0
        and (n == kv_heads or (elements // n < 1 << 31 and samples(n) >= wanted))
    )
    return pieces, min(max(samples(pieces), MIN_SAMPLES), most)


def _forward_plan(q, k, most=MAX_SAMPLES):
    # An fp32 statistic a row of queries.
    return _plan(q.shape, k.shape[2], 4 / q.shape[3], STATISTICS_BYTES, most)


def _backward_plan(q, k, most=MAX_SAMPLES):
    # fp32 accumulators of three gradients, of which those of k and v have as many heads as q.
    return _plan(q.shape, k.shape[2], 12, WORKSPACE_BYTES, most)


def _most(kv_ids) -> int:
    return MAX_SAMPLES if kv_ids is None else MIN_SAMPLES


def _by_heads(pieces: int, *arrays):
    return zip(*(jnp.split(x, pieces, axis=2) for x in arrays), strict=True)


def _join(parts):
    return tuple(jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))


def _attend_packed_primal(mask: _Mask, q, k, v, ids, kv_ids) -> tuple[jax.Array, jax.Array]:
    pieces, limit = _forward_plan(q, k, _most(kv_ids))
    groups = _groups(ids, kv_ids, limit)

    def fused_heads(q, k, v):
        def step(i, carry):
            group = groups.group(i)
            out, statistics = cudnn._dot_product_attention_fwd_p_wrapper.bind(
                *_packed_operands(q, k, v, group), **_parameters(mask), is_training=True
            )
            lse = statistics[group.statistic, :, group.position]
            mine = group.queries.mine[..., None]
            return jnp.where(mine[..., None], out, carry[0]), jnp.where(mine, lse, carry[1])

        nothing = jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        return jax.lax.fori_loop(0, groups.number, step, nothing)

    def fused(q, k, v):
        return _join([fused_heads(*piece) for piece in _by_heads(pieces, q, k, v)])

    def plain(q, k, v):
        return xla.softmax_attention(
            q, k, v, ids, ids if kv_ids is None else kv_ids, 0, causal=mask.causal, scale=mask.scale
        )

    return jax.lax.cond(groups.in_order, fused, plain, q, k, v)


_attend_packed = jax.custom_vjp(_attend_packed_primal, nondiff_argnums=(0,))


def _packed_operands(q, k, v, group: _Group):
    queries, keys = group.queries, group.keys
    return _operands(q, k, v, queries.lengths, keys.lengths, queries.begins, keys.begins)


def _attend_packed_forward(mask, *arrays):
    arrays = [x if x is None else x.value for x in arrays]
    out, lse = residuals(*_attend_packed(mask, *arrays))
    return (out, lse), (*arrays, out, lse)


def _attend_packed_backward(mask, saved, grads):
    q, k, v, ids, kv_ids, out, lse = saved
    grad_out, grad_lse = (None if isinstance(g, SymbolicZero) else g for g in grads)
    grad_out = jnp.zeros_like(out) if grad_out is None else grad_out
    gradients = _backward_packed(mask, q, k, v, ids, kv_ids, out, lse, grad_out, grad_lse)
    return *gradients, None, None


_attend_packed.defvjp(_attend_packed_forward, _attend_packed_backward, symbolic_zeros=True)


def _backward_packed(mask: _Mask, q, k, v, ids, kv_ids, out, lse, grad_out, grad_lse=None):
    def plain(q, k, v, out, lse, grad_out):
        return xla.attention_block_backward(
            q, k, v, out, lse, grad_out, ids, ids if kv_ids is None else kv_ids, 0,
            grad_lse=grad_lse, causal=mask.causal, scale=mask.scale,
        )  # fmt: skip

    arrays = (q, k, v, out, lse, grad_out)
    if grad_lse is not None:
        return plain(*arrays)
    pieces, limit = _backward_plan(q, k, _most(kv_ids))
    groups = _groups(ids, kv_ids, limit)

    def fused_heads(q, k, v, out, lse, grad_out):
        shape = (q.shape[0] * limit, q.shape[2], q.shape[1])

        def step(i, carry):
            group = groups.group(i)
            queries, keys = (side.mine[..., None, None] for side in (group.queries, group.keys))
            # The tokens of other samples write to a place that does not exist.
            sample = jnp.where(group.queries.mine, group.statistic, shape[0])
            statistics = jnp.full(shape, NOTHING_SEEN, jnp.float32)
            statistics = statistics.at[sample, :, group.position].set(lse, mode="drop")
            gradients = cudnn._dot_product_attention_bwd_p_wrapper.bind(
                *_packed_operands(q, k, v, group), statistics, out, grad_out, **_parameters(mask)
            )
            parts = zip((queries, keys, keys), gradients, carry, strict=True)
            return tuple(jnp.where(mine, x, y) for mine, x, y in parts)

        nothing = tuple(jnp.zeros_like(x) for x in (q, k, v))
        return jax.lax.fori_loop(0, groups.number, step, nothing)

    def fused(*arrays):
        return _join([fused_heads(*piece) for piece in _by_heads(pieces, *arrays)])

    return jax.lax.cond(groups.in_order, fused, plain, *arrays)
