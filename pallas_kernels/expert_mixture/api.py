"""The public function of the expert mixture: argument checks and the choice of implementation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.expert_mixture import gpu_hopper, xla

IMPLEMENTATIONS = (
    dispatch.Implementation("pallas_gpu", gpu_hopper.expert_mixture, gpu_hopper.unsupported),
    dispatch.Implementation("xla", xla.expert_mixture),
)


def expert_mixture(
    x: Float[Array, "N D"],
    weights: Float[Array, "N E"],
    gate: Float[Array, "E D F"] | Int[Array, "E D F"],
    up: Float[Array, "E D F"] | Int[Array, "E D F"],
    down: Float[Array, "E F D"] | Int[Array, "E F D"],
    *,
    scales: Sequence[Float[Array, "E 1 _"]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """Send few tokens through gated experts and mix what these give.

        out[n] = sum_e weights[n, e] (silu(x[n] gate[e]) * (x[n] up[e])) down[e]

    For decoding, where time is what reading the matrices takes. A weight of 0 is an expert that the
    token did not choose: it adds nothing, not even a NaN, and has no gradient. So a token's result
    does not depend on the other tokens. Products accumulate in fp32, and so do the sums; what goes
    into the last product is rounded once to the dtype of `x`. Gradients are those of the XLA form,
    where a NaN in a matrix nobody chose does reach the tokens.

    Args:
      x: bf16 or fp32 tokens.
      weights: fp32.
      gate, up, down: one matrix an expert, of the dtype of `x`; or all int8, for inference: then
        each column of a product is multiplied by its scale, in fp32, and there are no gradients.
      scales: of gate, up and down, fp32, with int8 and only then.
      implementation: 'pallas_gpu' (Hopper, bf16 tokens, at most 64, sizes that are multiples of 64;
        experts nobody chose are not read), 'xla' (every expert for every token), or None for the
        first that takes these arguments. `supported` says which it is.

    Returns:
      fp32.

    Raises:
      ValueError: shapes or dtypes that disagree.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "expert_mixture"
    if x.ndim != 2 or gate.ndim != 3:
        raise ValueError(
            f"{name}: x and gate have shapes {x.shape} and {gate.shape}; they must be [N, D] and "
            "[E, D, F]"
        )
    experts, dim, width = gate.shape[0], x.shape[1], gate.shape[2]
    dispatch.require_shape(name, "gate", gate, (experts, dim, width))
    dispatch.require_shape(name, "up", up, (experts, dim, width))
    dispatch.require_shape(name, "down", down, (experts, width, dim))
    dispatch.require_shape(name, "weights", weights, (x.shape[0], experts))
    matrices = dict(gate=gate, up=up, down=down)
    if scales is None:
        dispatch.require_one_dtype(name, x=x, **matrices)
    else:
        dispatch.require_floating(name, x=x)
        shapes = [(experts, 1, matrix.shape[2]) for matrix in matrices.values()]
        dispatch.require_int8(name, matrices, scales, shapes)
    if weights.dtype != jnp.float32:
        raise ValueError(f"{name}: weights have dtype {weights.dtype}; they must be float32")
    arrays = x, weights, gate, up, down
    chosen = dispatch.select(name, IMPLEMENTATIONS, implementation, *arrays)
    with jax.named_scope(name):
        if scales is not None:
            return chosen.call(*arrays, scales=scales)
        return dispatch.with_gradients_of(xla.expert_mixture, chosen.call)(*arrays)


def supported(
    x: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> bool:
    """Whether a kernel takes these arguments here, as against the XLA form and its E-fold work."""
    return gpu_hopper.unsupported(x, weights, gate, up, down) is None
