"""Paged attention of few queries a row on Hopper GPUs: flash decoding in Mosaic GPU.

Decoding reads every key and value once and does little else, so all multiprocessors must read all
the time, whatever the lengths of the rows. The keys of a batch, cut into tiles of 64, are one list
a key head, row after row; every worker (CTA) takes an equal share of it, within a row or across
several. Where a worker ends in a row, or a row ends, it leaves a partial result: the attention to
the keys it has seen, and their log-sum-exp. A second kernel merges the partial results of a row.

A worker is one warpgroup. It copies tiles from the pages to a ring in shared memory by TMA, a few
tiles ahead of the arithmetic and across rows. Keys, and then values, are the 64 rows that a product
on Hopper has at least; its columns are the query heads of a key head, of all queries, 8 or more:

    scores [keys, queries] = K q^T        out^T [K, queries] += V^T weights [keys, queries]

Several workers share a multiprocessor, so that one multiplies while another takes exponentials.

Pages of fp8 (e4m3) are multiplied in fp16, which holds every such number, and one conversion makes
two of them, where bf16 would take three. Keys go from registers into the product; values, which
must be transposed, back to shared memory. Queries are divided by powers of two into fp16's range.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import platform
from pallas_kernels.paged_attention.gpu_merge import LOWEST, merge

TILE = 64  # keys of one product
MAX_QUERIES = 64  # of one product: queries times query heads a key head
QUERY_ALIGNMENT = 8  # of the columns of a product
MIN_SHARE = 2  # tiles of a worker; less is not worth the merging
MAX_DIM = 256
MAX_SLOTS = 8  # of the ring
SHARED_MEMORY = 228 * 1024  # of a multiprocessor; the system keeps 1 KiB of it for each worker
REDUCTION_MEMORY = 2048  # to find the largest score of a tile
RESERVED_MEMORY = 1024 + 512 + REDUCTION_MEMORY  # that, and barriers
# Weights in fp16 are so many times larger, so that many small ones together are not lost.
ENLARGED = 2.0**14
LOG2_E = math.log2(math.e)

untyped: Any = plgpu  # parts of its interface that type checkers do not see
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# Of 8 values a thread: rows of fp8 and rows of fp16 go through shared memory without conflicts.
_EIGHTS = untyped.Layout.TILED(
    untyped.Tiling(((16, 64), (8, 64), (4, 64), (2, 64), (8,))),
    warp_dims=(-9, -5),
    lane_dims=(-3, -7, -2),
    vector_dim=-1,
)


def unsupported(
    q: Float[Array, "B T H K"],
    key_pages: Float[Array, "P S G K"],
    value_pages: Float[Array, "P S G K"],
    page_table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    return_lse: bool = False,
) -> str | None:
    """Why `paged_attention` cannot take these arguments here, or None."""
    del value_pages, page_table, positions, scale
    if return_lse:
        return "return_lse"
    return platform.other_than_hopper() or unsupported_arguments(q, key_pages)


def unsupported_arguments(
    q: Float[Array, "B T H K"], key_pages: Float[Array, "P S G K"]
) -> str | None:
    """The part of `unsupported` that does not depend on the machine."""
    _, length, heads, dim = q.shape
    slots, kv_heads = key_pages.shape[1:3]
    if q.dtype != jnp.bfloat16:
        return f"dtype {q.dtype}: it must be bfloat16"
    if key_pages.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"pages of {key_pages.dtype}: they must be bfloat16 or float8_e4m3fn"
    if 0 in q.shape:
        return f"empty queries, of shape {q.shape}"
    rows = length * heads // kv_heads
    if rows > MAX_QUERIES:
        return (
            f"{length} queries of {heads // kv_heads} heads a key head: at most {MAX_QUERIES} "
            "together"
        )
    if dim % 64 or dim > MAX_DIM:
        return f"head size {dim}: it must be a multiple of 64 and at most {MAX_DIM}"
    if slots % TILE and slots not in (16, 32):
        return f"pages of {slots} slots: they must be 16, 32 or a multiple of {TILE}"
    return None


# ---------------------------------------------------------------- who reads what


class _Plan(NamedTuple):
    """The shares of the workers and the places of the rows, computed from the positions.

    Tiles are counted along the list of all rows' tiles.

    Attributes:
      work: a worker's first tile, how many it has, and the row of the first.
      rows: a row's first tile, the tile past its last, its last key, the next row that has tiles,
        its first worker, how many workers it has, and the last key that all its queries see.
    """

    work: Int[Array, "W 3"]
    rows: Int[Array, "B 7"]


def _plan(positions: Int[Array, "B T"], workers: int) -> _Plan:
    """Shares of the rows whose queries see keys up to these (-1: none)."""
    reach = jnp.max(positions, axis=1)
    # Comparisons and sums of B x B: on a GPU fused reductions, where a scan is many kernels.
    index = jnp.arange(reach.shape[0], dtype=jnp.int32)
    tiles = (reach + TILE) // TILE
    ends = jnp.sum(jnp.where(index[:, None] >= index, tiles, 0), axis=1, dtype=jnp.int32)
    begins = ends - tiles
    share = jnp.maximum(-(-ends[-1] // workers), MIN_SHARE)
    later = (index > index[:, None]) & (tiles > 0)
    following = jnp.min(jnp.where(later, index, index[-1]), axis=1)
    first_worker = begins // share
    number = jnp.where(tiles > 0, (ends - 1) // share - first_worker + 1, 0)
    starts = jnp.arange(workers, dtype=jnp.int32) * share
    counts = jnp.clip(ends[-1] - starts, 0, share)
    first_row = jnp.sum(ends <= starts[:, None], axis=1, dtype=jnp.int32)
    return _Plan(
        jnp.stack([starts, counts, jnp.minimum(first_row, index[-1])], axis=1),
        jnp.stack(
            [begins, ends, reach, following, first_worker, number, jnp.min(positions, axis=1)],
            axis=1,
        ),
    )


@dataclass(frozen=True)
class _Shape:
    """The static shape of a launch."""

    batch: int
    kv_heads: int
    dim: int
    queries: int  # of a product, padded to what it can have
    pages: int
    page_slots: int
    scale: float
    narrow: bool = False  # pages of fp8

    @property
    def workers_a_core(self) -> int:
        """As many as are fastest (measured, benchmarks/results/paged_attention_h200.json)."""
        if self.dim > 128:
            return 1
        return 3 if self.narrow else 2

    @property
    def workers(self) -> int:
        """For each key head."""
        return max(1, self.workers_a_core * platform.gpu_cores() // self.kv_heads)

    @property
    def slots(self) -> int:
        """Tiles of keys, and of values, in the ring."""
        memory = SHARED_MEMORY // self.workers_a_core - RESERVED_MEMORY
        memory -= 2 * self.queries * (self.dim + TILE)
        memory -= 2 * self.dim * TILE if self.narrow else 0
        return min(memory // (self.dim * 2 * TILE * (1 if self.narrow else 2)), MAX_SLOTS)

    @property
    def copies(self) -> int:
        """Copies, of a page or a part of it, a tile."""
        return max(1, TILE // self.page_slots)


# ---------------------------------------------------------------- the function


def paged_attention(
    q: Float[Array, "B T H K"],
    key_pages: Float[Array, "P S G K"],
    value_pages: Float[Array, "P S G K"],
    page_table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    """`pallas_kernels.paged_attention` of few queries, in bf16."""
    batch, length, heads, dim = q.shape
    pages, slots, kv_heads, _ = key_pages.shape
    repeats = heads // kv_heads
    rows = length * repeats
    padded = -(-rows // QUERY_ALIGNMENT) * QUERY_ALIGNMENT
    narrow = key_pages.dtype != q.dtype
    shape = _Shape(batch, kv_heads, dim, padded, pages, slots, scale, narrow)
    positions = jnp.clip(positions, -1, page_table.shape[1] * slots - 1)
    plan = _plan(positions, shape.workers)
    grouped = jnp.moveaxis(q.reshape(batch, length, kv_heads, repeats, dim), 2, 1)
    grouped = grouped.reshape(batch, kv_heads, rows, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    limits = jnp.pad(
        jnp.repeat(positions, repeats, axis=1), ((0, 0), (0, padded - rows)), constant_values=-1
    )
    factors = None
    if narrow:
        grouped, factors = _in_fp16(grouped)
    arrays = (limits, factors, grouped, key_pages, value_pages)
    parts, weights = _attend(shape, plan, page_table, *arrays)
    out = merge(plan.rows, parts, weights)[:, :, :rows]
    out = out.reshape(batch, kv_heads, length, repeats, dim)
    return jnp.moveaxis(out, 1, 2).reshape(q.shape)


def _in_fp16(
    q: Float[Array, "B G M K"],
) -> tuple[Float[Array, "B G M K"], Float[Array, "B G M"]]:
    """Queries divided by powers of two, and those; what fp16 then loses is 2^-25 of the largest."""
    _, exponents = jnp.frexp(jnp.max(jnp.abs(q.astype(jnp.float32)), axis=3))
    scaled = jnp.ldexp(q.astype(jnp.float32), -exponents[..., None]).astype(jnp.float16)
    return scaled, jnp.ldexp(jnp.ones(exponents.shape, jnp.float32), exponents)


# ---------------------------------------------------------------- partial results


class _Refs(NamedTuple):
    """In the order of a launch; of pages in bf16 without `factors` and `wide_values`."""

    work: Any
    rows: Any
    table: Any
    limits: Any
    factors: Any
    q: Any
    keys: Any
    values: Any
    parts: Any
    sums: Any
    queries: Any
    key_ring: Any
    value_ring: Any
    weights: Any
    wide_values: Any
    queries_loaded: Any
    keys_loaded: Any
    values_loaded: Any


_OF_NARROW = ("factors", "wide_values")


# A program of its own, so that a model with many layers holds and lowers the kernel once.
@functools.partial(jax.jit, static_argnums=0)
def _attend(shape: _Shape, plan: _Plan, table, limits, factors, q, keys, values):
    """Partial results and their log-sum-exps, base 2.

    The worker w that reads of row b leaves [K, queries] and [queries] at place b + w of its key
    head: going along the list, either grows whenever a new partial result begins.
    """
    places = shape.batch + shape.workers - 1
    absent = {} if shape.narrow else dict.fromkeys(_OF_NARROW)
    names = [name for name in _Refs._fields if name not in absent]

    def buffer(*dims: int, dtype: Any = q.dtype):
        size = jnp.dtype(dtype).itemsize
        swizzle = 128 if dims[-1] * size % 128 == 0 else 64  # bytes
        tiling = untyped.TilingTransform((8, swizzle // size))
        transforms = (tiling, untyped.SwizzleTransform(swizzle))
        return plgpu.SMEM(dims, dtype, transforms=transforms)

    tiles_loaded = plgpu.Barrier(num_arrivals=shape.copies, num_barriers=shape.slots)
    kernel = plgpu.kernel(
        lambda *refs: _work(shape, _Refs(**absent | dict(zip(names, refs, strict=True)))),
        out_type=[
            jax.ShapeDtypeStruct((shape.kv_heads, places, shape.dim, shape.queries), jnp.float32),
            jax.ShapeDtypeStruct((shape.kv_heads, places, shape.queries), jnp.float32),
        ],
        scratch_types=[
            buffer(shape.queries, shape.dim),
            buffer(shape.slots, TILE, shape.dim, dtype=keys.dtype),
            buffer(shape.slots, TILE, shape.dim, dtype=keys.dtype),
            buffer(shape.queries, TILE),
            *([buffer(TILE, shape.dim)] if shape.narrow else []),
            plgpu.Barrier(),
            tiles_loaded,
            tiles_loaded,
        ],
        grid=(shape.workers, shape.kv_heads),
        grid_names=("worker", "head"),
        kernel_name="paged_attention",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=REDUCTION_MEMORY
        ),
    )
    scales = [factors] if shape.narrow else []
    return kernel(plan.work, plan.rows, table, limits, *scales, q, keys, values)


@dataclass(frozen=True)
class _Share:
    """What one worker does: `count` tiles, counted from its first, `begin` in the list of all."""

    shape: _Shape
    refs: _Refs
    head: Any
    worker: Any
    begin: Any
    count: Any


class _Row(NamedTuple):
    """A row of the batch: its first tile, the tile past its last, its last key, the next row.

    `seen` is the last key that all queries see.
    """

    number: Any
    begin: Any
    end: Any
    last: Any
    following: Any
    seen: Any


class _Place(NamedTuple):
    """Where a tile lies: its row, the pages it is in and its first slot there."""

    row: _Row
    pages: tuple[Any, ...]
    slot: Any


def _work(shape: _Shape, refs: _Refs) -> None:
    """The body of a worker: row after row, as far as its share goes."""
    head, worker = lax.axis_index("head"), lax.axis_index("worker")
    share = _Share(shape, refs, head, worker, refs.work[worker, 0], refs.work[worker, 1])

    def fill(index, place):
        _load(share, place, index, "key")
        _load(share, place, index, "value")
        return _next(share, place, index)

    first_row = _row(share, refs.work[worker, 2])
    ahead = lax.fori_loop(0, shape.slots, fill, _locate(share, first_row, jnp.int32(0)))

    def row_after_row(carry):
        index, row, ahead = carry
        queries = _begin(share, row)
        start = (
            _full((shape.queries,), LOWEST, _COLUMNS),
            _full((TILE, shape.queries), 0.0, plgpu.Layout.WGMMA),
            _full((shape.dim, shape.queries), 0.0, plgpu.Layout.WGMMA),
            ahead,
        )
        end = jnp.minimum(row.end, share.count)
        step = functools.partial(_step, share, row, queries)
        top, total, acc, ahead = lax.fori_loop(index, end, step, start)
        _finish(share, row, top, total, acc)
        return end, _row(share, row.following), ahead

    start = (jnp.int32(0), first_row, ahead)
    lax.while_loop(lambda carry: carry[0] < share.count, row_after_row, start)


def _full(shape: tuple[int, ...], value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _row(share: _Share, number) -> _Row:
    begin, end, last, following, seen = (share.refs.rows[number, i] for i in (0, 1, 2, 3, 6))
    return _Row(number, begin - share.begin, end - share.begin, last, following, seen)


def _locate(share: _Share, row: _Row, index) -> _Place:
    """Find a tile of a row; what lies past its last key may be of any page."""
    shape, table = share.shape, share.refs.table
    slots = jnp.int32(shape.page_slots)
    key = (index - row.begin) * TILE
    numbers = [
        jnp.minimum(lax.div(key, slots) + i, table.shape[1] - 1) for i in range(shape.copies)
    ]
    pages = tuple(jnp.clip(table[row.number, n], 0, shape.pages - 1) for n in numbers)
    return _Place(row, pages, lax.rem(key, slots))


def _next(share: _Share, place: _Place, index) -> _Place:
    """Where the tile after `index` lies. Asked for early: the answer is in global memory."""
    row = place.row
    row = lax.cond(index + 1 < row.end, lambda: row, lambda: _row(share, row.following))
    return _locate(share, row, index + 1)


def _load(share: _Share, place: _Place, index, what: Literal["key", "value"]) -> None:
    """Start the copies of a tile into its slot of the ring, if the share has that tile."""
    shape, refs = share.shape, share.refs
    source, ring, loaded = {
        "key": (refs.keys, refs.key_ring, refs.keys_loaded),
        "value": (refs.values, refs.value_ring, refs.values_loaded),
    }[what]
    slot = lax.rem(index, jnp.int32(shape.slots))
    size = min(TILE, shape.page_slots)
    first = pl.multiple_of(place.slot, size)

    @pl.when(index < share.count)
    def _():
        for i, page in enumerate(place.pages):
            plgpu.copy_gmem_to_smem(
                source.at[page, pl.ds(first, size), share.head],
                ring.at[slot, pl.ds(i * size, size)],
                loaded.at[slot],
            )


def _begin(share: _Share, row: _Row):
    """Fetch a row's queries; the last key that each of them sees, and its factor."""
    refs = share.refs
    plgpu.copy_gmem_to_smem(refs.q.at[row.number, share.head], refs.queries, refs.queries_loaded)
    limits = plgpu.load(refs.limits.at[row.number], layout=_COLUMNS, optimized=False)
    factors = None
    if share.shape.narrow:
        place = refs.factors.at[row.number, share.head]
        factors = plgpu.load(place, layout=_COLUMNS, optimized=False)
        factors = factors * (share.shape.scale * LOG2_E)
    plgpu.barrier_wait(refs.queries_loaded)
    return limits, factors


