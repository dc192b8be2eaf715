"""Attention of global arrays: heads over devices, and the sequence by LASP or around a ring.

Each device runs the kernels on its own shard, inside `jax.shard_map`; the compiler never sees a
kernel whose operands it would have to gather.
"""

from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from sharding import lasp, ring
from sharding.partition import Partition, on_shards


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`pallas_kernels.lightning_attention`, spread as the partition says; the same numbers.

    Raises:
      ValueError: sizes that the devices cannot share evenly; else as the operation.
    """
    options = {"chunk_size": chunk_size, "implementation": implementation}
    seq = () if partition is None else partition.axes_of("seq")

    def attend(q, k, v, slopes, state, ids):
        if seq:
            return lasp.lightning_attention(
                q, k, v, slopes, axis_name=seq, initial_state=state, segment_ids=ids, **options
            )
        return pallas_kernels.lightning_attention(
            q, k, v, slopes, initial_state=state, segment_ids=ids, **options
        )

    arrays = q, k, v, decay_slopes, initial_state, segment_ids
    if partition is None or not partition.splits("batch", "seq", "heads"):
        return attend(*arrays)
    rows = partition.spec(
        ("batch", "seq", "heads", None), q.shape, name="queries of lightning attention"
    )
    state = partition.spec(
        ("batch", "heads", None, None), (q.shape[0], *q.shape[2:], v.shape[3]), name="its state"
    )
    slopes = partition.spec(("heads",), decay_slopes.shape, name="decay slopes")
    ids = partition.spec(("batch", "seq"), q.shape[:2], name="segment ids")
    run = on_shards(
        attend,
        partition,
        in_specs=(rows, rows, rows, slopes, state, ids),
        out_specs=(rows, state),
    )
    return run(*arrays)


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_offset: Int[Array, ""] | None = None,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> Float[Array, "B T H V"]:
    """`pallas_kernels.softmax_attention`, causal, spread as the partition says; the same numbers.

    Args:
      q, k, v, segment_ids: see the operation.
      kv_segment_ids, q_offset: for keys and values of a cache; the sequence must be whole then.
      implementation: of the kernel.
      partition: None for one device.

    Raises:
      ValueError: sizes that the devices cannot share evenly, query and key heads split over
        different axes, or a cache whose sequence is split; else as the operation.
    """
    cached = q_offset is not None

    def attend(q, k, v, ids, kv_ids, offset) -> Any:
        if seq:
            return ring.softmax_attention(
                q, k, v, axis_name=seq, segment_ids=ids, implementation=implementation
            )
        given = {"kv_segment_ids": kv_ids, "q_offset": offset[0]} if cached else {}
        return pallas_kernels.softmax_attention(
            q, k, v, segment_ids=ids, implementation=implementation, **given
        )

    offset = None if q_offset is None else jnp.reshape(q_offset, 1)
    arrays = q, k, v, segment_ids, kv_segment_ids, offset
    seq = () if partition is None else partition.axes_of("seq")
    if partition is None or not partition.splits("batch", "seq", "heads", "kv_heads"):
        return attend(*arrays)
    if seq and cached:
        raise ValueError(
            f"rules {partition.rules.name!r} split 'seq' over {seq}; a cache needs it whole: take "
            "rules that leave it so, as 'serving' does"
        )
    if partition.axes_of("heads") != partition.axes_of("kv_heads"):
        raise ValueError(
            f"rules {partition.rules.name!r} split 'heads' over {partition.axes_of('heads')} and "
            f"'kv_heads' over {partition.axes_of('kv_heads')}; query heads must lie with the key "
            "heads they read: name the same axes"
        )
    name = "of softmax attention"
    queries = partition.spec(("batch", "seq", "heads", None), q.shape, name=f"queries {name}")
    keys = partition.spec(("batch", "seq", "kv_heads", None), k.shape, name=f"keys {name}")
    ids = partition.spec(("batch", "seq"), q.shape[:2], name="segment ids")
    run = on_shards(
        attend,
        partition,
        in_specs=(queries, keys, keys, ids, ids, PartitionSpec()),
        out_specs=queries,
    )
    return run(*arrays)
