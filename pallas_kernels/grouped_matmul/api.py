"""The public function of the grouped matmul: argument checks and the choice of implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import gpu_hopper, reference, tpu, xla

IMPLEMENTATIONS = (
    dispatch.Implementation("pallas_gpu", gpu_hopper.grouped_matmul, gpu_hopper.unsupported),
    dispatch.Implementation("pallas_tpu", tpu.grouped_matmul, tpu.unsupported),
    dispatch.Implementation("xla", xla.grouped_matmul),
    dispatch.Implementation("reference", reference.grouped_matmul, automatic=False),
)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiply consecutive groups of rows of `x` by their own matrix.

        out[m] = x[m] @ w[g]    for the group g whose rows contain m

    Groups lie one after the other, may be empty and may end anywhere. Rows past the last group
    give 0 and pass no gradient. Products accumulate in fp32; the result has the dtype of `x`.

    Args:
      x: bf16 or fp32 rows, sorted by group.
      w: one matrix a group, same dtype as `x`.
      group_sizes: rows of each group; their sum is at most M.
      implementation: 'pallas_gpu' (Hopper, bf16), 'pallas_tpu', 'xla', 'reference', or None for the
        best that takes these arguments.

    Raises:
      ValueError: shapes or dtypes that disagree.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "grouped_matmul"
    if x.ndim != 2 or w.ndim != 3:
        raise ValueError(
            f"{name}: x and w have shapes {x.shape} and {w.shape}; they must be [M, K], [G, K, N]"
        )
    dispatch.require_shape(name, "w", w, (w.shape[0], x.shape[1], w.shape[2]))
    dispatch.require_shape(name, "group_sizes", group_sizes, (w.shape[0],))
    dispatch.require_one_dtype(name, x=x, w=w)
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"{name}: group_sizes has dtype {group_sizes.dtype}; it must be integer")
    chosen = dispatch.select(name, IMPLEMENTATIONS, implementation, x, w, group_sizes)
    return chosen.call(x, w, group_sizes)
