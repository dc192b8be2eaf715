"""Packed rows by cuDNN: samples whose borders only the device knows.

They go to cuDNN some at a time, since what it keeps on the side grows with their number; ids in an
order that is not that of packing take the XLA form, chosen on the device. Queries and keys with ids
of their own, without the causal mask, are taken for two pieces of a packed row, the keys before the
queries: all they can have in common is one sample, that which the piece of keys ends with and that
of queries begins with.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Int

from pallas_kernels.softmax_attention import cudnn_calls as calls
from pallas_kernels.softmax_attention import xla
from pallas_kernels.softmax_attention.reference import residuals

MAX_SAMPLES = 64  # of a row in one call; each costs launches of tiles that find nothing to do
MIN_SAMPLES = 2  # jax's bindings take one sample a row for a whole row and ignore where it begins
STATISTICS_BYTES = 1 << 30  # of one forward call
WORKSPACE_BYTES = 4 << 30  # of one backward call


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


def _attend(mask: calls.Mask, q, k, v, ids, kv_ids) -> tuple[jax.Array, jax.Array]:
    pieces, limit = _forward_plan(q, k, _most(kv_ids))
    groups = _groups(ids, kv_ids, limit)

    def fused_heads(q, k, v):
        def step(i, carry):
            group = groups.group(i)
            out, statistics = calls.forward(mask, q, k, v, _place(group))
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


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))


def _place(group: _Group) -> calls.Place:
    queries, keys = group.queries, group.keys
    return calls.Place(queries.lengths, keys.lengths, queries.begins, keys.begins)


def _attend_forward(mask, *arrays):
    arrays = [x if x is None else x.value for x in arrays]
    out, lse = residuals(*attend(mask, *arrays))
    return (out, lse), (*arrays, out, lse)


def _attend_backward(mask, saved, grads):
    q, k, v, ids, kv_ids, out, lse = saved
    grad_out, grad_lse = (None if isinstance(g, SymbolicZero) else g for g in grads)
    grad_out = jnp.zeros_like(out) if grad_out is None else grad_out
    gradients = backward(mask, q, k, v, ids, kv_ids, out, lse, grad_out, grad_lse)
    return *gradients, None, None


attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def backward(mask: calls.Mask, q, k, v, ids, kv_ids, out, lse, grad_out, grad_lse=None):
    """Gradients of q, k and v; with a gradient of the log-sum-exp the XLA form's."""

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
            statistics = jnp.full(shape, calls.NOTHING_SEEN, jnp.float32)
            statistics = statistics.at[sample, :, group.position].set(lse, mode="drop")
            gradients = calls.backward(mask, q, k, v, _place(group), statistics, out, grad_out)
            parts = zip((queries, keys, keys), gradients, carry, strict=True)
            return tuple(jnp.where(mine, x, y) for mine, x, y in parts)

        nothing = tuple(jnp.zeros_like(x) for x in (q, k, v))
        return jax.lax.fori_loop(0, groups.number, step, nothing)

    def fused(*arrays):
        return _join([fused_heads(*piece) for piece in _by_heads(pieces, *arrays)])

    return jax.lax.cond(groups.in_order, fused, plain, *arrays)
