"""Partial results of attention on Hopper GPUs made one: the second kernel of `gpu_decode`.

Each program has up to 128 values of one query, and reads some partial results at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

MERGE_WIDTH = 128  # values a warpgroup holds one each
MERGED = 8  # partial results read at a time
LOWEST = -1e38  # below any score, and its differences are finite
FIRST_WORKER, NUM_WORKERS = 4, 5  # columns of a plan of rows


def padded(dim: int) -> int:
    """Head size of partial results for heads of this size."""
    return -(-dim // MERGE_WIDTH) * MERGE_WIDTH


@functools.partial(jax.jit, static_argnums=0)
def merge(
    rows: int,
    row_plan: Int[Array, "B 7"],
    parts: Float[Array, "G P R W"],
    weights: Float[Array, "G P R"],
) -> Float[Array, "B G M W"]:
    """The partial results of each row weighted by their log-sum-exps, in bf16.

    Args:
      rows: M, of a product that are queries.
      row_plan: of each row, among others, the first worker that has read of it and how many have.
      parts: partial results, that of worker w for row b at place b + w; W is `padded(K)`.
      weights: their log-sum-exps, base 2.
    """

    def body(plan, parts, weights, out):
        row, head, m, block = (lax.axis_index(name) for name in ("row", "head", "m", "block"))
        columns = pl.ds(block * MERGE_WIDTH, MERGE_WIDTH)
        first, number = row + plan[row, FIRST_WORKER], plan[row, NUM_WORKERS]

        def some(i, carry):
            """The next partial results; those past the last are the last, with weight 0."""
            top, total, acc = carry
            index = [i * MERGED + j for j in range(MERGED)]
            places = [first + jnp.minimum(j, number - 1) for j in index]
            exponents = [weights[head, place, m] for place in places]
            values = [
                plgpu.load(
                    parts.at[head, place, m, columns],
                    layout=plgpu.Layout.WG_STRIDED((MERGE_WIDTH,), 1),
                    optimized=False,
                )
                for place in places
            ]
            new_top = functools.reduce(jnp.maximum, exponents, top)
            shrink = jnp.exp2(top - new_top)
            total, acc = total * shrink, acc * shrink
            for j, exponent, value in zip(index, exponents, values, strict=True):
                weight = jnp.where(j < number, jnp.exp2(exponent - new_top), 0.0)
                total, acc = total + weight, acc + value * weight
            return new_top, total, acc

        zeros = plgpu.layout_cast(
            jnp.zeros((MERGE_WIDTH,), jnp.float32), plgpu.Layout.WG_STRIDED((MERGE_WIDTH,), 1)
        )
        start = (jnp.float32(LOWEST), jnp.float32(0), zeros)
        steps = lax.div(number + (MERGED - 1), jnp.int32(MERGED))
        top, total, acc = lax.fori_loop(0, steps, some, start)
        inverse = jnp.where(top > LOWEST, 1 / jnp.where(top > LOWEST, total, 1.0), 0.0)
        out.at[row, head, m, columns][...] = (acc * inverse).astype(jnp.bfloat16)

    batch, (kv_heads, _, _, width) = row_plan.shape[0], parts.shape
    blocks = width // MERGE_WIDTH
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, rows, width), jnp.bfloat16),
        grid=(blocks, rows, kv_heads, batch),
        grid_names=("block", "m", "head", "row"),
        kernel_name="paged_attention_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(row_plan, parts, weights)
