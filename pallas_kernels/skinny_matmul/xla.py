"""The skinny product by the compiler, on every backend; also the definition."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import einsum


def skinny_matmul(
    x: Float[Array, "N D"], *matrices: Float[Array, "D O"]
) -> tuple[Float[Array, "N O"], ...]:
    """`pallas_kernels.skinny_matmul`, one product after the other."""
    results: list[jax.Array] = [einsum("nd,do->no", x, matrix) for matrix in matrices]
    return tuple(results)
