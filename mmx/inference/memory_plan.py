"""What an engine will take of a device's memory, known before any of it is taken.

Arrays are counted from their shapes; the working memory of the two programs is what the compiler
says it is. The programs it asks the compiler for are the ones the engine runs, compiled once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx.config import ModelConfig
from mmx.inference.decoding import decode, param_axes, prefill
from mmx.inference.pool import POOL, PoolShape, empty_states, init_pool
from mmx.inference.rows import empty_rows
from mmx.inference.sizes import sizes_of
from mmx.model import Params
from sharding import Partition, named


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
      parameters: of the model.
      states: lightning states of all rows.
      pages: keys and values.
      prefixes: lightning states of kept prefixes.
      batch: what is known of each row: options, which tokens it holds.
      work: of the program that needs most while it runs.
    """

    parameters: int
    states: int
    pages: int
    prefixes: int
    batch: int
    work: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(dataclasses.astuple(self))

    def lines(self) -> list[tuple[str, int]]:
        """(what, bytes) for a table, the total last."""
        return [*dataclasses.asdict(self).items(), ("total", self.total)]


def plan_memory(
    config: ModelConfig,
    params: Params,
    shape: PoolShape,
    *,
    row_pages: int,
    snapshots: int,
    chunk: int,
    decode_steps: int,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> MemoryPlan:
    """What an `Engine` with these numbers takes; see there, and `plan_engine`.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s in their place.
      shape: rows and pages.
      row_pages: pages a row can have.
      partition: bytes are then those of one of its devices; else of jax's default device.
    """
    params = jax.tree.map(_abstract, params)
    pool = jax.eval_shape(lambda: init_pool(config, shape))
    rows = jax.eval_shape(lambda: empty_rows(config, shape.rows, row_pages))
    prefixes = jax.eval_shape(lambda: empty_states(config, snapshots))
    if partition is not None:
        params = _spread(params, named(params, param_axes(params, config), partition))
        pool = _spread(pool, named(pool, POOL, partition))
        rows = _spread(rows, jax.tree.map(lambda _: NamedSharding(partition.mesh, P()), rows))
        wanted = partition.sharding(POOL.lightning_states, prefixes.shape)  # pyright: ignore
        prefixes = _spread(prefixes, wanted)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    tokens, page_row = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (chunk, row_pages))
    common = dict(config=config, implementation=implementation, partition=partition)
    programs = (
        prefill.lower(params, pool, tokens, number, number, page_row, number, **common),
        decode.lower(params, pool, rows, steps=decode_steps, **common),
    )
    return MemoryPlan(
        parameters=_bytes(params),
        states=_bytes(pool.lightning_states),
        pages=_bytes((pool.key_pages, pool.value_pages)),
        prefixes=_bytes(prefixes),
        batch=_bytes(rows),
        work=max(_work(program) for program in programs),
    )


def plan_engine(
    config: ModelConfig,
    params: Params,
    *,
    implementation: str | None = None,
    partition: Partition | None = None,
    **options: Any,
) -> MemoryPlan:
    """What `Engine(config, params, **options)` will take, before there is any.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s in their place.
      options: those of an `Engine` that have a say: rows, pages, max_seq_len, page_size, chunk,
        decode_steps, kv_dtype, snapshots.

    Raises:
      ValueError: as `Engine` does.
    """
    activations = params["embed"]["embedding"].dtype
    sizes = sizes_of(config, activations, partition=partition, **options)
    return plan_memory(
        config,
        params,
        sizes.pool,
        row_pages=sizes.row_pages,
        snapshots=sizes.snapshots,
        chunk=sizes.chunk,
        decode_steps=sizes.decode_steps,
        implementation=implementation,
        partition=partition,
    )


def pages_within(memory: int, plan: MemoryPlan, pages: int) -> int:
    """Pages there is room for in so many bytes, from the plan of an engine with `pages`.

    Raises:
      ValueError: not even one; says what the rest takes.
    """
    page = plan.pages // pages
    left = memory - (plan.total - plan.pages)
    if left < page:
        raise ValueError(
            f"{memory:,} bytes of memory do not hold parameters, states and the work of the "
            f"programs, {plan.total - plan.pages:,} bytes, and a page of {page:,}; "
            "take fewer rows, a smaller chunk or int8 weights"
        )
    return left // page


def device_memory() -> int | None:
    """Bytes that jax may take of the default device; None where it does not say, as on CPUs."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def _abstract(x) -> jax.ShapeDtypeStruct:
    sharding = x.sharding if isinstance(x, jax.Array) and x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _spread(tree, shardings):
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def _bytes(tree) -> int:
    """Of the largest share that any device has."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


def _work(program: jax.stages.Lowered) -> int:
    """What a program needs beside its arguments, as its compiler says."""
    stats = program.compile().memory_analysis()
    if stats is None:
        return 0
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes + max(new, 0)
