"""The skinny product by the compiler, on every backend; also the definition."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import einsum


def skinny_matmul(
    x: Float[Array, "N D"],
    *matrices: Float[Array, "D O"] | Int[Array, "D O"],
    scales: Sequence[Float[Array, "O"]] | None = None,
) -> tuple[Float[Array, "N O"], ...]:
    """`pallas_kernels.skinny_matmul`, one product after the other."""
    results: list[jax.Array] = [
        einsum("nd,do->no", x, matrix.astype(x.dtype)) for matrix in matrices
    ]
    if scales is not None:
        results = [result * scale for result, scale in zip(results, scales, strict=True)]
    return tuple(results)
