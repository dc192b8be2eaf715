"""The grouped matmul as its definition: every row times every matrix, then choose. G-fold work."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import einsum


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"] | Int[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    w_scale: Float[Array, "G 1 N"] | None = None,
) -> Float[Array, "M N"]:
    """Dense form of `pallas_kernels.grouped_matmul`."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    member = (row < ends[:, None]) & (row >= (ends - group_sizes)[:, None])  # [G, M]
    products = einsum("mk,gkn->gmn", x, w.astype(x.dtype))
    if w_scale is not None:
        products = products * w_scale
    return jnp.sum(jnp.where(member[..., None], products, 0), axis=0).astype(x.dtype)
