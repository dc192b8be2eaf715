"""Lightning attention on Hopper GPUs: the sweep kernel, differentiable, for any row and head size.

What the kernel leaves to the host is bookkeeping: how many blocks to make of the rows, which tokens
packed samples and padding are, and the state that enters each piece of a row. Residuals of the
backward pass are the inputs and, for rows cut into segments, one state a segment.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, platform
from pallas_kernels.lightning_attention import gpu_sweep, xla
from pallas_kernels.lightning_attention.gpu_roles import CHUNK, Output, Sweep
from pallas_kernels.lightning_attention.gpu_sweep import Bookkeeping
from pallas_kernels.lightning_attention.segments import segment_runs

CENTRE = CHUNK // 2
# Over a chunk the decay e^-64s must stay a normal number of fp32 with 24 bits to spare, for with it
# are multiplied, as large as e^32s, the tokens that count. Released slopes are < 1.
MAX_SLOPE = 1.1
# Multiprocessors of an H100 or H200: the blocks that run at once, one each.
MULTIPROCESSORS = 132
TMA_ROWS = 8  # the granularity of the copies that tile rows for the tensor cores
MIN_SEGMENT = 1024  # tokens; below, the pass that makes the segments' states costs what it saves
MIN_PIECE = 4096  # tokens of a part of a segment; below, writing its state costs what it saves
MAX_STATE_SEGMENTS = 64  # they are summed each with each
FADED = 88.0  # e^-88 is below the smallest normal number of fp32

# Arrays of a launch are (q, k, v) and, in the backward pass, the gradient of the output.
_FORWARD = Sweep(keys=1, values=2, outputs=(Output(0),))
_GRAD_Q = Sweep(keys=1, values=2, outputs=(Output(3, transposed=True),))
_GRAD_VK = Sweep(keys=0, values=3, outputs=(Output(1), Output(2, transposed=True)), reverse=True)


def unsupported(
    q: Array,
    k: Array,
    v: Array,
    decay_slopes: Array,
    *,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk_size: int,
) -> str | None:
    """Why these arguments cannot be served, or None."""
    del k, initial_state, segment_ids, chunk_size
    if platform.gpu_compute_capability() != (9, 0):
        return f"{platform.device_name()}: it needs an NVIDIA Hopper GPU (H100, H200)"
    if q.dtype != jnp.bfloat16:
        return f"inputs of dtype {q.dtype}: it computes in bfloat16"
    slopes = dispatch.concrete(decay_slopes)
    if slopes is not None and slopes.max() > MAX_SLOPE:
        return f"the slope {slopes.max()}: slopes must be at most {MAX_SLOPE}"
    return None


@dataclass(frozen=True)
class Plan:
    """How the rows are cut into blocks; changes speed, and results by rounding and e^-88 only.

    Attributes:
      segments: pieces of a row for the outputs, forward and backward.
      splits: blocks that share the columns of the forward's output.
      state_segments: pieces of a row for the states; a multiple of `segments`, whose states they
        are summed to.
    """

    segments: int
    splits: int
    state_segments: int

    @property
    def pieces(self) -> int:
        """State segments after which a state is used: a segment's, or all for the final one."""
        return self.state_segments // self.segments


