"""Room of the experts, counted over all devices: the global router of the paper (section 2.1)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def within_capacity(
    experts: Int[Array, "B T k"],
    is_token: Bool[Array, "B T"],
    *,
    num_experts: int,
    capacity_factor: float,
    batch_axes: tuple[str, ...] = (),
    seq_axes: tuple[str, ...] = (),
) -> Bool[Array, "B T k"]:
    """Which choices their expert has room for, counted over the devices: the rest are dropped.

    An expert takes ceil(capacity_factor * k * tokens / E) choices, first choices before second ones
    and then in the order of the tokens (GShard), however the batch is spread: devices tell each
    other how many choices of each rank each of their rows has for each expert, and no more. Padding
    is never kept and takes no room. The weights of a token's other choices stay as they are. Room
    of more than a million choices may be a millionth less.

    Args:
      experts: chosen experts of this device's tokens, best first.
      is_token: False for padding.
      num_experts: E.
      capacity_factor: 1 is room for perfect balance.
      batch_axes: mesh axes that split B, outermost first.
      seq_axes: mesh axes that split T, outermost first.
    """
    rows, length, per_token = experts.shape
    bins = num_experts + 1  # the last one is padding
    chosen = jnp.where(is_token[..., None], experts, num_experts)
    line = jnp.arange(rows * per_token).reshape(rows, 1, per_token)
    flat = jnp.swapaxes(line * bins + chosen, 1, 2).reshape(-1)  # row by row, rank by rank
    sizes = jnp.bincount(flat, length=rows * per_token * bins)
    order = jnp.argsort(flat, stable=True)
    begins = jnp.cumsum(sizes) - sizes
    place = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size) - begins[flat[order]])

    counts = sizes.reshape(1, rows, 1, per_token, bins)
    counts = jax.lax.all_gather(counts, seq_axes, axis=2, tiled=True) if seq_axes else counts
    counts = jax.lax.all_gather(counts, batch_axes, axis=0, tiled=True) if batch_axes else counts
    # Rank of the choice, then device by rows, row, device by sequence: the order of the batch.
    ranked = jnp.moveaxis(counts, 3, 0)
    ends = jnp.cumsum(ranked.reshape(-1, bins), axis=0)
    before = (ends - ranked.reshape(-1, bins)).reshape(ranked.shape)
    above = before[:, _index(batch_axes), :, _index(seq_axes)].swapaxes(0, 1)  # [B, k, bins]
    place = place + above.reshape(-1)[flat]

    num_tokens = jnp.sum(ends[-1, :num_experts]) // per_token
    room = capacity_factor * per_token / num_experts * num_tokens
    # Less a hair, so that rounding in fp32 does not make a whole number of places one more.
    room = jnp.ceil(room * (1 - 1e-6)).astype(jnp.int32)
    kept = (place < room).reshape(rows, per_token, length).swapaxes(1, 2)
    return kept & is_token[..., None]


def expert_capacity(
    num_tokens: int, per_token: int, num_experts: int, capacity_factor: float
) -> int:
    """The most choices an expert takes of a batch of this many tokens."""
    return math.ceil(capacity_factor * per_token * num_tokens / num_experts)


def _index(axes: tuple[str, ...]) -> Int[Array, ""] | int:
    return jax.lax.axis_index(axes) if axes else 0
