"""The public function of the skinny product: argument checks and the choice of implementation."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.skinny_matmul import gpu_hopper, xla

IMPLEMENTATIONS = (
    dispatch.Implementation("pallas_gpu", gpu_hopper.skinny_matmul, gpu_hopper.unsupported),
    dispatch.Implementation("xla", xla.skinny_matmul),
)


def skinny_matmul(
    x: Float[Array, "N D"],
    *matrices: Float[Array, "D O"] | Int[Array, "D O"],
    scales: Sequence[Float[Array, "O"]] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "N O"], ...]:
    """Multiply few rows by one or several matrices: x @ w, accumulated and returned in fp32.

    For decoding, where N is the number of sequences and time is what reading the matrices takes.
    A row's result does not depend on the other rows. Gradients are those of the XLA form. With
    int8 matrices, for inference, the products are (x @ w) * scale, without gradients.

    Args:
      x: bf16 or fp32 rows.
      matrices: of the dtype of `x`, or all int8; they may differ in their number of columns.
      scales: fp32, one for each matrix, with int8 matrices and only then.
      implementation: 'pallas_gpu' (Hopper, bf16 rows, at most 64, sizes that are multiples of 64),
        'xla', or None for the first that takes these arguments.

    Raises:
      ValueError: shapes or dtypes that disagree.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "skinny_matmul"
    if x.ndim != 2 or not matrices or any(matrix.ndim != 2 for matrix in matrices):
        shapes = [matrix.shape for matrix in matrices]
        raise ValueError(
            f"{name}: x and matrices have shapes {x.shape} and {shapes}; they must be [N, D] and "
            "one or more [D, O]"
        )
    for i, matrix in enumerate(matrices):
        dispatch.require_shape(name, f"matrix {i}", matrix, (x.shape[1], matrix.shape[1]))
    named = {f"matrix {i}": matrix for i, matrix in enumerate(matrices)}
    if scales is None:
        dispatch.require_one_dtype(name, x=x, **named)
    else:
        dispatch.require_floating(name, x=x)
        widths = [(matrix.shape[1],) for matrix in matrices]
        dispatch.require_int8(name, named, scales, widths)
    chosen = dispatch.select(name, IMPLEMENTATIONS, implementation, x, *matrices)
    with jax.named_scope(name):
        if scales is not None:
            return chosen.call(x, *matrices, scales=scales)
        return dispatch.with_gradients_of(xla.skinny_matmul, chosen.call)(x, *matrices)


def supported(x: jax.Array, *matrices: jax.Array) -> bool:
    """Whether a kernel takes these arguments here, as against the XLA form."""
    return gpu_hopper.unsupported(x, *matrices) is None
