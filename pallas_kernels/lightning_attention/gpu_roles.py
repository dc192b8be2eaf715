"""What the three warpgroups of a sweep do; `gpu_sweep` says what a sweep is and launches it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

CHUNK = 64
_ROWS = plgpu.Layout.WGMMA.reduce(1)
untyped: Any = plgpu  # parts of its interface that type checkers do not see


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
class Launch:
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
class Refs:
    """What one sweep touches, the buffers shared and the barriers its own."""

    arrays: Sequence[Any]
    slope: Any
    seed: Any
    tokens: Any
    chunks: Any
    starts: Any
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
class Block:
    """Where this block works."""

    batch: Any
    head: Any
    batch_head: Any
    segment: Any
    split: Any
    launch: Launch
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


def _tracked_rows(block: Block, refs: Refs, t, sign: float):
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


def _first_chunk(block: Block, refs: Refs):
    """Where the sweep begins; it always fills its ring."""
    if refs.starts is None:
        return jnp.int32(0)
    latest = max(block.launch.chunks - block.launch.slots, 0)
    return jnp.minimum(refs.starts[block.batch_head, block.segment], latest)


def move_memory(block: Block, refs: Refs) -> None:
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

    first = _first_chunk(block, refs)
    for i in range(min(launch.slots, launch.chunks)):
        load(first + i, _slot(first + i, launch.slots))

    @pl.loop(first, launch.chunks - launch.slots)
    def _(t):
        slot = _slot(t, launch.slots)
        plgpu.barrier_wait(refs.consumed.at[slot])
        load(t + launch.slots, slot)


def advance_state(block: Block, refs: Refs) -> None:
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
        plain, tokens, limit = _unpack_chunk(code[0] if launch.tracked else jnp.int32(0))
        if launch.tracked:
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

        state = _add_products(state, refs.keys.at[slot], _scaled(block, refs, slot))
        state = state * jnp.where(t == launch.chunks - 1, 1.0, decay)
        plgpu.barrier_arrive(refs.consumed.at[slot])
        return state, plain_rows, *following

    first = _first_chunk(block, refs)
    codes = [_chunk_code(block, refs, first)] if launch.tracked else []
    carry = (start, _plain_scale(slope, sweep, 1.0), *codes)
    end = lax.fori_loop(first, launch.chunks, body, carry)[0]
    if launch.final:
        _store_state(block, refs, end)


def _add_products(state, keys, values: list[Any]):
    """The state plus keys^T (sum of values); jax's interpreter has no product added to a sum."""

    def add(accumulator):
        for some in values:
            plgpu.wgmma(accumulator, keys.transpose((1, 0)), some)

    return pl.run_state(add)(untyped.ACC.init(state))


def _chunk_code(block: Block, refs: Refs, t):
    """The code of the t-th chunk (of the last one beyond the end); fetched a chunk ahead."""
    return refs.chunks[block.batch, block.chunk(jnp.minimum(t, block.launch.chunks - 1))]


def _unpack_chunk(code):
    """(plain, real tokens, limit) of `pack_chunk`; the limit of a plain chunk is -1."""
    return code == 0, ((code >> 8) & 255).astype(jnp.float32), (code & 255) - 1


def _scaled(block: Block, refs: Refs, slot) -> list[Any]:
    """The buffers whose sum is the scaled values, this warpgroup's columns of them."""
    buffers = [refs.values.at[slot], *refs.rest]
    if block.launch.state_parts == 1:
        return buffers
    return [buffer.at[:, block.state_columns] for buffer in buffers]


def _scale(block: Block, refs: Refs, slot, rows) -> None:
    """Scale the values of a chunk in their slot: nobody needs the raw ones."""
    values, *rests = _scaled(block, refs, slot)
    scaled = plgpu.load(values, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    scaled = scaled * _over_columns(rows, scaled.shape[1])
    rounded = scaled.astype(jnp.bfloat16)
    values[...] = rounded
    for rest in rests:
        rest[...] = (scaled - rounded.astype(jnp.float32)).astype(jnp.bfloat16)


def _publish(block: Block, refs: Refs, t, state) -> None:
    """Hand the outputs the state before this chunk, and with it the scaled values."""
    slots = block.launch.state_slots
    slot = _slot(t, slots)

    @pl.when(t >= slots)
    def _():
        plgpu.barrier_wait(refs.free.at[slot])

    refs.state.at[slot][...] = state.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.published.at[slot])


