"""The grouped matmul on Hopper GPUs: persistent, warp-specialised Mosaic GPU kernels.

One CTA a multiprocessor walks over output tiles. Its third warpgroup only loads: it fills a ring
of shared-memory slots and runs ahead of the arithmetic, across tiles, so that the tensor cores
find the next tile's operands ready when they come back from storing a result. The first two
warpgroups multiply: each owns half of the tile's rows and hands a slot back one product late, so
that a product is always queued behind the running one.

    forward   out[m] = x[m] w[g]            tiles of rows of one group x columns
    grad_x    grad_x[m] = grad[m] w[g]^T    the same kernel, w read transposed by the tensor core
    grad_w    grad_w[g] = x_g^T grad_g      one tile of w[g] at a time, summed over the group's rows

Tiles follow the groups and not a grid of their own: they start at the multiple of 8 (what a tiled
TMA copy can address) at or before their group's first row, and the last one is moved back to end
with the group; where two tiles of a group overlap they write the same values. So a group of `s`
rows takes about ceil(s / tile) tiles, and only the blocks of 64 rows that a group begins or ends in
need more: in the first two products a store of some rows, in grad_w zeros in the foreign rows.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import platform

MULTIPLIERS = 2  # warpgroups that multiply; one more loads
LOADER_REGISTERS = 40
MULTIPLIER_REGISTERS = 232
SHARED_MEMORY = 227 * 1024
SWIZZLE = 128  # bytes; the widest, and what one slot's rows of 64 bf16 fill exactly
CHUNK = 64  # rows, and columns, of a result staged in shared memory at a time
STAGED = 2  # such chunks a warpgroup
# One shape for all views of the staging memory, so that the warpgroups' parts lie apart in each.
STAGING = (MULTIPLIERS, STAGED, CHUNK, CHUNK)
ROW_ALIGNMENT = 8  # rows at which a swizzled TMA copy can begin
SIZE_ALIGNMENT = 128  # of the sizes of a matrix: no tile may reach past its edge, see `_fitted`


@dataclass(frozen=True)
class Config:
    """How one product is tiled.

    Attributes:
      rows, columns: the output tile of a CTA; each multiplying warpgroup takes half of the rows.
      depth: contracted elements a slot.
      slots: depth of the ring.
      band: row tiles walked through before moving on to the next column tile, so that the CTAs
        at work at one time share both operands through the L2 cache.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    slots: int = 4
    band: int = 16

    def __post_init__(self):
        if self.rows % (64 * MULTIPLIERS) or self.columns % CHUNK or self.depth % 64:
            raise ValueError(f"{self}: rows are multiples of 128, columns and depth of 64")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"{self}: needs {self.shared_memory} bytes of shared memory of {SHARED_MEMORY}"
            )

    @property
    def shared_memory(self) -> int:
        ring = self.slots * self.depth * (self.rows + self.columns)
        return 2 * (ring + MULTIPLIERS * STAGED * CHUNK * CHUNK) + 1024


DEFAULT = Config()


def unsupported(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], group_sizes: Int[Array, "G"]
) -> str | None:
    """Why `grouped_matmul` cannot take these arguments here, or None."""
    del group_sizes
    return platform.other_than_hopper() or unsupported_arguments(x, w)


def unsupported_arguments(x: Float[Array, "M K"], w: Float[Array, "G K N"]) -> str | None:
    """The part of `unsupported` that does not depend on the machine."""
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"dtypes {x.dtype} and {w.dtype}: both must be bfloat16"
    if 0 in x.shape or 0 in w.shape:
        return f"empty operands, of shapes {x.shape} and {w.shape}"
    if w.shape[1] % SIZE_ALIGNMENT or w.shape[2] % SIZE_ALIGNMENT:
        return f"w of shape {w.shape}: the last two sizes must be multiples of {SIZE_ALIGNMENT}"
    return None


def _fitted(config: Config, columns: int) -> Config:
    """`config` with the widest tile, no wider than its own, that divides the columns.

    Mosaic GPU drops the index of an axis of one swizzle tile, so a copy past the edge of a narrow
    matrix would land on its first columns.
    """
    widths = (w for w in range(config.columns, 0, -CHUNK) if columns % w == 0)
    return dataclasses.replace(config, columns=next(widths))


