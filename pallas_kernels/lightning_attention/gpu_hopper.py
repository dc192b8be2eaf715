"""Lightning attention on Hopper GPUs: the sweep kernel, differentiable, for any row and head size.

Here rows are cut into blocks and launches put together; `gpu_states` has what packing and padding
mean to them, and the states. Residuals of the backward pass are the inputs and, for rows cut into
segments, one state a segment.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, platform
from pallas_kernels.lightning_attention import gpu_states, gpu_sweep, xla
from pallas_kernels.lightning_attention.gpu_roles import Output, Sweep

# Over a chunk the decay e^-64s must stay a normal number of fp32 with 24 bits to spare, for with it
# are multiplied, as large as e^32s, the tokens that count. Released slopes are < 1.
MAX_SLOPE = 1.1
# Multiprocessors of an H100 or H200: the blocks that run at once, one each.
MULTIPROCESSORS = 132
TMA_ROWS = 8  # the granularity of the copies that tile rows for the tensor cores
MIN_SEGMENT = 1024  # tokens; below, the pass that makes the segments' states costs what it saves
MIN_PIECE = 4096  # tokens of a part of a segment; below, writing its state costs what it saves
MAX_STATE_SEGMENTS = 64  # they are summed each with each

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
            of_piece, of_segment = (gpu_states.chunks_of(length, n) for n in (number, segments))
            if pieces * of_piece == of_segment and number <= min(
                length // MIN_PIECE, MAX_STATE_SEGMENTS
            ):
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
    track = gpu_states.track(
        segment_ids, (batch, length), segments, every=segments, reverse=reverse
    )
    sweep = Sweep(keys=0, values=1, reverse=reverse)

    def block(key: int, value: int):
        arrays = k[..., key : key + dim], v[..., value : value + dim]
        states = gpu_states.states(sweep, arrays, slopes, None, track, interpret)
        return gpu_states.true_state(slopes, states[:, :, -1], dim)

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


def _attend_primal(
    static: _Static, q, k, v, slopes, initial_state, segment_ids
) -> tuple[Array, Array]:
    return _attend_forward(static, q, k, v, slopes, initial_state, segment_ids)[0]


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _attend_forward(static, q, k, v, slopes, initial_state, segment_ids):
    """Output and final state come from launches of their own: XLA drops the one nobody uses."""
    batch, length, heads, dim = q.shape
    cut, arrays = static.plan, (q, k, v)

    def track(segments: int, every: int = 1):
        shape = (batch, length)
        return gpu_states.track(segment_ids, shape, segments, every=every, reverse=False)

    rows = track(cut.state_segments, cut.pieces)
    states = gpu_states.states(_FORWARD, arrays, slopes, initial_state, rows, static.interpret)
    state = gpu_states.true_state(slopes, states[:, :, -1], dim)
    seeds = None
    if cut.segments > 1:
        seeds = gpu_states.seeds(states, dim, reverse=False)
    else:
        rows = track(1)
        if initial_state is not None:
            seeds = gpu_states.entering(slopes, initial_state, reverse=False)
            seeds = seeds.reshape(batch * heads, 1, dim, dim)
    (out,) = gpu_sweep.run(
        (_FORWARD,),
        arrays,
        slopes,
        seeds=None if seeds is None else [seeds],
        bookkeeping=None if rows.bookkeeping is None else [rows.bookkeeping],
        segments=cut.segments,
        splits=cut.splits,
        interpret=static.interpret,
    )
    return (out, state), (q, k, v, slopes, seeds, segment_ids)


def _attend_backward(static, residuals, grads):
    q, k, v, slopes, seeds, segment_ids = residuals
    grad_out, grad_state = grads
    batch, length, heads, dim = q.shape
    cut, shape = static.plan, (batch, length)
    segments, number = cut.segments, cut.state_segments if cut.segments > 1 else 1
    arrays = (q, k, v, grad_out.astype(q.dtype))
    backwards = gpu_states.track(segment_ids, shape, number, every=number // segments, reverse=True)
    forwards = gpu_states.track(segment_ids, shape, number, reverse=False)
    if segments > 1:
        states = gpu_states.states(
            _GRAD_VK, arrays, slopes, grad_state, backwards, static.interpret
        )
        grad_seeds = gpu_states.seeds(states, dim, reverse=True)
    else:
        grad_seeds = gpu_states.entering(slopes, grad_state, reverse=True)
        grad_seeds = grad_seeds.reshape(batch * heads, 1, dim, dim)
    if seeds is None:
        seeds = jnp.zeros((batch * heads, segments, dim, dim), jnp.float32)
    has_state = static.has_initial_state
    tracked = [x.bookkeeping for x in (backwards, forwards) if x.bookkeeping is not None]
    grad_v, grad_k, grad_q, *ends = gpu_sweep.run(
        (_GRAD_VK, _GRAD_Q),
        arrays,
        slopes,
        seeds=[grad_seeds, seeds],
        bookkeeping=tracked or None,
        segments=segments,
        final=has_state,
        overlap=True,
        interpret=static.interpret,
    )
    grad_initial = None
    if has_state:
        end = ends[0].reshape(batch, heads, dim, dim)
        grad_initial = gpu_states.leaving(slopes, end, backwards.last[:, -1], reverse=True)
    return grad_q, grad_k, grad_v, None, grad_initial, None


_attend.defvjp(_attend_forward, _attend_backward)
