"""Rows of tokens in the order of their experts, and back: what both forms of the mixture share."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import accumulation_dtype


def by_expert(flat: Int[Array, "M"]) -> tuple[Int[Array, "M"], Int[Array, "M"]]:
    """The choice in each row once sorted by expert, and the row of each choice."""
    order = jnp.argsort(flat, stable=True)
    return order, jnp.argsort(order)


def rows_of_each(flat: Int[Array, "M"], bins: int) -> Int[Array, "bins"]:
    """How many choices each expert has; those numbered `bins` have none."""
    return jnp.bincount(flat, length=bins + 1)[:bins].astype(jnp.int32)


# Two gathers by a permutation that is known in both directions: `order[i]` is the choice in sorted
# row i, `place` its inverse. So their gradients are gathers as well, where autodiff would scatter
# and add up in bf16.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(
    per_token: int, tokens: Float[Array, "N D"], order: Int[Array, "M"], place: Int[Array, "M"]
) -> Float[Array, "M D"]:
    """The token of each choice, sorted: row i is token `order[i] // per_token`."""
    return tokens[order // per_token]


def _dispatch_forward(per_token, tokens, order, place):
    return dispatch(per_token, tokens, order, place), place


def _dispatch_backward(per_token, place, grad):
    choices = grad[place].reshape(-1, per_token, grad.shape[1])
    total = jnp.sum(choices, axis=1, dtype=accumulation_dtype(grad.dtype))
    return total.astype(grad.dtype), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(
    rows: Float[Array, "M D"], order: Int[Array, "M"], place: Int[Array, "M"]
) -> Float[Array, "M D"]:
    """Sorted rows back in the order of the choices: row i is the one at `place[i]`."""
    return rows[place]


def _combine_forward(rows, order, place):
    return combine(rows, order, place), order


def _combine_backward(order, grad):
    return grad[order], None, None


combine.defvjp(_combine_forward, _combine_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)
def weighted_sum(
    choices: Float[Array, "N k D"], weights: Float[Array, "N k"]
) -> Float[Array, "N D"]:
    """Sum over the choices of each token, in fp32."""
    return jnp.sum(choices.astype(jnp.float32) * weights[..., None], axis=1)
