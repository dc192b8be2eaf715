"""The host's part of sweeps on Hopper GPUs: what packing and padding mean to them, and the states.

A sweep knows chunks; which tokens of them are real, where samples begin, and the states that enter
the pieces of a row that is cut are made here, in plain jax.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import gpu_sweep
from pallas_kernels.lightning_attention.gpu_roles import CHUNK, Sweep
from pallas_kernels.lightning_attention.gpu_sweep import Bookkeeping
from pallas_kernels.lightning_attention.segments import segment_runs

CENTRE = CHUNK // 2
FADED = 88.0  # e^-88 is below the smallest normal number of fp32


@dataclass(frozen=True)
class Track:
    """The segments of rows, in the order a sweep of one direction processes them.

    Attributes:
      segments, every: how many, and after how many of them a state is used, again and again.
      runs: number of the packed sample each segment ends in, [b, segments].
      tokens: real tokens up to the end of each segment, [b, segments].
      last: real tokens in the last chunk of each segment, [b, segments].
      after: real tokens behind each chunk of a segment, as far as where its state is used; very
        many if another sample has begun by then.
      bookkeeping: for the kernel; None for plain rows that fill their chunks.
    """

    segments: int
    every: int
    runs: Int[Array, "b N"]
    tokens: Int[Array, "b N"]
    last: Int[Array, "b N"]
    after: Int[Array, "b N C"]
    bookkeeping: Bookkeeping | None


def chunks_of(length: int, segments: int) -> int:
    """Of a segment."""
    return math.ceil(math.ceil(length / segments) / CHUNK)


def track(
    segment_ids: Int[Array, "B T"] | None,
    shape: tuple[int, int],
    segments: int,
    *,
    every: int = 1,
    reverse: bool,
) -> Track:
    """Rows of [B, T] cut into so many segments, of which states are used after `every` so many."""
    length = shape[1]
    chunks = chunks_of(length, segments)
    if segment_ids is None and length % (segments * CHUNK):
        segment_ids = jnp.ones(shape, jnp.int32)

    def used(x: Int[Array, "b N*C"]) -> Int[Array, "b N*C"]:
        """What there is at each chunk, of the chunk after which its state is used."""
        return jnp.repeat(x[:, every * chunks - 1 :: every * chunks], every * chunks, axis=1)

    if segment_ids is None:
        through = jnp.arange(1, segments * chunks + 1, dtype=jnp.int32)[None] * CHUNK
        after = (used(through) - through).reshape(1, segments, chunks)
        tokens = through[:, chunks - 1 :: chunks]
        last = jnp.full_like(tokens, CHUNK)
        return Track(segments, every, jnp.zeros_like(tokens), tokens, last, after, None)
    total = segments * chunks * CHUNK
    ids = jnp.pad(segment_ids, ((0, 0), (0, total - length)))
    if reverse:
        ids = ids[:, ::-1]
    real, runs = segment_runs(ids)
    batch = ids.shape[0]
    begins = jnp.diff(runs, axis=1, prepend=runs[:, :1]) != 0

    def chunked(x):
        return x.reshape(batch, -1, CHUNK)

    count = jnp.cumsum(chunked(real), axis=2, dtype=jnp.int32)
    place = jnp.arange(CHUNK, dtype=jnp.int32)
    limit = jax.lax.cummax(jnp.where(chunked(begins), place, -1), axis=2)
    plain = jnp.all(chunked(real) & ~chunked(begins), axis=2)
    tokens = gpu_sweep.pack_token(chunked(real), count - chunked(real), limit)
    tokens = tokens.reshape(batch, total)
    codes = gpu_sweep.pack_chunk(plain, count[:, :, -1], limit[:, :, -1])
    if reverse:
        tokens, codes = tokens[:, ::-1], codes[:, ::-1]
    through = jnp.cumsum(count[:, :, -1], axis=1, dtype=jnp.int32)
    run = runs[:, CHUNK - 1 :: CHUNK]
    after = jnp.where(run == used(run), used(through) - through, jnp.iinfo(jnp.int32).max)
    ends = slice(chunks - 1, None, chunks)
    return Track(
        segments,
        every,
        run[:, ends],
        through[:, ends],
        count[:, ends, -1],
        after.reshape(batch, segments, chunks),
        Bookkeeping(tokens, codes),
    )


def _decay(slopes: Float[Array, "H"], tokens: Int[Array, "b *n"]) -> Float[Array, "b H *n"]:
    """exp(-slope * tokens)."""
    slopes = slopes.reshape(-1, *(1,) * (tokens.ndim - 1))
    return jnp.exp(-slopes * tokens[:, None].astype(jnp.float32))


def entering(slopes: Float[Array, "H"], state: Float[Array, "B H D D"], *, reverse: bool):
    """A state in the units in which it enters a chunk."""
    shift = CENTRE if reverse else CENTRE + 1
    return state * jnp.exp(-slopes * shift)[:, None, None]


def leaving(
    slopes: Float[Array, "H"], ends: Float[Array, "B H *n"], last: Int[Array, "b"], *, reverse: bool
) -> Float[Array, "B H *n"]:
    """A true state, from the Z that a sweep leaves; `last` counts its last chunk's real tokens."""
    shift = CENTRE if reverse else CENTRE + 1
    return ends * _expand(_decay(slopes, last - shift), ends.ndim)


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def states(
    sweep: Sweep,
    arrays: tuple[Array, ...],
    slopes: Float[Array, "H"],
    first: Float[Array, "B H D D"] | None,
    track: Track,
    interpret: Any,
) -> Float[Array, "B H U+1 DD"]:
    """The state before the first of the segments and after `every` of them; entering units.

    End states of all segments are made side by side, in processing order; then they are summed with
    the decay of the tokens between, as far as no packed sample begins in between. What decays to
    nothing until its state is used is not read.
    """
    batch, _, heads, dim = arrays[0].shape
    segments, every = track.segments, track.every
    faded = slopes[:, None, None] * track.after[:, None].astype(jnp.float32) > FADED
    starts = jnp.sum(faded, axis=3, dtype=jnp.int32)
    starts = jnp.broadcast_to(starts, (batch, *starts.shape[1:])).reshape(batch * heads, segments)
    (ends,) = gpu_sweep.run(
        (Sweep(sweep.keys, sweep.values, (), sweep.reverse),),
        arrays,
        slopes,
        bookkeeping=None if track.bookkeeping is None else [track.bookkeeping],
        starts=starts[:, ::-1] if sweep.reverse else starts,
        segments=segments,
        final=True,
        interpret=interpret,
    )
    ends = ends.reshape(batch, heads, segments, dim * dim)
    if sweep.reverse:
        ends = ends[:, :, ::-1]
    # Row u: the state after u + 1 times `every` segments. Column p: what segment p adds to it.
    index = jnp.arange(segments)
    earlier = index[every - 1 :: every, None] >= index
    runs, tokens = (x[:, every - 1 :: every] for x in (track.runs, track.tokens))
    inherits = earlier & (runs[:, :, None] == track.runs[:, None, :])
    between = jnp.where(inherits, tokens[:, :, None] - track.tokens[:, None, :], 0)
    weights = _decay(slopes, between + track.last[:, None, :]) * inherits[:, None]
    weights = jnp.broadcast_to(weights, (batch, *weights.shape[1:]))
    sums = jnp.einsum("bhgp,bhpx->bhgx", weights, ends, precision=jax.lax.Precision.HIGHEST)
    sums = jnp.pad(sums, ((0, 0), (0, 0), (1, 0), (0, 0)))
    if first is None:
        return sums
    kept = _decay(slopes, jnp.where(runs == 0, tokens, 0)) * (runs == 0)[:, None]
    kept = jnp.pad(kept, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
    first = entering(slopes, first, reverse=sweep.reverse)
    return sums + kept[..., None] * first.reshape(batch, heads, 1, dim * dim)


def seeds(
    states: Float[Array, "B H N+1 DD"], dim: int, *, reverse: bool
) -> Float[Array, "BH N D D"]:
    """The states entering the segments, in natural order."""
    batch, heads, number, _ = states.shape
    entered = states[:, :, :-1]
    if reverse:
        entered = entered[:, :, ::-1]
    return entered.reshape(batch * heads, number - 1, dim, dim)


def true_state(
    slopes: Float[Array, "H"], entered: Float[Array, "B H DD"], dim: int
) -> Float[Array, "B H D D"]:
    """Undo `entering` of a forward state; one against time is then that of `lightning_state`."""
    state = entered * jnp.exp(slopes * (CENTRE + 1))[:, None]
    return state.reshape(*state.shape[:2], dim, dim)