def plan(batch_heads: int, length: int, dim: int) -> Plan:
    """Fill the multiprocessors and no more (measured, benchmarks/results/lightning_h200.json).

    Splitting columns costs the least; with fewer heads rows are cut into segments, which reads keys
    and values a second time to find the state each begins with. Heads that forget fast leave most
    of that out, so it is cut into smaller pieces still, for the others to fill the multiprocessors.
    """
    wanted = max(1, MULTIPROCESSORS // batch_heads)
    longest = max(1, length // MIN_SEGMENT)
    if wanted > 2 and longest > 1:
        segments = min(1 << (wanted.bit_length() - 1), longest)
        for pieces in (4, 2):
            number = segments * pieces
            same_chunks = pieces * _chunks(length, number) == _chunks(length, segments)
            if same_chunks and number <= min(length // MIN_PIECE, MAX_STATE_SEGMENTS):
                return Plan(segments, 1, number)
        return Plan(segments, 1, segments)
    # Making states is bound by memory, so two blocks' worth of work for each multiprocessor.
    state_segments = min(longest, 1 << (2 * MULTIPROCESSORS // batch_heads).bit_length() >> 1)
    return Plan(1, 2 if wanted == 2 and dim == 128 else 1, max(1, state_segments))


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int,
    interpret: Any = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The kernel's form of `pallas_kernels.lightning_attention`; it chooses its own chunk size.

    Heads are served in blocks of 64 or 128 channels: key blocks add up, value blocks lie side by
    side, and a size between is padded with zeros. So are rows that are no multiple of 8 tokens;
    other rows are not copied.
    """
    del chunk_size
    slopes = _checked(decay_slopes)
    length, key_dim, value_dim = *k.shape[1::2], v.shape[3]
    dim = 64 if max(key_dim, value_dim) <= 64 else 128
    (q, k, v), segment_ids = _fitted((q, k, v), segment_ids, dim)
    if initial_state is not None:
        initial_state = _padded(_padded(initial_state.astype(jnp.float32), 2, dim), 3, dim)
    cut = plan(q.shape[0] * q.shape[2], q.shape[1], dim)
    static = _Static(cut, initial_state is not None, interpret)

    outs, columns = [], []
    for value in range(0, v.shape[3], dim):
        out, states = None, []
        for key in range(0, k.shape[3], dim):
            state = initial_state
            if state is not None:
                state = state[:, :, key : key + dim, value : value + dim]
            part, end = _attend(
                static,
                q[..., key : key + dim],
                k[..., key : key + dim],
                v[..., value : value + dim],
                slopes,
                state,
                segment_ids,
            )
            part = part.astype(jnp.float32) if k.shape[3] > dim else part
            out = part if out is None else out + part
            states.append(end)
        assert out is not None
        outs.append(out.astype(v.dtype))
        columns.append(jnp.concatenate(states, axis=2) if len(states) > 1 else states[0])
    out = jnp.concatenate(outs, axis=3) if len(outs) > 1 else outs[0]
    state = jnp.concatenate(columns, axis=3) if len(columns) > 1 else columns[0]
    return out[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]


def lightning_state(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    segment_ids: Int[Array, "B T"] | None,
    reverse: bool,
    chunk_size: int,
    interpret: Any = None,
) -> Float[Array, "B H K V"]:
    """The kernel's form of `pallas_kernels.lightning_state`; gradients are XLA's."""

    def call(k, v, slopes, ids):
        return _final_state(k, v, slopes, ids, reverse, interpret)

    def definition(k, v, slopes, ids):
        return xla.lightning_state(
            k, v, slopes, segment_ids=ids, reverse=reverse, chunk_size=chunk_size
        )

    run = dispatch.with_gradients_of(definition, call)
    return run(k, v, decay_slopes, segment_ids)


def _final_state(k, v, decay_slopes, segment_ids, reverse: bool, interpret: Any):
    slopes = _checked(decay_slopes)
    key_dim, value_dim = k.shape[3], v.shape[3]
    dim = 64 if max(key_dim, value_dim) <= 64 else 128
    (k, v), segment_ids = _fitted((k, v), segment_ids, dim)
    batch, length, heads, _ = k.shape
    segments = plan(batch * heads, length, dim).state_segments
    ids = _ids_if_needed(segment_ids, batch, length, segments)
    track = _track(ids, length, segments, every=segments, reverse=reverse)
    sweep = Sweep(keys=0, values=1, reverse=reverse)

    def block(key: int, value: int):
        arrays = k[..., key : key + dim], v[..., value : value + dim]
        states = _states(sweep, arrays, slopes, None, *track, segments, segments, interpret)
        return _true_state(slopes, states[:, :, -1], dim)

    blocks = [
        [block(key, value) for value in range(0, v.shape[3], dim)]
        for key in range(0, k.shape[3], dim)
    ]
    state = jnp.concatenate([jnp.concatenate(row, axis=3) for row in blocks], axis=2)
    return state[:, :, :key_dim, :value_dim]


def unsupported_state(
    k: Array,
    v: Array,
    decay_slopes: Array,
    *,
    segment_ids: Array | None,
    reverse: bool,
    chunk_size: int,
) -> str | None:
    """Why `lightning_state` cannot serve these arguments, or None."""
    del reverse
    return unsupported(
        k, k, v, decay_slopes, initial_state=None, segment_ids=segment_ids, chunk_size=chunk_size
    )


def _checked(decay_slopes: Float[Array, "H"]) -> Float[Array, "H"]:
    slopes = decay_slopes.astype(jnp.float32)
    return jnp.where(slopes > MAX_SLOPE, jnp.nan, slopes)  # loud where nothing can be raised


def _fitted(
    arrays: tuple[Array, ...], segment_ids: Array | None, dim: int
) -> tuple[tuple[Array, ...], Array | None]:
    """Rows and channels padded to what the kernel takes."""
    batch, length = arrays[0].shape[:2]
    if length % TMA_ROWS:
        if segment_ids is None:
            segment_ids = jnp.ones((batch, length), jnp.int32)
        segment_ids = _padded(segment_ids, 1, TMA_ROWS)
    return tuple(_padded(_padded(x, 1, TMA_ROWS), 3, dim) for x in arrays), segment_ids


def _padded(x: Array, axis: int, multiple: int) -> Array:
    excess = -x.shape[axis] % multiple
    if not excess:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, excess)
    return jnp.pad(x, widths)


@dataclass(frozen=True)
class _Static:
    """The static arguments of `_attend`."""

    plan: Plan
    has_initial_state: bool
    interpret: Any


@dataclass(frozen=True)
class _Pieces:
    """What bookkeeping must know of the segments of a row, in the order a sweep processes them.

    Attributes:
      runs: number of the packed sample each segment ends in, [b, segments].
      tokens: real tokens up to the end of each segment, [b, segments].
      last: real tokens in the last chunk of each segment, [b, segments].
      after: real tokens behind each chunk of a segment, as far as where its state is used; very
        many if another sample has begun by then.
    """

    runs: Int[Array, "b N"]
    tokens: Int[Array, "b N"]
    last: Int[Array, "b N"]
    after: Int[Array, "b N C"]


def _chunks(length: int, segments: int) -> int:
    """Of a segment."""
    return math.ceil(math.ceil(length / segments) / CHUNK)


def _track(
    segment_ids: Int[Array, "B T"] | None,
    length: int,
    segments: int,
    *,
    every: int = 1,
    reverse: bool,
) -> tuple[_Pieces, Bookkeeping | None]:
    """The bookkeeping of one direction; None for plain rows, which every segment must fill.

    States are used after `every` so many segments.
    """
    chunks = _chunks(length, segments)

    def used(x: Int[Array, "b N*C"]) -> Int[Array, "b N*C"]:
        """What there is at each chunk, of the chunk after which its state is used."""
        return jnp.repeat(x[:, every * chunks - 1 :: every * chunks], every * chunks, axis=1)

    if segment_ids is None:
        through = jnp.arange(1, segments * chunks + 1, dtype=jnp.int32)[None] * CHUNK
        after = (used(through) - through).reshape(1, segments, chunks)
        tokens = through[:, chunks - 1 :: chunks]
        last = jnp.full_like(tokens, CHUNK)
        return _Pieces(jnp.zeros_like(tokens), tokens, last, after), None
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
    found = _Pieces(
        run[:, ends],
        through[:, ends],
        count[:, ends, -1],
        after.reshape(batch, segments, chunks),
    )
    return found, Bookkeeping(tokens, codes)


def _decay(slopes: Float[Array, "H"], tokens: Int[Array, "b *n"]) -> Float[Array, "b H *n"]:
    """exp(-slope * tokens)."""
    slopes = slopes.reshape(-1, *(1,) * (tokens.ndim - 1))
    return jnp.exp(-slopes * tokens[:, None].astype(jnp.float32))


def _entering(slopes: Float[Array, "H"], state: Float[Array, "B H D D"], *, reverse: bool):
    """A state in the units in which it enters a chunk."""
    shift = CENTRE if reverse else CENTRE + 1
    return state * jnp.exp(-slopes * shift)[:, None, None]


def _leaving(
    slopes: Float[Array, "H"], ends: Float[Array, "B H *n"], last: Int[Array, "b"], *, reverse: bool
) -> Float[Array, "B H *n"]:
    """A true state, from the Z that a sweep leaves; `last` counts its last chunk's real tokens."""
    shift = CENTRE if reverse else CENTRE + 1
    return ends * _expand(_decay(slopes, last - shift), ends.ndim)


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def _states(
    sweep: Sweep,
    arrays: tuple[Array, ...],
    slopes: Float[Array, "H"],
    first: Float[Array, "B H D D"] | None,
    pieces: _Pieces,
    bookkeeping: Bookkeeping | None,
    segments: int,
    every: int,
    interpret: Any,
) -> Float[Array, "B H U+1 DD"]:
    """The state before the first of so many segments and after `every` of them; entering units.

    End states of all segments are made side by side, in processing order; then they are summed with
    the decay of the tokens between, as far as no packed sample begins in between. What decays to
    nothing until its state is used is not read.
    """
    batch, _, heads, dim = arrays[0].shape
    faded = slopes[:, None, None] * pieces.after[:, None].astype(jnp.float32) > FADED
    starts = jnp.sum(faded, axis=3, dtype=jnp.int32)
    starts = jnp.broadcast_to(starts, (batch, *starts.shape[1:])).reshape(batch * heads, segments)
    (ends,) = gpu_sweep.run(
        (Sweep(sweep.keys, sweep.values, (), sweep.reverse),),
        arrays,
        slopes,
        bookkeeping=None if bookkeeping is None else [bookkeeping],
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
    runs, tokens = (x[:, every - 1 :: every] for x in (pieces.runs, pieces.tokens))
    inherits = earlier & (runs[:, :, None] == pieces.runs[:, None, :])
    between = jnp.where(inherits, tokens[:, :, None] - pieces.tokens[:, None, :], 0)
    weights = _decay(slopes, between + pieces.last[:, None, :]) * inherits[:, None]
    weights = jnp.broadcast_to(weights, (batch, *weights.shape[1:]))
    states = jnp.einsum("bhgp,bhpx->bhgx", weights, ends, precision=jax.lax.Precision.HIGHEST)
    states = jnp.pad(states, ((0, 0), (0, 0), (1, 0), (0, 0)))
    if first is None:
        return states
    kept = _decay(slopes, jnp.where(runs == 0, tokens, 0)) * (runs == 0)[:, None]
    kept = jnp.pad(kept, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
    first = _entering(slopes, first, reverse=sweep.reverse)
    return states + kept[..., None] * first.reshape(batch, heads, 1, dim * dim)


def _seeds(
    states: Float[Array, "B H N+1 DD"], dim: int, *, reverse: bool
) -> Float[Array, "BH N D D"]:
    """The states entering the segments, in natural order."""
    batch, heads, number, _ = states.shape
    seeds = states[:, :, :-1]
    if reverse:
        seeds = seeds[:, :, ::-1]
    return seeds.reshape(batch * heads, number - 1, dim, dim)


def _true_state(
    slopes: Float[Array, "H"], entering: Float[Array, "B H DD"], dim: int
) -> Float[Array, "B H D D"]:
    """Undo `_entering` of a forward state."""
    state = entering * jnp.exp(slopes * (CENTRE + 1))[:, None]
    return state.reshape(*state.shape[:2], dim, dim)


def _ids_if_needed(segment_ids: Array | None, batch: int, length: int, segments: int):
    """Segment ids where the kernel needs them: also for rows that do not fill their chunks."""
    if segment_ids is None and length % (segments * CHUNK):
        return jnp.ones((batch, length), jnp.int32)
    return segment_ids


def _attend_primal(
    static: _Static, q, k, v, slopes, initial_state, segment_ids
) -> tuple[Array, Array]:
    return _attend_forward(static, q, k, v, slopes, initial_state, segment_ids)[0]


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _attend_forward(static, q, k, v, slopes, initial_state, segment_ids):
    """Output and final state come from launches of their own: XLA drops the one nobody uses."""
    batch, length, heads, dim = q.shape
    cut, arrays = static.plan, (q, k, v)
    number = cut.state_segments
    ids = _ids_if_needed(segment_ids, batch, length, number)
    pieces, bookkeeping = _track(ids, length, number, every=cut.pieces, reverse=False)
    states = _states(
        _FORWARD,
        arrays,
        slopes,
        initial_state,
        pieces,
        bookkeeping,
        number,
        cut.pieces,
        static.interpret,
    )
    state = _true_state(slopes, states[:, :, -1], dim)

    seeds = None
    if cut.segments > 1:
        seeds = _seeds(states, dim, reverse=False)
    else:
        if initial_state is not None:
            seeds = _entering(slopes, initial_state, reverse=False)
            seeds = seeds.reshape(batch * heads, 1, dim, dim)
        ids = _ids_if_needed(segment_ids, batch, length, 1)
        _, bookkeeping = _track(ids, length, 1, reverse=False)
    (out,) = gpu_sweep.run(
        (_FORWARD,),
        arrays,
        slopes,
        seeds=None if seeds is None else [seeds],
        bookkeeping=None if bookkeeping is None else [bookkeeping],
        segments=cut.segments,
        splits=cut.splits,
        interpret=static.interpret,
    )
    return (out, state), (q, k, v, slopes, seeds, ids)


def _attend_backward(static, residuals, grads):
    q, k, v, slopes, seeds, ids = residuals
    grad_out, grad_state = grads
    batch, length, heads, dim = q.shape
    cut = static.plan
    arrays = (q, k, v, grad_out.astype(q.dtype))
    segments, number = cut.segments, cut.state_segments if cut.segments > 1 else 1
    pieces, backwards = _track(ids, length, number, every=number // segments, reverse=True)
    _, forwards = _track(ids, length, number, reverse=False)
    if segments > 1:
        states = _states(
            _GRAD_VK,
            arrays,
            slopes,
            grad_state,
            pieces,
            backwards,
            number,
            cut.pieces,
            static.interpret,
        )
        grad_seeds = _seeds(states, dim, reverse=True)
    else:
        grad_seeds = _entering(slopes, grad_state, reverse=True)
        grad_seeds = grad_seeds.reshape(batch * heads, 1, dim, dim)
    if seeds is None:
        seeds = jnp.zeros((batch * heads, segments, dim, dim), jnp.float32)
    has_state = static.has_initial_state
    grad_v, grad_k, grad_q, *ends = gpu_sweep.run(
        (_GRAD_VK, _GRAD_Q),
        arrays,
        slopes,
        seeds=[grad_seeds, seeds],
        bookkeeping=None if backwards is None or forwards is None else [backwards, forwards],
        segments=segments,
        final=has_state,
        overlap=True,
        interpret=static.interpret,
    )
    grad_initial = None
    if has_state:
        end = ends[0].reshape(batch, heads, dim, dim)
        grad_initial = _leaving(slopes, end, pieces.last[:, -1], reverse=True)
    return grad_q, grad_k, grad_v, None, grad_initial, None


_attend.defvjp(_attend_forward, _attend_backward)
