"""The public function of the grouped matmul: argument checks and the choice of implementation."""

import jax
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
    w: Float[Array, "G K N"] | Int[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    w_scale: Float[Array, "G 1 N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiply consecutive groups of rows of `x` by their own matrix.

        out[m] = x[m] @ w[g]                 for the group g whose rows contain m
        out[m] = (x[m] @ w[g]) * w_scale[g]  with an int8 w, in fp32 before the one rounding

    Groups lie one after the other, may be empty and may end anywhere. Rows past the last group
    give 0 and pass no gradient. Products accumulate in fp32; the result has the dtype of `x`.

    Args:
      x: bf16 or fp32 rows, sorted by group.
      w: one matrix a group, same dtype as `x`; or int8, for inference: it passes no gradient.
      group_sizes: rows of each group; their sum is at most M.
      w_scale: fp32, with an int8 `w` and only then.
      implementation: 'pallas_gpu' (Hopper, bf16), 'pallas_tpu', 'xla', 'reference', or None for the
        best that takes these arguments. An int8 `w` is taken by the last two.

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
    if w_scale is None:
        dispatch.require_one_dtype(name, x=x, w=w)
    else:
        _require_int8(name, x, w, w_scale)
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"{name}: group_sizes has dtype {group_sizes.dtype}; it must be integer")
    chosen = dispatch.select(name, IMPLEMENTATIONS, implementation, x, w, group_sizes)
    with jax.named_scope("grouped_matmul"):
        return chosen.call(x, w, group_sizes, *(() if w_scale is None else (w_scale,)))


def _require_int8(name: str, x: jax.Array, w: jax.Array, w_scale: jax.Array) -> None:
    dispatch.require_floating(name, x=x)
    if w.dtype != jnp.int8 or w_scale.dtype != jnp.float32:
        raise ValueError(
            f"{name}: w has dtype {w.dtype} and w_scale {w_scale.dtype}; with a w_scale they must "
            "be int8 and float32"
        )
    dispatch.require_shape(name, "w_scale", w_scale, (w.shape[0], 1, w.shape[2]))
