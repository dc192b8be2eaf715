"""The product of few rows with large matrices on Hopper GPUs, as fast as these can be read.

At most 64 rows are one row block of a tensor core product, however few they are. What takes time is
to read the matrices, so all multiprocessors must read from the first moment on: a worker (CTA) has
64 columns and, where those are too few to go round, a share of the contracted elements. Shares are
added up by the caller, in fp32, which XLA does in whatever it does next.

A worker is one warpgroup. It copies tiles of the matrix and of the rows to a ring in shared memory
by TMA, a few tiles ahead of the arithmetic. Two workers share a multiprocessor. Tiles of int8 go
through registers to a second place in shared memory, as bf16, which they are exactly.

`weighted_products` is the same with a sum over several matrices, of which each has rows of its own:
the second half of the expert mixture.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import platform

ROWS = 64  # of one product
COLUMNS = 64  # of a worker
DEPTH = 64  # contracted elements of a tile
ROW_ALIGNMENT = 8  # rows that a tiled TMA copy can address
WORKERS = 2  # of a multiprocessor
SLOTS = 5  # of the ring, of two tiles

untyped: Any = plgpu  # parts of its interface that type checkers do not see
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def unsupported(
    x: Float[Array, "N D"], *matrices: Float[Array, "D O"] | Int[Array, "D O"]
) -> str | None:
    """Why `skinny_matmul` cannot take these arguments here, or None."""
    return platform.other_than_hopper() or unsupported_arguments(x, *matrices)


def unsupported_arguments(x: jax.Array, *matrices: jax.Array) -> str | None:
    """The part of `unsupported` that does not depend on the machine; of expert matrices as well."""
    if x.dtype != jnp.bfloat16:
        return f"dtype {x.dtype}: it must be bfloat16"
    for array in (x, *matrices):
        if 0 in array.shape:
            return f"an empty operand, of shape {array.shape}"
    if x.shape[0] > ROWS:
        return f"{x.shape[0]} rows: at most {ROWS}"
    for matrix in matrices:
        if matrix.dtype != matrices[0].dtype or matrix.dtype not in (jnp.bfloat16, jnp.int8):
            return f"a matrix of dtype {matrix.dtype}: all must be bfloat16, or all int8"
        if any(size % COLUMNS for size in matrix.shape[-2:]):
            return f"a matrix of shape {matrix.shape}: both sizes must be multiples of {COLUMNS}"
    return None


def padded(x: Float[Array, "N D"]) -> Float[Array, "R D"]:
    """Rows that a copy can address."""
    return jnp.pad(x, ((0, -x.shape[0] % ROW_ALIGNMENT), (0, 0)))


def staging(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory in the form that TMA copies and tensor cores read."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = (untyped.TilingTransform((8, swizzle // size)), untyped.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def matrix_ring(slots: int, dtype: Any) -> list[Any]:
    """Shared memory for tiles of a matrix, and for those of int8 in bf16."""
    # Of these two: some warps may read the one before while others write.
    wide = [staging(2, DEPTH, COLUMNS)] if dtype == jnp.int8 else []
    return [staging(slots, DEPTH, COLUMNS, dtype=dtype), *wide]


def operand(ring: Sequence[Any], slot: Any, step: Any) -> Any:
    """The tile in a slot of a `matrix_ring` for a tensor core product, whose step counts up."""
    if len(ring) == 1:
        return ring[0].at[slot]
    layout = plgpu.Layout.WGMMA_UPCAST_2X  # four bytes side by side a thread
    tile = plgpu.load(ring[0].at[slot], layout=layout, optimized=False)
    wide = ring[1].at[lax.rem(step, jnp.int32(2))]
    wide[...] = tile.astype(jnp.bfloat16)
    plgpu.commit_smem()
    return wide


def per_column(scales: Any) -> Any:
    """fp32 scales of the columns of a product, for all its rows."""
    scales = plgpu.load(scales, layout=PER_COLUMN, optimized=False)
    return lax.broadcast_in_dim(scales, (ROWS, COLUMNS), [1])


def store(staged: Any, rows: int, target: Any) -> None:
    """Write the first rows of a staged result, and wait until they are written."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, rows)], target)
    plgpu.wait_smem_to_gmem(0)


