"""Which tokens are real, which belong together and where they stand: computed once a forward."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mmx.inference.cache import Cache
from pallas_kernels.lightning_attention.segments import segment_runs
from sharding import Partition, constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequence:
    """The tokens of one forward pass, as the layers need to know them.

    Attributes:
      segment_ids: id of the packed sample each token belongs to, 0 for padding; with a cache the
        number of the sample in its row, since an id may come again.
      positions: place of each token within its sample, padding not counted (for RoPE).
      continues: rows whose first real token belongs to the sample the cache ends with; None
        without a cache.
      packed: False when every token is known to be real and each row to be one sample, which lets
        kernels take their short path.
    """

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    continues: Bool[Array, "B"] | None
    packed: bool = field(metadata={"static": True})

    @property
    def real(self) -> Bool[Array, "B T"]:
        """Where there is a token and not padding."""
        return self.segment_ids != 0

    @property
    def kernel_segment_ids(self) -> Int[Array, "B T"] | None:
        """What to hand to a kernel that has a shorter path for None."""
        return self.segment_ids if self.packed else None


def describe(
    shape: tuple[int, int],
    mask: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache | None,
    *,
    partition: Partition | None = None,
) -> tuple[Sequence, Cache | None]:
    """Describe the new tokens, and advance the bookkeeping of the cache past them.

    Without `segment_ids` the tokens of a row carry on the sample its cache ends with.
    """
    batch, length = shape
    packed = segment_ids is not None or mask is not None
    if segment_ids is not None:
        ids = segment_ids.astype(jnp.int32)
    elif cache is not None:
        ids = jnp.broadcast_to(jnp.maximum(cache.segments, 1)[:, None], shape)
    else:
        ids = jnp.ones(shape, jnp.int32)
    if mask is not None:
        ids = jnp.where(mask.astype(bool), ids, 0)
    # What follows runs along whole rows: every device of a sequence does it for all, of integers.
    ids = constrain(ids, "batch", None, partition=partition)

    real, runs = segment_runs(ids)
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    begins = real & (jnp.diff(runs, axis=1, prepend=0) != 0)
    before_run = jax.lax.cummax(jnp.where(begins, count - 1, 0), axis=1)
    positions = jnp.maximum(count - 1, 0) - before_run

    def split(values):
        return constrain(values, "batch", "seq", partition=partition)

    if cache is None:
        return Sequence(split(ids), split(positions), None, packed), None

    index = jnp.arange(length)
    first = jnp.min(jnp.where(real, index, length), axis=1)
    last = jnp.max(jnp.where(real, index, -1), axis=1)
    some = last >= 0
    row = jnp.arange(batch)
    continues = ~some | (ids[row, jnp.minimum(first, length - 1)] == cache.segments)
    offset = jnp.where(continues, cache.positions, 0)
    positions = positions + jnp.where(runs == 0, offset[:, None], 0)
    samples = cache.num_samples + jnp.where(continues, 0, 1)
    samples = jnp.where(real, samples[:, None] + runs, 0)
    advanced = Cache(
        lightning_states=cache.lightning_states,
        keys=cache.keys,
        values=cache.values,
        slot_samples=jax.lax.dynamic_update_slice(
            cache.slot_samples, samples, (0, cache.num_slots)
        ),
        num_slots=cache.num_slots + length,
        num_samples=jnp.where(some, samples[row, last], cache.num_samples),
        segments=jnp.where(some, ids[row, last], cache.segments),
        positions=jnp.where(some, positions[row, last] + 1, cache.positions),
    )
    return Sequence(split(samples), split(positions), continues, packed), advanced
