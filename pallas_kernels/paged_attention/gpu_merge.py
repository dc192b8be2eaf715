"""Partial results of attention on Hopper GPUs made one: the second kernel of `gpu_decode`.

Each program has 64 values of all queries of a row and key head, and reads some partial results at a
time. They lie as the first kernel makes them, queries side by side, and are turned on the way out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

BLOCK = 64  # values of a program
MERGED = 64  # numbers a row that partial results read together have: 64 queries, or 8 times 8
LOWEST = -1e38  # below any score, and its differences are finite
FIRST_WORKER, NUM_WORKERS = 4, 5  # columns of a plan of rows


untyped: Any = plgpu  # parts of its interface that type checkers do not see
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@jax.jit
def merge(
    row_plan: Int[Array, "B 7"],
    parts: Float[Array, "G P K M"],
    sums: Float[Array, "G P M"],
) -> Float[Array, "B G M K"]:
    """The partial results of each row weighted by their log-sum-exps, in bf16.

    Args:
      row_plan: of each row, among others, the first worker that has read of it and how many have.
      parts: partial results, that of worker w for row b at place b + w; K and M are multiples of 64
        and of 8.
      sums: their log-sum-exps, base 2.
    """
    kv_heads, _, dim, queries = parts.shape
    together = max(1, MERGED // queries)

    def body(plan, parts, sums, out, turned):
        row, head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
        own = pl.ds(block * BLOCK, BLOCK)
        first, number = row + plan[row, FIRST_WORKER], plan[row, NUM_WORKERS]

        def load(source, layout):
            return plgpu.load(source, layout=layout, optimized=False)

        def over_rows(columns):
            return lax.broadcast_in_dim(columns, (BLOCK, queries), [1])

        def some(i, carry):
            """The next partial results; those past the last are the last, with weight 0."""
            top, total, acc = carry
            index = [i * together + j for j in range(together)]
            places = [first + jnp.minimum(j, number - 1) for j in index]
            exponents = [load(sums.at[head, place], _COLUMNS) for place in places]
            values = [load(parts.at[head, place, own], plgpu.Layout.WGMMA) for place in places]
            new_top = functools.reduce(jnp.maximum, exponents, top)
            shrink = jnp.exp2(top - new_top)
            total, acc = total * shrink, acc * over_rows(shrink)
            for j, exponent, value in zip(index, exponents, values, strict=True):
                weight = jnp.exp2(exponent - new_top) * jnp.where(j < number, 1.0, 0.0)
                total, acc = total + weight, acc + value * over_rows(weight)
            return new_top, total, acc

        def full(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        start = (
            full((queries,), LOWEST, _COLUMNS),
            full((queries,), 0.0, _COLUMNS),
            full((BLOCK, queries), 0.0, plgpu.Layout.WGMMA),
        )
        steps = lax.div(number + (together - 1), jnp.int32(together))
        top, total, acc = lax.fori_loop(0, steps, some, start)
        seen = top > LOWEST
        inverse = jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0)
        merged = (acc * over_rows(inverse)).astype(jnp.bfloat16)
        merged = plgpu.layout_cast(merged, plgpu.Layout.WGMMA_TRANSPOSED)
        turned.transpose((1, 0))[...] = merged
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(turned, out.at[row, head, :, own])
        plgpu.wait_smem_to_gmem(0)

    transforms = (untyped.TilingTransform((8, 64)), untyped.SwizzleTransform(128))
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((row_plan.shape[0], kv_heads, queries, dim), jnp.bfloat16),
        scratch_types=[plgpu.SMEM((queries, BLOCK), jnp.bfloat16, transforms=transforms)],
        grid=(dim // BLOCK, kv_heads, row_plan.shape[0]),
        grid_names=("block", "head", "row"),
        kernel_name="paged_attention_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(row_plan, parts, sums)
