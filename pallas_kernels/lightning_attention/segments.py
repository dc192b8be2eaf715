"""Where packed segments begin: the integer bookkeeping that implementations share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_runs(
    segment_ids: Int[Array, "B T"],
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """Number the segments of each row by the order in which they begin.

    Returns:
      real: where the id is not 0.
      runs: 0 in the first segment of the row, 1 in the second, ...; padding carries the number of
        the segment before it (0 at the start of the row).
    """
    real = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    last_real = jax.lax.cummax(jnp.where(real, index, -1), axis=1)
    previous = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    begins = real & (previous >= 0) & (segment_ids != previous_id)
    return real, jnp.cumsum(begins, axis=1, dtype=jnp.int32)
