"""The expert mixture as its definition, on every backend: every expert for every token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import einsum


def expert_mixture(
    x: Float[Array, "N D"],
    weights: Float[Array, "N E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """Dense form of `pallas_kernels.expert_mixture`: E-fold work."""
    gated, upped = (einsum("nd,edf->enf", x, matrix) for matrix in (gate, up))
    hidden = (jax.nn.silu(gated) * upped).astype(x.dtype)
    products = einsum("enf,efd->end", hidden, down)
    weights = weights.T[..., None]
    return jnp.sum(jnp.where(weights == 0, 0, weights * products), axis=0)