# ---------------------------------------------------------------- the differentiable function


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    _config: Config = DEFAULT,
) -> Float[Array, "M N"]:
    """`pallas_kernels.grouped_matmul` in bf16; `_config` is there for benchmarks."""
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % ROW_ALIGNMENT), (0, 0)))
    out: jax.Array = _grouped_matmul(_config, x, w, group_sizes)
    return out[:rows]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(config, x, w, group_sizes):
    return rows_times_matrices(x, w, group_sizes, config=config)


def _forward(config, x, w, group_sizes):
    return _grouped_matmul(config, x, w, group_sizes), (x, w, group_sizes)


def _backward(config, residuals, grad):
    x, w, group_sizes = residuals
    grad_x = rows_times_matrices(grad, w, group_sizes, config=config, transposed=True)
    return grad_x, rows_times_rows(x, grad, group_sizes, config=config), None


_grouped_matmul.defvjp(_forward, _backward)


# ---------------------------------------------------------------- the walk over tiles


class _Tile(NamedTuple):
    """One tile of a CTA; traced scalars.

    Attributes:
      steps: slots it consumes.
      place: what the product's own functions need to know.
      clean: the first step and the end of the steps that need no rows cleared.
    """

    steps: Any
    place: Any
    clean: Any = None


class _Product(NamedTuple):
    """What distinguishes one product from another inside the kernel.

    Attributes:
      tiles: how many there are.
      tile: tile index -> _Tile.
      load: (tile, step, slot) -> None, starts the copies into a slot.
      clear: (tile, step, slot, warpgroup) -> None, zeroes rows of other groups in a slot; or None.
      multiply: (acc, slot, warpgroup) -> None, starts acc += a @ b.
      store: (tile, result, warpgroup) -> None, writes a warpgroup's half of the tile.
    """

    tiles: Any
    tile: Callable
    load: Callable
    clear: Callable | None
    multiply: Callable
    store: Callable


