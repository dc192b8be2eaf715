"""Choosing the next token from fp32 logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    logits: Float[Array, "B vocab"],
    key: jax.Array,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> Int[Array, "B"]:
    """Draw a token a row; the most likely one when `temperature` is 0.

    Of the tokens, the `top_k` most likely are kept (0 keeps all), then of those the fewest whose
    probability together reaches `top_p`. The first of equals wins.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if top_k == 0 and top_p == 1:
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    ranked = jnp.where((before < top_p) | (jnp.arange(ranked.shape[-1]) == 0), ranked, -jnp.inf)
    rank = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
