"""The expert mixture as its definition, on every backend: every expert for every token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import einsum


def expert_mixture(
    x: Float[Array, "N D"],
    weights: Float[Array, "N E"],
    gate: Float[Array, "E D F"] | Int[Array, "E D F"],
    up: Float[Array, "E D F"] | Int[Array, "E D F"],
    down: Float[Array, "E F D"] | Int[Array, "E F D"],
    *,
    scales: Sequence[Float[Array, "E 1 _"]] | None = None,
) -> Float[Array, "N D"]:
    """Dense form of `pallas_kernels.expert_mixture`: E-fold work."""

    def product(subscripts: str, x: jax.Array, matrix: jax.Array, which: int) -> jax.Array:
        result = einsum(subscripts, x, matrix.astype(x.dtype))
        return result if scales is None else result * scales[which]

    gated, upped = (product("nd,edf->enf", x, matrix, i) for i, matrix in enumerate((gate, up)))
    hidden = (jax.nn.silu(gated) * upped).astype(x.dtype)
    products = product("enf,efd->end", hidden, down, 2)
    weights = weights.T[..., None]
    return jnp.sum(jnp.where(weights == 0, 0, weights * products), axis=0)
