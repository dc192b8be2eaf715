"""The product of few rows with large matrices on Hopper GPUs, as fast as these can be read.

At most 64 rows are one row block of a tensor core product, however few they are. What takes time is
to read the matrices, so all multiprocessors must read from the first moment on: a worker (CTA) has
64 columns and, where those are too few to go round, a share of the contracted elements. Shares are
added up by the caller, in fp32, which XLA does in whatever it does next.

A worker is one warpgroup. It copies tiles of the matrix and of the rows to a ring in shared memory
by TMA, a few tiles ahead of the arithmetic. Two workers share a multiprocessor.

`weighted_products` is the same with a sum over several matrices, of which each has rows of its own:
the second half of the expert mixture.
"""

import itertools
from collections.abc import Callable
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


def unsupported(x: Float[Array, "N D"], *matrices: Float[Array, "D O"]) -> str | None:
    """Why `skinny_matmul` cannot take these arguments here, or None."""
    return platform.other_than_hopper() or unsupported_arguments(x, *matrices)


def unsupported_arguments(x: jax.Array, *matrices: jax.Array) -> str | None:
    """The part of `unsupported` that does not depend on the machine; of expert matrices as well."""
    for array in (x, *matrices):
        if array.dtype != jnp.bfloat16:
            return f"dtype {array.dtype}: it must be bfloat16"
        if 0 in array.shape:
            return f"an empty operand, of shape {array.shape}"
    if x.shape[0] > ROWS:
        return f"{x.shape[0]} rows: at most {ROWS}"
    for matrix in matrices:
        if any(size % COLUMNS for size in matrix.shape[-2:]):
            return f"a matrix of shape {matrix.shape}: both sizes must be multiples of {COLUMNS}"
    return None


def padded(x: Float[Array, "N D"]) -> Float[Array, "R D"]:
    """Rows that a copy can address."""
    return jnp.pad(x, ((0, -x.shape[0] % ROW_ALIGNMENT), (0, 0)))


def ring(*shape: int) -> Any:
    """Shared memory for bf16 tiles, the last axis contracted or the columns of a matrix."""
    return staging(*shape, dtype=jnp.bfloat16)


def staging(*shape: int, dtype: Any) -> Any:
    """Shared memory in the form that TMA copies and tensor cores read."""
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (untyped.TilingTransform((8, width)), untyped.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


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
    x: Float[Array, "N D"], *matrices: Float[Array, "D O"]
) -> tuple[Float[Array, "N O"], ...]:
    """`pallas_kernels.skinny_matmul` of bf16; fp32 results."""
    widths = [matrix.shape[1] for matrix in matrices]
    parts = _products(padded(x), *matrices)
    total = jnp.sum(parts, axis=0)[: x.shape[0]]
    return tuple(jnp.split(total, list(itertools.accumulate(widths))[:-1], axis=1))


# Programs of their own, so that a model with many layers holds and lowers each kernel once.
@jax.jit
def _products(
    x: Float[Array, "R D"], *matrices: Float[Array, "D O"]
) -> Float[Array, "S R columns"]:
    """Shares of the products with all matrices, side by side."""
    rows, inner = x.shape
    ends = list(itertools.accumulate(matrix.shape[1] // COLUMNS for matrix in matrices))
    parts = shares(inner, ends[-1] * COLUMNS)
    steps = inner // DEPTH // parts

    def body(x, *refs):
        *matrices, out, rows_ring, matrix_ring, staged, loaded = refs
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
                    plgpu.copy_gmem_to_smem(source, matrix_ring.at[slot], loaded.at[slot])

        product = _multiply(rows_ring, matrix_ring, loaded, load)
        for step in range(min(SLOTS, steps)):
            load(jnp.int32(step))
        staged[...] = product(0, steps, steps)
        store(staged, rows, out.at[part, :, pl.ds(column * COLUMNS, COLUMNS)])

    return _kernel(body, "skinny_matmul", rows, parts, ends[-1] * COLUMNS)(x, *matrices)


def _kernel(body: Callable[..., None], name: str, rows: int, parts: int, width: int) -> Any:
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, rows, width), jnp.float32),
        scratch_types=[
            ring(SLOTS, ROWS, DEPTH),
            ring(SLOTS, DEPTH, COLUMNS),
            staging(ROWS, COLUMNS, dtype=jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        ],
        grid=(width // COLUMNS, parts),
        grid_names=("column", "part"),
        kernel_name=name,
    )


def _multiply(rows_ring, matrix_ring, loaded, load: Callable[[Any], None]) -> Callable[..., Any]:
    """(begin, end, last) -> the sum of the products of these tiles; the ring is filled up to last.

    What is before `begin + SLOTS` was loaded by the caller, or by the call before.
    """

    def product(begin, end, last):
        def multiply(accumulator):
            def step(i, _):
                slot = lax.rem(i, jnp.int32(SLOTS))
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.wgmma(accumulator, rows_ring.at[slot], matrix_ring.at[slot])
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
    matrices: Float[Array, "E D O"],
) -> Float[Array, "S R O"]:
    """Shares of the sum of weights[e] * (x[e] @ matrices[e]) over the first `number` chosen e.

    `weights` has one for every row of a product; with 0 a row adds nothing, not even a NaN.
    """
    _, rows, inner = x.shape
    width = matrices.shape[2]
    parts = shares(inner, width)
    steps = inner // DEPTH // parts  # of a matrix

    def body(number, chosen, weights, x, matrices, out, rows_ring, matrix_ring, staged, loaded):
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
            plgpu.copy_gmem_to_smem(source, matrix_ring.at[slot], loaded.at[slot])

        product = _multiply(rows_ring, matrix_ring, loaded, load)

        def add(place, total):
            weight = plgpu.load(weights.at[chosen[place]], layout=PER_ROW, optimized=False)
            weight = lax.broadcast_in_dim(weight, (ROWS, COLUMNS), [0])
            summand = product(place * steps, (place + 1) * steps, last)
            # Chosen, not multiplied by 0: what a row does not want may be infinite.
            return total + jnp.where(weight == 0, 0.0, weight * summand)

        for step in range(SLOTS):
            pl.when(step < last)(lambda step=step: load(jnp.int32(step)))
        zeros = jnp.zeros((ROWS, COLUMNS), jnp.float32)
        total = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        staged[...] = lax.fori_loop(0, number[0], add, total)
        store(staged, rows, out.at[part, :, columns])

    kernel = _kernel(body, "weighted_products", rows, parts, width)
    return kernel(number, chosen, weights, x, matrices)