def _walk(config: Config, product: _Product, loaded, consumed):
    """The body of a CTA."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        _load_tiles(config, product, loaded, consumed)

    @pl.when(warpgroup < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
        _multiply_tiles(config, product, loaded, consumed, warpgroup)


def _load_tiles(config: Config, product: _Product, loaded, consumed):
    @plgpu.nd_loop((product.tiles,), collective_axes="cta", init_carry=jnp.int32(0))
    def _tiles(loop, carry):
        tile = product.tile(loop.index[0])

        def step(i, used):
            slot = lax.rem(used, jnp.int32(config.slots))
            plgpu.barrier_wait(consumed.at[slot])
            product.load(tile, i, slot)
            return used + 1

        return lax.fori_loop(0, tile.steps, step, carry)

    for slot in range(config.slots):  # leave no phase of a barrier unobserved
        plgpu.barrier_wait(consumed.at[slot])


def _multiply_tiles(config: Config, product: _Product, loaded, consumed, warpgroup):
    slots = config.slots
    acc_type = plgpu.WGMMAAccumulatorRef((config.rows // MULTIPLIERS, config.columns), jnp.float32)
    for slot in range(slots):  # the ring starts empty
        plgpu.barrier_arrive(consumed.at[slot])

    @plgpu.nd_loop((product.tiles,), collective_axes="cta", init_carry=jnp.int32(0))
    def _tiles(loop, carry):
        tile = product.tile(loop.index[0])

        def accumulate(acc):
            def step(i, used, *, clear=None):
                slot = lax.rem(used, jnp.int32(slots))
                plgpu.barrier_wait(loaded.at[slot])
                if clear is not None:
                    plgpu.wgmma_wait(0)
                    clear(tile, i, slot, warpgroup)
                product.multiply(acc, slot, warpgroup)
                plgpu.wgmma_wait(1)  # the product before this one

                @pl.when(i > 0)
                def _hand_back():
                    plgpu.barrier_arrive(consumed.at[_before(slot, slots)])

                return used + 1

            if product.clear is None:
                used = lax.fori_loop(0, tile.steps, step, carry)
            else:
                dirty = partial(step, clear=product.clear)
                first, end = tile.clean
                used = lax.fori_loop(0, first, dirty, carry)
                used = lax.fori_loop(first, end, step, used)
                used = lax.fori_loop(end, tile.steps, dirty, used)
            result = acc[...].astype(jnp.bfloat16)  # waits for the last product

            @pl.when(tile.steps > 0)
            def _hand_back_last():
                slot = lax.rem(used, jnp.int32(slots))
                plgpu.barrier_arrive(consumed.at[_before(slot, slots)])

            return result, used

        result, used = pl.run_scoped(accumulate, acc_type)
        product.store(tile, result, warpgroup)
        return used

    plgpu.wait_smem_to_gmem(0)


def _before(slot, slots):
    return lax.select(slot == 0, jnp.int32(slots - 1), slot - 1)


def _swizzled(*shape: int):
    tiling = plgpu.TilingTransform((8, SWIZZLE // 2))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(SWIZZLE))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _launch(config: Config, body, out_type, slot_shapes, *args, scratch=()):
    """Run `body(*args, out, a_ring, b_ring, loaded, consumed, staged, *scratch)` on every CTA."""
    slots = config.slots
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(
            *(_swizzled(slots, *shape) for shape in slot_shapes),
            plgpu.Barrier(num_arrivals=len(slot_shapes), num_barriers=slots),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=slots),
            *scratch,
        ),
        grid=(platform.gpu_cores(),),
        grid_names=("cta",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul",
    )
    return kernel(*args)


def _store_chunk(result, staged, warpgroup, index, row, column, target):
    """Write result[row : row + CHUNK, column : column + CHUNK], its `index`-th chunk."""
    # The chunk staged here before must have left; at a new tile all did long ago.
    plgpu.wait_smem_to_gmem(STAGED - 1 if index else 0, wait_read_only=True)
    buffer = staged.at[warpgroup, index % STAGED]
    buffer[...] = result[row : row + CHUNK, column : column + CHUNK]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)


def _chunks(config: Config):
    """(index, first row, first column) of the chunks of a warpgroup's half of a tile."""
    rows = range(0, config.rows // MULTIPLIERS, CHUNK)
    columns = range(0, config.columns, CHUNK)
    return [(i, *first) for i, first in enumerate(itertools.product(rows, columns))]


# ---------------------------------------------------------------- x[m] w[g]


class _RowTiles(NamedTuple):
    """Row tiles over all groups and, last, over the rows past them (group G); int32 arrays."""

    number: Int[Array, "1"]  # of tiles; the other arrays may be longer
    group: Int[Array, "tiles"]
    first: Int[Array, "tiles"]  # the tile's first row, a multiple of 8
    begin: Int[Array, "tiles"]  # where the group begins
    end: Int[Array, "tiles"]


def _align_down(rows):
    return rows // ROW_ALIGNMENT * ROW_ALIGNMENT


def _row_tiles(group_sizes: Int[Array, "G"], rows: int, tile: int) -> _RowTiles:
    ends = jnp.append(jnp.cumsum(group_sizes.astype(jnp.int32)), jnp.int32(rows))
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    firsts = _align_down(begins)
    counts = jnp.where(ends > begins, -(-(ends - firsts) // tile), 0)
    tile_ends = jnp.cumsum(counts)
    bound = (rows + ends.shape[0] * (tile - 1 + ROW_ALIGNMENT - 1)) // tile
    index = jnp.arange(bound, dtype=jnp.int32)
    # Not searchsorted: on a GPU that is a loop of kernels.
    group = jnp.sum(index[:, None] >= tile_ends[:-1], axis=1, dtype=jnp.int32)
    first = firsts[group] + (index - (tile_ends - counts)[group]) * tile
    last = _align_down(ends + (ROW_ALIGNMENT - 1)) - tile
    first = jnp.maximum(jnp.minimum(first, last[group]), firsts[group])
    return _RowTiles(tile_ends[-1:], group, first, begins[group], ends[group])


# Programs of their own, so that a model with many layers holds and lowers each kernel once.
@partial(jax.jit, static_argnames=("config", "transposed"))
def rows_times_matrices(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    config: Config,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """x[m] @ w[g] for the rows m of group g, 0 past the last group; bf16, summed in fp32.

    transposed: w has shape [G, N, K] and the product is x[m] @ w[g]^T.
    """
    rows, contracted = x.shape
    groups = w.shape[0]
    columns = w.shape[1 if transposed else 2]
    config = _fitted(config, columns)
    steps = -(-contracted // config.depth)
    half = config.rows // MULTIPLIERS
    tiles = _row_tiles(group_sizes, rows, config.rows)

    def body(
        count,
        groups_,
        first,
        begin,
        end,
        x_ref,
        w_ref,
        out,
        x_ring,
        w_ring,
        loaded,
        consumed,
        staging,
    ):
        staged, plain = staging

        def tile(index):
            row_tile, column_tile = plgpu.planar_snake(
                index, (count[0], -(-columns // config.columns)), 0, config.band
            )
            group = groups_[row_tile]
            place = (
                group,
                pl.multiple_of(first[row_tile], ROW_ALIGNMENT),
                begin[row_tile],
                end[row_tile],
                column_tile * config.columns,
            )
            return _Tile(jnp.where(group == groups, 0, steps), place)

        def load(tile, step, slot):
            group, row, _, _, left = tile.place
            depth = pl.ds(step * config.depth, config.depth)
            column = pl.ds(left, config.columns)
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(row, config.rows), depth],
                x_ring.at[slot],
                loaded.at[slot],
            )
            plgpu.copy_gmem_to_smem(
                w_ref.at[group, column, depth] if transposed else w_ref.at[group, depth, column],
                w_ring.at[slot],
                loaded.at[slot],
            )

        def multiply(acc, slot, warpgroup):
            matrix = w_ring.at[slot]
            plgpu.wgmma(
                acc,
                x_ring.at[slot, pl.ds(pl.multiple_of(warpgroup * half, half), half)],
                matrix.transpose((1, 0)) if transposed else matrix,
            )

        def store(tile, result, warpgroup):
            _, top, begin_, end_, left = tile.place
            top = pl.multiple_of(top + warpgroup * half, ROW_ALIGNMENT)

            def store_chunk(index, row, column):
                low = jnp.clip(begin_ - (top + row), 0, CHUNK)
                height = jnp.clip(end_ - (top + row), low, CHUNK) - low
                columns_ = pl.ds(left + column, CHUNK)
                whole = (low == 0) & ((height == CHUNK) | (end_ == rows))  # TMA drops rows past M

                @pl.when(whole)
                def _whole():
                    target = out.at[pl.ds(top + row, CHUNK), columns_]
                    _store_chunk(result, staged, warpgroup, index, row, column, target)

                @pl.when(jnp.logical_not(whole))
                def _some_rows():
                    # A copy has a static height: one for each bit of the number of rows.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    buffer = plain.at[warpgroup, 0]
                    buffer[...] = result[row : row + CHUNK, column : column + CHUNK]
                    plgpu.commit_smem()
                    for bit in reversed(range(int(math.log2(CHUNK)))):
                        skip = lax.shift_left(lax.shift_right_logical(height, bit + 1), bit + 1)

                        @pl.when((height & (1 << bit)) != 0)
                        def _copy(skip=skip, bit=bit):
                            plgpu.copy_smem_to_gmem(
                                buffer.at[pl.ds(low + skip, 1 << bit)],
                                out.at[pl.ds(top + row + low + skip, 1 << bit), columns_],
                            )

                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            for index, row, column in _chunks(config):
                store_chunk(index, row, column)

        count_ = count[0] * -(-columns // config.columns)
        _walk(config, _Product(count_, tile, load, None, multiply, store), loaded, consumed)

    return _launch(
        config,
        body,
        jax.ShapeDtypeStruct((rows, columns), x.dtype),
        (
            (config.rows, config.depth),
            (config.columns, config.depth) if transposed else (config.depth, config.columns),
        ),
        *tiles,
        x,
        w,
        scratch=(
            plgpu.RefUnion(
                _swizzled(*STAGING),
                plgpu.SMEM(STAGING, jnp.bfloat16),
            ),
        ),
    )


# ---------------------------------------------------------------- x_g^T y_g


@partial(jax.jit, static_argnames=("config",))
def rows_times_rows(
    x: Float[Array, "M K"],
    y: Float[Array, "M N"],
    group_sizes: Int[Array, "G"],
    *,
    config: Config,
) -> Float[Array, "G K N"]:
    """Sum over the rows m of group g of x[m]^T y[m], for every group; bf16, summed in fp32."""
    groups = group_sizes.shape[0]
    height, width = x.shape[1], y.shape[1]
    config = _fitted(config, width)
    half = config.rows // MULTIPLIERS
    row_tiles, column_tiles = -(-height // config.rows), -(-width // config.columns)
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)

    def body(
        first, begin, end, x_ref, y_ref, out, x_ring, y_ring, loaded, consumed, staged, cleared
    ):

        def tile(index):
            group = lax.div(index, jnp.int32(row_tiles * column_tiles))
            row_tile, column_tile = plgpu.planar_snake(
                lax.rem(index, jnp.int32(row_tiles * column_tiles)),
                (row_tiles, column_tiles),
                0,
                config.band,
            )
            low, size = begin[group] - first[group], end[group] - first[group]
            dirty_head = ((low > 0) & (size > low)).astype(jnp.int32)
            depth = jnp.int32(config.depth)
            row = row_tile * config.rows
            column = column_tile * config.columns
            return _Tile(
                jnp.where(size > low, lax.div(size + (depth - 1), depth), 0),
                (group, pl.multiple_of(first[group], ROW_ALIGNMENT), low, size, row, column),
                (dirty_head, jnp.maximum(dirty_head, lax.div(size, depth))),
            )

        def load(tile, step, slot):
            _, top, _, _, row, column = tile.place
            depth = pl.ds(pl.multiple_of(top + step * config.depth, ROW_ALIGNMENT), config.depth)
            plgpu.copy_gmem_to_smem(
                x_ref.at[depth, pl.ds(row, config.rows)],
                x_ring.at[slot],
                loaded.at[slot],
            )
            plgpu.copy_gmem_to_smem(
                y_ref.at[depth, pl.ds(column, config.columns)],
                y_ring.at[slot],
                loaded.at[slot],
            )

        def clear(tile, step, slot, warpgroup):
            # Both operands: a foreign row may hold inf, and 0 x inf is no 0.
            _, _, low, size, _, _ = tile.place
            low, high = low - step * config.depth, size - step * config.depth
            panels = [(x_ring, i) for i in range(0, config.rows, 64)]
            panels += [(y_ring, i) for i in range(0, config.columns, 64)]
            for index, (ring, column) in enumerate(panels):

                @pl.when(warpgroup == index % MULTIPLIERS)
                def _clear(ring=ring, column=column):
                    part = ring.at[slot, :, column : column + 64]
                    shape = (config.depth, 64)
                    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                    own = (row >= low) & (row < high)
                    part[...] = jnp.where(own, values, jnp.zeros_like(values))

            plgpu.commit_smem()
            plgpu.barrier_arrive(cleared)
            plgpu.barrier_wait(cleared)

        def multiply(acc, slot, warpgroup):
            columns = pl.ds(pl.multiple_of(warpgroup * half, half), half)
            plgpu.wgmma(acc, x_ring.at[slot, :, columns].transpose((1, 0)), y_ring.at[slot])

        def store(tile, result, warpgroup):
            group, _, _, _, row, column = tile.place
            row += warpgroup * half
            for index, down, right in _chunks(config):
                target = out.at[group, pl.ds(row + down, CHUNK), pl.ds(column + right, CHUNK)]
                _store_chunk(result, staged, warpgroup, index, down, right, target)

        count = jnp.int32(groups * row_tiles * column_tiles)
        _walk(config, _Product(count, tile, load, clear, multiply, store), loaded, consumed)

    return _launch(
        config,
        body,
        jax.ShapeDtypeStruct((groups, height, width), x.dtype),
        ((config.depth, config.rows), (config.depth, config.columns)),
        _align_down(ends - sizes),
        ends - sizes,
        ends,
        x,
        y,
        scratch=(
            _swizzled(*STAGING),
            plgpu.Barrier(num_arrivals=MULTIPLIERS),
        ),
    )
