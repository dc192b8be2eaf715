"""The sweep: one Hopper kernel that is the forward and the backward pass of lightning attention.

A sweep walks chunks of C tokens in time order, or against it. It carries a D x D state built from
two streams, keys x and values y, and makes outputs from the state and the chunk. With m the number
of tokens the chunk has processed before a token, c = C / 2, s the slope, N the tokens of the chunk:

    y'_j  = e^{s (m_j - c)} y_j
    plain       out_i = e^{-s (m_i - c)} (a_i U   + sum_j [j visible from i] (a_i . x_j) y'_j)
    transposed  out_i = e^{-s (m_i - c)} (a_i U^T + sum_j [j visible from i] (a_i . y'_j) x_j)
    Z = U + x^T y'        U <- e^{-s N} Z

    forward   o       x=k, y=v,  plain from q
    backward  dq      x=k, y=v,  transposed from do
              dv, dk  x=q, y=do, plain from k and transposed from v, against time: one state for both

The decay rides on one operand, so there is no C x C decay matrix; exponents stay within s C / 2.
The state leaves as Z, before the last decay, so nothing has to be undone.

A block (CTA) has three warpgroups by role: one advances the state and publishes it in bf16, one
makes outputs, one moves memory (TMA). Splitting the work by role rather than by columns keeps the
state's serial chain short, which is what limits the kernel when there are few heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

CHUNK = 64
WARPGROUPS = 3
STATE, OUTPUT, MEMORY = range(WARPGROUPS)
# Registers a thread by role. All three must be set, or ptxas ignores them and spills.
REGISTERS = {STATE: 232, OUTPUT: 232, MEMORY: 40}
_ROWS = plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Output:
    """One output of a sweep: which array it reads, and whether it uses the state transposed."""

    reads: int
    transposed: bool = False


@dataclass(frozen=True)
class Sweep:
    """What one sweep reads (indices into the launch's arrays) and makes; see the module.

    Attributes:
      keys, values: the streams x and y.
      outputs: none for a sweep that only makes states.
      reverse: against time.
    """

    keys: int
    values: int
    outputs: tuple[Output, ...] = ()
    reverse: bool = False


@dataclass(frozen=True)
class Bookkeeping:
    """Packed samples and padding of one sweep, in int32; None of it for plain rows.

    A chunk without a border or padding is *plain* and runs as if there were no bookkeeping.

    Attributes:
      tokens: [B, T'] see `pack_token`.
      chunks: [B, T' / C] 0 for a plain chunk, else see `pack_chunk`.
    """

    tokens: Array
    chunks: Array


def pack_token(real, before, limit):
    """Whether a token is real, and what its chunk did before it.

    `before` counts the real tokens processed before it, `limit` is where its sample begins in the
    chunk, in processing order; -1 if that is in an earlier chunk.
    """
    return real.astype(jnp.int32) << 16 | before << 8 | (limit + 1)


def pack_chunk(plain, count, limit):
    """0 if plain; else 1, the real tokens of the chunk, and the `limit` of its last token."""
    return jnp.where(plain, 0, 1 << 16 | count << 8 | (limit + 1)).astype(jnp.int32)


@dataclass(frozen=True)
class _Launch:
    """The static shape of a launch."""

    sweeps: tuple[Sweep, ...]
    heads: int
    dim: int
    splits: int
    segments: int
    chunks: int  # of a segment
    slots: int
    state_slots: int
    seeded: bool
    tracked: bool  # with bookkeeping
    final: bool
    overlap: bool

    @property
    def max_outputs(self) -> int:
        return max(len(s.outputs) for s in self.sweeps)

    @property
    def exact(self) -> bool:
        """States that are the result also get what rounding the scaled values to bf16 dropped."""
        return self.max_outputs == 0

    @property
    def state_parts(self) -> int:
        """Without outputs their warpgroup takes half of the state's columns: a shorter chain."""
        return 2 if self.max_outputs == 0 and self.dim == 128 else 1

    @property
    def columns(self) -> int:
        """Columns of an output one block makes."""
        return self.dim // self.splits

    @property
    def split_keys(self) -> bool:
        """A split transposed output needs half of the keys, a plain one half of the values."""
        outputs = self.sweeps[0].outputs
        return self.splits > 1 and bool(outputs) and outputs[0].transposed

    @property
    def state_shape(self) -> tuple[int, int]:
        if self.split_keys:
            return self.columns, self.dim
        return self.dim, self.columns


@dataclass(frozen=True)
class _Refs:
    """What one sweep touches, the buffers shared and the barriers its own."""

    arrays: Sequence[Any]
    slope: Any
    seed: Any
    tokens: Any
    chunks: Any
    outputs: Sequence[Any]
    final: Any
    keys: Any
    values: Any
    reads: Sequence[Any]
    state: Any
    staged: Any
    rest: Sequence[Any]
    loaded: Any
    consumed: Any
    published: Any
    free: Any
    done: Any


@dataclass(frozen=True)
class _Block:
    """Where this block works."""

    batch: Any
    head: Any
    batch_head: Any
    segment: Any
    split: Any
    launch: _Launch
    sweep: Sweep
    part: int = 0  # of the state's columns, see `state_parts`

    @property
    def output_columns(self):
        return pl.ds(self.split * self.launch.columns, self.launch.columns)

    @property
    def key_columns(self):
        return self.output_columns if self.launch.split_keys else slice(None)

    @property
    def value_columns(self):
        return slice(None) if self.launch.split_keys else self.output_columns

    @property
    def state_columns(self):
        """The columns of the buffered values, and of the state, that this warpgroup advances."""
        width = self.launch.state_shape[1] // self.launch.state_parts
        return pl.ds(self.part * width, width)

    def chunk(self, t):
        """Index along the row of the t-th chunk processed."""
        last = self.launch.chunks - 1
        return self.segment * self.launch.chunks + (last - t if self.sweep.reverse else t)

    def rows(self, t):
        return pl.ds(self.chunk(t) * CHUNK, CHUNK)


def _row_values(function: Callable[[Array], Array]) -> Array:
    """[C] in the layout of a row reduction, whose broadcast over columns moves nothing."""
    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, 8), 0, layout=plgpu.Layout.WGMMA)
    return plgpu.layout_cast(jnp.max(function(row), axis=1), _ROWS)


def _plain_scale(slope, sweep: Sweep, sign: float):
    """e^{sign s (m - c)} for the rows of a plain chunk."""

    def scale(row):
        before = (CHUNK - 1 - row) if sweep.reverse else row
        return jnp.exp((before.astype(jnp.float32) - CHUNK // 2) * (sign * slope))

    return _row_values(scale)


def _tracked_rows(block: _Block, refs: _Refs, t, sign: float):
    """(scale, limit) for the rows of a chunk with borders or padding; padding has scale 0."""
    packed = plgpu.load(refs.tokens.at[block.batch, block.rows(t)], layout=_ROWS, optimized=False)
    slope = refs.slope[block.head]
    before = ((packed >> 8) & 255).astype(jnp.float32)
    scale = jnp.exp((before - CHUNK // 2) * (sign * slope))
    return jnp.where((packed >> 16) > 0, scale, 0.0), (packed & 255) - 1


def _over_columns(rows, columns: int):
    return lax.broadcast_in_dim(rows, (CHUNK, columns), [0])


def _slot(t, slots: int):
    return lax.rem(t, jnp.int32(slots))


def _memory(block: _Block, refs: _Refs) -> None:
    """Keep the ring of chunks full."""
    launch, sweep = block.launch, block.sweep

    def load(t, slot):
        def copy(array, columns, target):
            source = refs.arrays[array].at[block.batch, block.rows(t), block.head, columns]
            plgpu.copy_gmem_to_smem(source, target.at[slot], refs.loaded.at[slot])

        copy(sweep.keys, block.key_columns, refs.keys)
        copy(sweep.values, block.value_columns, refs.values)
        for output, target in zip(sweep.outputs, refs.reads, strict=False):
            copy(output.reads, slice(None), target)

    for i in range(min(launch.slots, launch.chunks)):
        load(jnp.int32(i), i)

    @pl.loop(0, launch.chunks - launch.slots)
    def _(t):
        slot = _slot(t, launch.slots)
        plgpu.barrier_wait(refs.consumed.at[slot])
        load(t + launch.slots, slot)


def _state(block: _Block, refs: _Refs) -> None:
    """Scale the values in place, publish the state, advance it."""
    launch, sweep = block.launch, block.sweep
    slope = refs.slope[block.head]
    plain_decay = jnp.exp(-slope * CHUNK)
    shape = (launch.state_shape[0], launch.state_shape[1] // launch.state_parts)
    if launch.seeded:
        where = (block.batch_head, block.segment, block.key_columns, block.value_columns)
        start = plgpu.load(refs.seed.at[where], layout=plgpu.Layout.WGMMA, optimized=False)
    else:
        start = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    def body(t, carry):
        state, plain_rows, *code = carry
        slot = _slot(t, launch.slots)
        decay = plain_decay
        following = [_chunk_code(block, refs, t + 1)] if launch.tracked else []
        plgpu.barrier_wait(refs.loaded.at[slot])
        if launch.tracked:
            plain, tokens, limit = _unpack_chunk(code[0])
            decay = jnp.where(plain, decay, jnp.exp(-slope * tokens))
            pl.when(plain)(lambda: _scale(block, refs, slot, plain_rows))

            @pl.when(~plain)
            def _():
                _scale(block, refs, slot, _tracked_rows(block, refs, t, 1.0)[0])
        else:
            _scale(block, refs, slot, plain_rows)
        if sweep.outputs:
            _publish(block, refs, t, state)
        else:
            plgpu.commit_smem()
        if launch.tracked:

            @pl.when(~plain)
            def _():
                if sweep.outputs:
                    plgpu.barrier_wait(refs.done)  # outputs have used all rows
                pl.when(limit >= 0)(lambda: _keep_last_sample(block, refs, slot, limit))

            state = state * jnp.where(limit >= 0, 0.0, 1.0)

        def add(accumulator):
            keys = refs.keys.at[slot].transpose((1, 0))
            for values in _scaled(block, refs, slot):
                plgpu.wgmma(accumulator, keys, values)

        state = pl.run_state(add)(plgpu.ACC.init(state))
        state = state * jnp.where(t == launch.chunks - 1, 1.0, decay)
        plgpu.barrier_arrive(refs.consumed.at[slot])
        return state, plain_rows, *following

    first = [_chunk_code(block, refs, jnp.int32(0))] if launch.tracked else []
    carry = (start, _plain_scale(slope, sweep, 1.0), *first)
    end = lax.fori_loop(0, launch.chunks, body, carry)[0]
    if launch.final:
        _store_state(block, refs, end)


def _chunk_code(block: _Block, refs: _Refs, t):
    """The code of the t-th chunk (of the last one beyond the end); fetched a chunk ahead."""
    return refs.chunks[block.batch, block.chunk(jnp.minimum(t, block.launch.chunks - 1))]


def _unpack_chunk(code):
    """(plain, real tokens, limit) of `pack_chunk`; the limit of a plain chunk is -1."""
    return code == 0, ((code >> 8) & 255).astype(jnp.float32), (code & 255) - 1


def _scaled(block: _Block, refs: _Refs, slot) -> list[Any]:
    """The buffers whose sum is the scaled values, this warpgroup's columns of them."""
    buffers = [refs.values.at[slot], *refs.rest]
    if block.launch.state_parts == 1:
        return buffers
    return [buffer.at[:, block.state_columns] for buffer in buffers]


def _scale(block: _Block, refs: _Refs, slot, rows) -> None:
    """Scale the values of a chunk in their slot: nobody needs the raw ones."""
    values, *rests = _scaled(block, refs, slot)
    scaled = plgpu.load(values, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    scaled = scaled * _over_columns(rows, scaled.shape[1])
    rounded = scaled.astype(jnp.bfloat16)
    values[...] = rounded
    for rest in rests:
        rest[...] = (scaled - rounded.astype(jnp.float32)).astype(jnp.bfloat16)


def _publish(block: _Block, refs: _Refs, t, state) -> None:
    """Hand the outputs the state before this chunk, and with it the scaled values."""
    slots = block.launch.state_slots
    slot = _slot(t, slots)

    @pl.when(t >= slots)
    def _():
        plgpu.barrier_wait(refs.free.at[slot])

    refs.state.at[slot][...] = state.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.published.at[slot])


def _keep_last_sample(block: _Block, refs: _Refs, slot, limit) -> None:
    """A border in the chunk: only rows of the sample that goes on may enter the state."""
    buffers = _scaled(block, refs, slot)
    row = plgpu.broadcasted_iota(jnp.int32, buffers[0].shape, 0, layout=plgpu.Layout.WGMMA)
    order = (CHUNK - 1 - row) if block.sweep.reverse else row
    for ref in buffers:
        kept = plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        ref[...] = jnp.where(order >= limit, kept, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def _store_state(block: _Block, refs: _Refs, state) -> None:
    launch, columns = block.launch, (block.key_columns, block.value_columns)
    if not block.sweep.outputs:
        whole = refs.final.at[(block.batch_head, block.segment)]
        target = whole if launch.state_parts == 1 else whole.at[:, block.state_columns]
        target[...] = state
        return

    @pl.when(block.segment == (0 if block.sweep.reverse else launch.segments - 1))
    def _():
        refs.final.at[(block.batch_head, *columns)][...] = state


def _output(block: _Block, refs: _Refs) -> None:
    """Make every output of the sweep, chunk after chunk."""
    launch, sweep = block.launch, block.sweep

    def chunk(t, rows, limit=None):
        for number in range(len(sweep.outputs)):
            _one_output(block, refs, t, number, rows, limit)

    def body(t, carry):
        plain_rows, *code = carry
        if not launch.tracked:
            chunk(t, plain_rows)
            return (plain_rows,)
        following = _chunk_code(block, refs, t + 1)
        pl.when(code[0] == 0)(lambda: chunk(t, plain_rows))
        pl.when(code[0] != 0)(lambda: chunk(t, *_tracked_rows(block, refs, t, -1.0)))
        return plain_rows, following

    first = [_chunk_code(block, refs, jnp.int32(0))] if launch.tracked else []
    carry = (_plain_scale(refs.slope[block.head], sweep, -1.0), *first)
    lax.fori_loop(0, launch.chunks, body, carry)
    plgpu.wait_smem_to_gmem(0)


def _one_output(block: _Block, refs: _Refs, t, number: int, rows, limit) -> None:
    """One output of one chunk; `limit` is given for a chunk with borders or padding."""
    launch, sweep = block.launch, block.sweep
    first, last = number == 0, number == len(sweep.outputs) - 1
    columns = launch.columns
    slot, state_slot = _slot(t, launch.slots), _slot(t, launch.state_slots)
    reads = refs.reads[number].at[slot]
    keys, values, state = refs.keys.at[slot], refs.values.at[slot], refs.state.at[state_slot]
    if sweep.outputs[number].transposed:
        against, weighted, state = values, keys, state.transpose((1, 0))
    else:
        against, weighted = keys, values

    def visible(scores):
        query = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=plgpu.Layout.WGMMA)
        keep = (query <= key) if sweep.reverse else (query >= key)
        if limit is not None:
            order = (CHUNK - 1 - key) if sweep.reverse else key
            keep &= order >= _over_columns(limit, CHUNK)
        return jnp.where(keep, scores, 0.0).astype(jnp.bfloat16)

    def scores_only(accumulator):
        plgpu.wgmma(accumulator, reads, against.transpose((1, 0)))
        return accumulator[...]

    def carried_only(accumulator):
        plgpu.wgmma(accumulator, reads, state)
        return accumulator[...]

    def carried_and_within(accumulator, weights):
        plgpu.wgmma(accumulator, reads, state)
        plgpu.wgmma(accumulator, weights, weighted)
        return accumulator[...]

    def overlapped(scores, accumulator):
        """Mask the scores while the product with the state still runs."""
        plgpu.wgmma(scores, reads, against.transpose((1, 0)))
        plgpu.wgmma(accumulator, reads, state)
        weights = visible(plgpu.wgmma_accumulator_load(scores, wait_n=1))
        plgpu.wgmma(accumulator, weights, weighted)
        return accumulator[...]

    square = plgpu.ACC((CHUNK, CHUNK), jnp.float32)
    wide = plgpu.ACC((CHUNK, columns), jnp.float32)

    def await_state():
        if first:
            plgpu.barrier_wait(refs.published.at[state_slot])

    if first:
        plgpu.barrier_wait(refs.loaded.at[slot])
    if limit is not None:
        await_state()
        weights = visible(pl.run_scoped(scores_only, square))
        unbroken = _over_columns(jnp.where(limit < 0, 1.0, 0.0), columns)
        out = pl.run_scoped(carried_only, wide) * unbroken
        out = pl.run_state(lambda acc: plgpu.wgmma(acc, weights, weighted))(plgpu.ACC.init(out))
        if last:
            plgpu.barrier_arrive(refs.done)
    elif launch.overlap:
        await_state()
        out = pl.run_scoped(overlapped, square, wide)
    else:
        # Scores of keys need neither the state nor the scaled values: do not wait for them.
        if sweep.outputs[number].transposed:
            await_state()
        weights = visible(pl.run_scoped(scores_only, square))
        if not sweep.outputs[number].transposed:
            await_state()
        out = pl.run_scoped(functools.partial(carried_and_within, weights=weights), wide)
    if last:
        plgpu.barrier_arrive(refs.free.at[state_slot])
        plgpu.barrier_arrive(refs.consumed.at[slot])
    out = out * _over_columns(rows, columns)
    plgpu.wait_smem_to_gmem(len(sweep.outputs) - 1, wait_read_only=True)
    staged = refs.staged.at[number]
    staged[...] = out.astype(jnp.bfloat16)
    plgpu.commit_smem()
    target = refs.outputs[number].at[block.batch, block.rows(t), block.head, block.output_columns]
    plgpu.copy_smem_to_gmem(staged, target)


def run(
    sweeps: Sequence[Sweep],
    arrays: Sequence[Array],
    slopes: Array,
    *,
    seeds: Sequence[Array] | None = None,
    bookkeeping: Sequence[Bookkeeping] | None = None,
    segments: int = 1,
    splits: int = 1,
    final: bool = False,
    overlap: bool = False,
    interpret: Any = None,
) -> list[Array]:
    """Run sweeps over the same rows in one launch.

    Args:
      sweeps: they share the launch; with `splits` > 1 each makes one output.
      arrays: bf16 [B, T, H, D], D 64 or 128, T a multiple of 64 unless there is bookkeeping.
      slopes: fp32 [H].
      seeds: for each sweep the state U that enters each segment, fp32 [B H, segments, D, D].
      bookkeeping: for each sweep; covers segments x ceil(T / segments / 64) x 64 tokens.
      segments: equal pieces the rows are cut into, each a block of its own.
      splits: blocks that share the columns of an output.
      final: also return end states Z: [B H, D, D] or, without outputs, [B H, segments, D, D] that
        are exact to fp32; beside outputs they have the rounding of the scaled values in them.
      overlap: mask the scores under the product with the state; pays off in the backward pass.
      interpret: parameters of the GPU interpreter, to run on a CPU.

    Returns:
      The outputs sweep by sweep, bf16 like the arrays; then the end states, fp32.
    """
    batch, length, heads, dim = arrays[0].shape
    chunks = math.ceil(math.ceil(length / segments) / CHUNK)
    launch = _Launch(
        sweeps=tuple(sweeps),
        heads=heads,
        dim=dim,
        splits=splits,
        segments=segments,
        chunks=chunks,
        slots=3 if splits > 1 or not sweeps[0].outputs else 2,
        state_slots=2,
        seeded=seeds is not None,
        tracked=bookkeeping is not None,
        final=final,
        overlap=overlap,
    )
    outputs = [
        jax.ShapeDtypeStruct(arrays[0].shape, jnp.bfloat16) for s in sweeps for _ in s.outputs
    ]
    if final:
        shape = (batch * heads, dim, dim)
        if not launch.max_outputs:
            shape = (batch * heads, segments, dim, dim)
        outputs += [jax.ShapeDtypeStruct(shape, jnp.float32)] * len(sweeps)
    tracked = [x for b in bookkeeping or () for x in (b.tokens, b.chunks)]
    inputs = (*arrays, slopes, *(seeds or ()), *tracked)
    kernel = plgpu.kernel(
        functools.partial(_entry, launch, len(arrays), len(inputs), len(outputs)),
        out_type=outputs,
        grid=(len(sweeps), batch * heads, segments, splits),
        grid_names=("sweep", "batch_head", "segment", "split"),
        num_threads=WARPGROUPS,
        thread_name="role",
        scratch_types=_scratch(launch),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(*inputs)


def _scratch(launch: _Launch) -> list[Any]:
    """Shared buffers (keys, values, reads, state, staged outputs, rest), then barriers a sweep."""
    keys, values = launch.state_shape

    def buffer(*shape: int):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    unused = plgpu.SMEM((1, 8, 64), jnp.bfloat16)
    number = launch.max_outputs
    scratch: list[Any] = [
        buffer(launch.slots, CHUNK, keys),
        buffer(launch.slots, CHUNK, values),
        [buffer(launch.slots, CHUNK, launch.dim) for _ in range(number)],
        buffer(launch.state_slots, keys, values) if number else unused,
        buffer(number, CHUNK, launch.columns) if number else unused,
        [buffer(CHUNK, values)] if launch.exact else [],
    ]
    for sweep in launch.sweeps:
        makes = bool(sweep.outputs)
        scratch += [
            plgpu.Barrier(num_arrivals=2 + len(sweep.outputs), num_barriers=launch.slots),
            plgpu.Barrier(num_arrivals=launch.state_parts + makes, num_barriers=launch.slots),
            plgpu.Barrier(num_barriers=launch.state_slots),
            plgpu.Barrier(num_barriers=launch.state_slots),
            plgpu.Barrier(),
        ]
    return scratch


def _entry(launch: _Launch, num_arrays: int, num_inputs: int, num_outputs: int, *refs) -> None:
    """Find this block's sweep and warpgroup, and go."""
    inputs, refs = refs[:num_inputs], refs[num_inputs:]
    outputs, scratch = refs[:num_outputs], refs[num_outputs:]
    buffers, barriers = scratch[:6], scratch[6:]
    role, sweep_id, batch_head, segment, split = (
        lax.axis_index(name) for name in ("role", "sweep", "batch_head", "segment", "split")
    )
    batch = lax.div(batch_head, jnp.int32(launch.heads))
    head = lax.rem(batch_head, jnp.int32(launch.heads))
    extra = inputs[num_arrays + 1 :]
    number = len(launch.sweeps)
    seeds, tracked = (extra[:number], extra[number:]) if launch.seeded else ((), extra)
    made = 0
    for i, sweep in enumerate(launch.sweeps):
        block = _Block(batch, head, batch_head, segment, split, launch, sweep)
        own = _Refs(
            inputs[:num_arrays],
            inputs[num_arrays],
            seeds[i] if seeds else None,
            tracked[2 * i] if tracked else None,
            tracked[2 * i + 1] if tracked else None,
            outputs[made : made + len(sweep.outputs)],
            outputs[num_outputs - number + i] if launch.final else None,
            *buffers,
            *barriers[5 * i : 5 * i + 5],
        )
        made += len(sweep.outputs)
        _start(block, own, role, None if number == 1 else sweep_id == i)


def _start(block: _Block, refs: _Refs, role, mine) -> None:
    """Hand each warpgroup its role, with the registers it needs."""
    work = {STATE: _state, OUTPUT: _output, MEMORY: _memory}
    for which, function in work.items():
        part = 0
        if which == OUTPUT and not block.sweep.outputs:
            if block.launch.state_parts == 1:
                continue
            part, function = 1, _state
        here = role == which
        if mine is not None:
            here &= mine

        @pl.when(here)
        def _(which=which, function=function, part=part):
            if block.launch.max_outputs:
                action = "decrease" if which == MEMORY else "increase"
                plgpu.set_max_registers(REGISTERS[which], action=action)
            function(dataclasses.replace(block, part=part), refs)