def _over_rows(columns, rows: int):
    return lax.broadcast_in_dim(columns, (rows, *columns.shape), [1])


def _step(share: _Share, row: _Row, queries, index, carry):
    """Attend to one tile; its slots in the ring are filled again as soon as they are read."""
    shape, refs = share.shape, share.refs
    limits, factors = queries
    top, total, acc, ahead = carry
    slot = lax.rem(index, jnp.int32(shape.slots))
    first = (index - row.begin) * TILE  # key of the tile

    plgpu.barrier_wait(refs.keys_loaded.at[slot])
    scores = _scores(shape, refs.key_ring.at[slot], refs.queries)

    def visible(scores):
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
        return jnp.where(key <= _over_rows(limits - first, TILE), scores, -jnp.inf)

    if factors is None:
        scores = scores * (shape.scale * LOG2_E)
    else:
        scores = scores * _over_rows(factors, TILE)
    # Copies do not hide the work, of which this is some: most tiles are seen whole.
    scores = lax.cond(first + TILE <= row.seen + 1, lambda x: x, visible, scores)
    new_top = jnp.maximum(top, jnp.max(scores, axis=0))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - _over_rows(new_top, TILE))
    total = total * _over_rows(shrink, TILE) + weights
    acc = acc * _over_rows(shrink, shape.dim)
    if shape.narrow:
        weights = weights * ENLARGED
    weights = plgpu.layout_cast(weights.astype(refs.weights.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    refs.weights.transpose((1, 0))[...] = weights

    plgpu.barrier_wait(refs.values_loaded.at[slot])
    values = refs.value_ring.at[slot]
    if shape.narrow:
        refs.wide_values[...] = _widened(values, _EIGHTS)
        values = refs.wide_values
    last = row.last - first
    pl.when(last < TILE - 1)(lambda: _clear(values, last))
    plgpu.commit_smem()
    _load(share, ahead, index + shape.slots, "key")
    acc = acc + _product(values.transpose((1, 0)), refs.weights.transpose((1, 0)))
    _load(share, ahead, index + shape.slots, "value")
    return new_top, total, acc, _next(share, ahead, index + shape.slots)


def _widened(tile, layout):
    """A tile of fp8 in fp16, in this layout if the tile is so swizzled that it can be."""
    if tile.shape[1] % 128:
        tile = plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
    else:
        tile = plgpu.load(tile, layout=layout)
    return tile.astype(jnp.float16)


def _scores(shape: _Shape, keys, queries):
    """The products of all keys of a tile with all queries, in fp32."""
    if shape.narrow:
        keys = _widened(keys, plgpu.Layout.WGMMA_UPCAST_2X)
        keys = plgpu.layout_cast(keys, plgpu.Layout.WGMMA)
    return _product(keys, queries.transpose((1, 0)))


def _product(left, right):
    """In fp32; jax's interpreter has none whose left operand is in registers."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    accumulator = untyped.ACC((left.shape[0], right.shape[1]), jnp.float32)
    product: Any = pl.run_scoped(multiply, accumulator)
    return product


def _clear(values, last) -> None:
    """Zeroes for what lies past a row's last key: zero weight does not hide NaN."""
    kept = plgpu.load(values, layout=plgpu.Layout.WGMMA)
    key = plgpu.broadcasted_iota(jnp.int32, kept.shape, 0, layout=plgpu.Layout.WGMMA)
    values[...] = jnp.where(key <= last, kept, jnp.zeros_like(kept))


def _finish(share: _Share, row: _Row, top, total, acc) -> None:
    """Leave the partial result of a row."""
    refs = share.refs
    place = (share.head, row.number + share.worker)
    total = jnp.sum(total, axis=0)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    divisor = total * ENLARGED if share.shape.narrow else total
    refs.parts.at[place][...] = acc / _over_rows(divisor, share.shape.dim)
    refs.sums.at[place][...] = jnp.where(seen, top + jnp.log(total) * LOG2_E, LOWEST)