def _keep_last_sample(block: Block, refs: Refs, slot, limit) -> None:
    """A border in the chunk: only rows of the sample that goes on may enter the state."""
    buffers = _scaled(block, refs, slot)
    row = plgpu.broadcasted_iota(jnp.int32, buffers[0].shape, 0, layout=plgpu.Layout.WGMMA)
    order = (CHUNK - 1 - row) if block.sweep.reverse else row
    for ref in buffers:
        kept = plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        ref[...] = jnp.where(order >= limit, kept, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def _store_state(block: Block, refs: Refs, state) -> None:
    launch, columns = block.launch, (block.key_columns, block.value_columns)
    if not block.sweep.outputs:
        whole = refs.final.at[(block.batch_head, block.segment)]
        target = whole if launch.state_parts == 1 else whole.at[:, block.state_columns]
        target[...] = state
        return

    @pl.when(block.segment == (0 if block.sweep.reverse else launch.segments - 1))
    def _():
        refs.final.at[(block.batch_head, *columns)][...] = state


def make_outputs(block: Block, refs: Refs) -> None:
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


def _one_output(block: Block, refs: Refs, t, number: int, rows, limit) -> None:
    """One output of one chunk; `limit` is given for a chunk with borders or padding."""
    launch, sweep = block.launch, block.sweep
    first, last = number == 0, number == len(sweep.outputs) - 1
    slot, state_slot = _slot(t, launch.slots), _slot(t, launch.state_slots)

    def await_state():
        if first:
            plgpu.barrier_wait(refs.published.at[state_slot])

    if first:
        plgpu.barrier_wait(refs.loaded.at[slot])
    operands = _operands(block, refs, number, slot, state_slot)
    visible = functools.partial(_visible, reverse=sweep.reverse, limit=limit)
    if limit is not None:
        await_state()
        out = _broken_chunk(operands, visible, limit, launch.columns)
        if last:
            plgpu.barrier_arrive(refs.done)
    elif launch.overlap:
        await_state()
        out = _overlapped_chunk(operands, visible, launch.columns)
    else:
        out = _chunk(operands, visible, launch.columns, await_state)
    if last:
        plgpu.barrier_arrive(refs.free.at[state_slot])
        plgpu.barrier_arrive(refs.consumed.at[slot])
    out = out * _over_columns(rows, launch.columns)
    plgpu.wait_smem_to_gmem(len(sweep.outputs) - 1, wait_read_only=True)
    staged = refs.staged.at[number]
    staged[...] = out.astype(jnp.bfloat16)
    plgpu.commit_smem()
    target = refs.outputs[number].at[block.batch, block.rows(t), block.head, block.output_columns]
    plgpu.copy_smem_to_gmem(staged, target)


@dataclass(frozen=True)
class _Operands:
    """The buffers of one output: reads against `against`, weighting `weighted`, and the state."""

    reads: Any
    against: Any
    weighted: Any
    state: Any
    transposed: bool


def _operands(block: Block, refs: Refs, number: int, slot, state_slot) -> _Operands:
    keys, values, state = refs.keys.at[slot], refs.values.at[slot], refs.state.at[state_slot]
    reads = refs.reads[number].at[slot]
    if block.sweep.outputs[number].transposed:
        return _Operands(reads, values, keys, state.transpose((1, 0)), True)
    return _Operands(reads, keys, values, state, False)


def _visible(scores, *, reverse: bool, limit):
    """Scores in bf16, zero where a row may not see a column."""
    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=plgpu.Layout.WGMMA)
    column = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=plgpu.Layout.WGMMA)
    keep = (row <= column) if reverse else (row >= column)
    if limit is not None:
        order = (CHUNK - 1 - column) if reverse else column
        keep &= order >= _over_columns(limit, CHUNK)
    return jnp.where(keep, scores, 0.0).astype(jnp.bfloat16)


def _accumulator(columns: int):
    return untyped.ACC((CHUNK, columns), jnp.float32)


def _scores(operands: _Operands) -> Any:
    def product(accumulator):
        plgpu.wgmma(accumulator, operands.reads, operands.against.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(product, _accumulator(CHUNK))


def _chunk(operands: _Operands, visible, columns: int, await_state) -> Any:
    """Scores first: those of keys need neither the state nor the scaled values."""
    if operands.transposed:
        await_state()
    weights = visible(_scores(operands))
    if not operands.transposed:
        await_state()

    def product(accumulator):
        plgpu.wgmma(accumulator, operands.reads, operands.state)
        plgpu.wgmma(accumulator, weights, operands.weighted)
        return accumulator[...]

    return pl.run_scoped(product, _accumulator(columns))


def _overlapped_chunk(operands: _Operands, visible, columns: int) -> Any:
    """Mask the scores while the product with the state still runs."""

    def product(scores, accumulator):
        plgpu.wgmma(scores, operands.reads, operands.against.transpose((1, 0)))
        plgpu.wgmma(accumulator, operands.reads, operands.state)
        weights = visible(untyped.wgmma_accumulator_load(scores, wait_n=1))
        plgpu.wgmma(accumulator, weights, operands.weighted)
        return accumulator[...]

    return pl.run_scoped(product, _accumulator(CHUNK), _accumulator(columns))


def _broken_chunk(operands: _Operands, visible, limit, columns: int) -> Any:
    """Rows behind a border drop the state."""
    weights = visible(_scores(operands))

    def carried(accumulator):
        plgpu.wgmma(accumulator, operands.reads, operands.state)
        return accumulator[...]

    out: Any = pl.run_scoped(carried, _accumulator(columns))
    out = out * _over_columns(jnp.where(limit < 0, 1.0, 0.0), columns)

    def add(accumulator):
        plgpu.wgmma(accumulator, weights, operands.weighted)

    return pl.run_state(add)(untyped.ACC.init(out))
