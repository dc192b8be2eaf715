"""Lightning attention as its definition: token after token. Slow, obvious, differentiable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import accumulation_dtype


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence of `pallas_kernels.lightning_attention`; `chunk_size` has no meaning here."""
    del chunk_size
    batch, length, heads, key_dim = q.shape
    dtype = accumulation_dtype(v.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[3]), dtype)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    decay = jnp.exp(-decay_slopes.astype(dtype))[:, None, None]

    def token(carry, inputs):
        state, current = carry
        q_t, k_t, v_t, segment = inputs
        real = segment != 0
        restart = real & (current != 0) & (segment != current)
        state = jnp.where(restart[:, None, None, None], 0, state)
        updated = decay * state + k_t[..., :, None] * v_t[..., None, :]
        state = jnp.where(real[:, None, None, None], updated, state)
        out = jnp.sum(q_t[..., :, None] * state, axis=-2) * real[:, None, None]
        return (state, jnp.where(real, segment, current)), out

    inputs = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v)]
    carry = (initial_state.astype(dtype), jnp.zeros((batch,), segment_ids.dtype))
    (state, _), out = jax.lax.scan(token, carry, (*inputs, segment_ids.T))
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), state
