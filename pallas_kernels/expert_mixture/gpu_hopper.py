"""The expert mixture of few tokens on Hopper GPUs: two Mosaic GPU kernels that read weights once.

Decoding reads the matrices of the chosen experts and does little else. So tokens are not sorted:
every expert that any token chose multiplies all tokens, at most 64, which are one row block of a
tensor core product however few they are, and the weight of those that did not choose it is 0. What
no token chose is not read.

    hidden[e] = silu(x gate[e]) * (x up[e])                  here; a worker an expert and 64 columns
    out       = sum_e weights[:, e] (hidden[e] down[e])      `skinny_matmul.weighted_products`

A token's result depends on no other token: rows of a product do not meet, and an expert it did not
choose adds nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import platform
from pallas_kernels.skinny_matmul import gpu_hopper as skinny
from pallas_kernels.skinny_matmul.gpu_hopper import COLUMNS, DEPTH, ROWS, staging

SLOTS = 4  # of the ring, of three tiles


def unsupported(
    x: Float[Array, "N D"],
    weights: Float[Array, "N E"],
    gate: Float[Array, "E D F"] | Int[Array, "E D F"],
    up: Float[Array, "E D F"] | Int[Array, "E D F"],
    down: Float[Array, "E F D"] | Int[Array, "E F D"],
) -> str | None:
    """Why `expert_mixture` cannot take these arguments here, or None."""
    del weights
    return platform.other_than_hopper() or skinny.unsupported_arguments(x, gate, up, down)


def expert_mixture(
    x: Float[Array, "N D"],
    weights: Float[Array, "N E"],
    gate: Float[Array, "E D F"] | Int[Array, "E D F"],
    up: Float[Array, "E D F"] | Int[Array, "E D F"],
    down: Float[Array, "E F D"] | Int[Array, "E F D"],
    *,
    scales: Sequence[Float[Array, "E 1 _"]] | None = None,
) -> Float[Array, "N D"]:
    """`pallas_kernels.expert_mixture` of few tokens in bf16."""
    experts = _experts(weights)
    *into, back = scales or (None,)
    hidden = _hidden(experts.number, experts.chosen, skinny.padded(x), gate, up, *into)
    return jnp.sum(skinny.weighted_products(*experts, hidden, down, back), axis=0)[: x.shape[0]]


class _Experts(NamedTuple):
    """What the workers need to know of the choices.

    Attributes:
      number: experts that any token chose.
      chosen: those first, in order.
      weights: of every expert, for rows of a product; 0 for those that are no token.
    """

    number: Int[Array, "1"]
    chosen: Int[Array, "E"]
    weights: Float[Array, "E 64"]


def _experts(weights: Float[Array, "N E"]) -> _Experts:
    # Comparisons and sums of E x E: on a GPU fused reductions, where a sort is many kernels.
    used = jnp.any(weights != 0, axis=0)
    index = jnp.arange(used.size, dtype=jnp.int32)
    before = jnp.sum(used & (index < index[:, None]), axis=1, dtype=jnp.int32)
    here = used & (before == index[:, None])  # [place, expert]
    chosen = jnp.sum(jnp.where(here, index, 0), axis=1, dtype=jnp.int32)
    rows = jnp.pad(weights.T, ((0, 0), (0, ROWS - weights.shape[0])))
    return _Experts(jnp.sum(used, dtype=jnp.int32, keepdims=True), chosen, rows)


@jax.jit
def _hidden(number, chosen, x, gate, up, *scales) -> Float[Array, "E R F"]:
    """silu(x gate[e]) * (x up[e]) of the chosen experts, rounded once; of others anything.

    With int8 matrices there are scales of both.
    """
    rows, inner = x.shape
    experts, _, width = gate.shape
    steps, scaled = inner // DEPTH, len(scales)

    def body(number, chosen, x, gate, up, *refs):
        scales, (out, x_ring, staged, loaded, *rings) = refs[:scaled], refs[scaled:]
        gate_ring, up_ring = rings[: len(rings) // 2], rings[len(rings) // 2 :]
        place = lax.axis_index("expert")
        columns = pl.ds(lax.axis_index("column") * COLUMNS, COLUMNS)

        @pl.when(place < number[0])
        def _():
            expert = chosen[place]

            def load(step):
                slot, depth = lax.rem(step, jnp.int32(SLOTS)), pl.ds(step * DEPTH, DEPTH)
                for source, target in (
                    (x.at[:, depth], x_ring.at[slot, pl.ds(0, rows)]),
                    (gate.at[expert, depth, columns], gate_ring[0].at[slot]),
                    (up.at[expert, depth, columns], up_ring[0].at[slot]),
                ):
                    plgpu.copy_gmem_to_smem(source, target, loaded.at[slot])

            def multiply(gated, upped):
                def step(i, _):
                    slot = lax.rem(i, jnp.int32(SLOTS))
                    plgpu.barrier_wait(loaded.at[slot])
                    tiles = [skinny.operand(ring, slot, i) for ring in (gate_ring, up_ring)]
                    for total, tile in zip((gated, upped), tiles, strict=True):
                        plgpu.wgmma(total, x_ring.at[slot], tile)
                    plgpu.wgmma_wait(0)
                    pl.when(i + SLOTS < steps)(lambda: load(i + SLOTS))

                lax.fori_loop(0, steps, step, None)
                return gated[...], upped[...]

            for i in range(min(SLOTS, steps)):
                load(jnp.int32(i))
            shape = skinny.untyped.ACC((ROWS, COLUMNS), jnp.float32)
            products = pl.run_scoped(multiply, shape, shape)
            if scales:
                products = [
                    product * skinny.per_column(ref.at[expert, 0, columns])
                    for product, ref in zip(products, scales, strict=True)
                ]
            gated, upped = products
            staged[...] = (gated / (1 + jnp.exp(-gated)) * upped).astype(jnp.bfloat16)
            skinny.store(staged, rows, out.at[expert, :, columns])

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((experts, rows, width), jnp.bfloat16),
        scratch_types=[
            staging(SLOTS, ROWS, DEPTH),
            staging(ROWS, COLUMNS),
            plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
            *skinny.matrix_ring(SLOTS, gate.dtype),
            *skinny.matrix_ring(SLOTS, up.dtype),
        ],
        grid=(width // COLUMNS, experts),
        grid_names=("column", "expert"),
        kernel_name="expert_hidden",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(number, chosen, x, gate, up, *scales)