def shares(inner: int, width: int) -> int:
    """Into how many shares the contracted elements are cut, so that all multiprocessors read."""
    workers, columns = WORKERS * platform.gpu_cores(), width // COLUMNS
    fitting = range(1, max(1, workers // columns) + 1)
    return max(n for n in fitting if inner // DEPTH % n == 0)


def skinny_matmul(
    x: Float[Array, "N D"],
    *matrices: Float[Array, "D O"] | Int[Array, "D O"],
    scales: Sequence[Float[Array, "O"]] | None = None,
) -> tuple[Float[Array, "N O"], ...]:
    """`pallas_kernels.skinny_matmul` of bf16 rows; fp32 results."""
    widths = [matrix.shape[1] for matrix in matrices]
    parts = _products(padded(x), *matrices)
    total = jnp.sum(parts, axis=0)[: x.shape[0]]
    if scales is not None:
        total *= jnp.concatenate(scales)
    return tuple(jnp.split(total, list(itertools.accumulate(widths))[:-1], axis=1))


# Programs of their own, so that a model with many layers holds and lowers each kernel once.
@jax.jit
def _products(
    x: Float[Array, "R D"], *matrices: Float[Array, "D O"] | Int[Array, "D O"]
) -> Float[Array, "S R columns"]:
    """Shares of the products with all matrices, side by side."""
    rows, inner = x.shape
    ends = list(itertools.accumulate(matrix.shape[1] // COLUMNS for matrix in matrices))
    parts = shares(inner, ends[-1] * COLUMNS)
    steps, number = inner // DEPTH // parts, len(matrices)

    def body(x, *refs):
        matrices, (out, rows_ring, staged, loaded, *ring) = refs[:number], refs[number:]
        part, column = lax.axis_index("part"), lax.axis_index("column")

        def load(step):
            slot = lax.rem(step, jnp.int32(SLOTS))
            depth = pl.ds((part * steps + step) * DEPTH, DEPTH)
            target = rows_ring.at[slot, pl.ds(0, rows)]
            plgpu.copy_gmem_to_smem(x.at[:, depth], target, loaded.at[slot])
            for matrix, begin, end in zip(matrices, [0, *ends[:-1]], ends, strict=True):

                @pl.when((begin <= column) & (column < end))
                def _(matrix=matrix, begin=begin):
                    columns = pl.ds((column - begin) * COLUMNS, COLUMNS)
                    source = matrix.at[depth, columns]
                    plgpu.copy_gmem_to_smem(source, ring[0].at[slot], loaded.at[slot])

        product = _multiply(rows_ring, ring, loaded, load)
        for step in range(min(SLOTS, steps)):
            load(jnp.int32(step))
        staged[...] = product(0, steps, steps)
        store(staged, rows, out.at[part, :, pl.ds(column * COLUMNS, COLUMNS)])

    shape = (parts, rows, ends[-1] * COLUMNS)
    return _kernel(body, "skinny_matmul", shape, matrices[0].dtype)(x, *matrices)


def _kernel(body: Callable[..., None], name: str, shape: tuple[int, int, int], dtype: Any) -> Any:
    """A kernel with a result of [shares, rows, columns], and the dtype of its matrices."""
    parts, _, width = shape
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_types=[
            staging(SLOTS, ROWS, DEPTH),
            staging(ROWS, COLUMNS, dtype=jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            *matrix_ring(SLOTS, dtype),
        ],
        grid=(width // COLUMNS, parts),
        grid_names=("column", "part"),
        kernel_name=name,
    )


def _multiply(rows_ring, ring, loaded, load: Callable[[Any], None]) -> Callable[..., Any]:
    """(begin, end, last) -> the sum of the products of these tiles; the ring is filled up to last.

    What is before `begin + SLOTS` was loaded by the caller, or by the call before.
    """

    def product(begin, end, last):
        def multiply(accumulator):
            def step(i, _):
                slot = lax.rem(i, jnp.int32(SLOTS))
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.wgmma(accumulator, rows_ring.at[slot], operand(ring, slot, i))
                plgpu.wgmma_wait(0)
                pl.when(i + SLOTS < last)(lambda: load(i + SLOTS))

            lax.fori_loop(begin, end, step, None)
            return accumulator[...]

        return pl.run_scoped(multiply, untyped.ACC((ROWS, COLUMNS), jnp.float32))

    return product


@jax.jit
def weighted_products(
    number: Int[Array, "1"],
    chosen: Int[Array, "E"],
    weights: Float[Array, "E 64"],
    x: Float[Array, "E R D"],
    matrices: Float[Array, "E D O"] | Int[Array, "E D O"],
    scales: Float[Array, "E 1 O"] | None = None,
) -> Float[Array, "S R O"]:
    """Shares of the sum of weights[e] * (x[e] @ matrices[e]) over the first `number` chosen e.

    With int8 matrices a product is multiplied by its scales.

    `weights` has one for every row of a product; with 0 a row adds nothing, not even a NaN.
    """
    _, rows, inner = x.shape
    width = matrices.shape[2]
    parts = shares(inner, width)
    steps, scaled = inner // DEPTH // parts, int(scales is not None)  # steps of a matrix

    def body(number, chosen, weights, x, matrices, *refs):
        scales, (out, rows_ring, staged, loaded, *ring) = refs[:scaled], refs[scaled:]
        part = lax.axis_index("part")
        columns = pl.ds(lax.axis_index("column") * COLUMNS, COLUMNS)
        last = number[0] * steps

        def load(step):
            slot = lax.rem(step, jnp.int32(SLOTS))
            e = chosen[lax.div(step, jnp.int32(steps))]
            depth = pl.ds((part * steps + lax.rem(step, jnp.int32(steps))) * DEPTH, DEPTH)
            target = rows_ring.at[slot, pl.ds(0, rows)]
            plgpu.copy_gmem_to_smem(x.at[e, :, depth], target, loaded.at[slot])
            source = matrices.at[e, depth, columns]
            plgpu.copy_gmem_to_smem(source, ring[0].at[slot], loaded.at[slot])

        product = _multiply(rows_ring, ring, loaded, load)

        def add(place, total):
            weight = plgpu.load(weights.at[chosen[place]], layout=PER_ROW, optimized=False)
            weight = lax.broadcast_in_dim(weight, (ROWS, COLUMNS), [0])
            summand = product(place * steps, (place + 1) * steps, last)
            for ref in scales:
                summand *= per_column(ref.at[chosen[place], 0, columns])
            # Chosen, not multiplied by 0: what a row does not want may be infinite.
            return total + jnp.where(weight == 0, 0.0, weight * summand)

        for step in range(SLOTS):
            pl.when(step < last)(lambda step=step: load(jnp.int32(step)))
        zeros = jnp.zeros((ROWS, COLUMNS), jnp.float32)
        total = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        staged[...] = lax.fori_loop(0, number[0], add, total)
        store(staged, rows, out.at[part, :, columns])

    kernel = _kernel(body, "weighted_products", (parts, rows, width), matrices.dtype)
    return kernel(number, chosen, weights, x, matrices, *([] if scales is None else [scales]))
