"""Where the arrays of a training run lie; without a partition all on one device."""

from collections.abc import Mapping

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mmx.config import ModelConfig
from mmx.placement import param_shardings
from mmx.training.optimizer import OptimizerOptions, make_optimizer
from mmx.training.state import TrainState, abstract_state
from sharding import Partition


def state_shardings(
    config: ModelConfig, optimizer: OptimizerOptions, partition: Partition | None
) -> TrainState | None:
    """Shardings of a training state: parameters by the rules, moments as their parameters.

    Raises:
      ValueError: see `param_shardings`.
    """
    if partition is None:
        return None
    whole = NamedSharding(partition.mesh, PartitionSpec())
    state = abstract_state(config, optimizer)
    params = param_shardings(config, partition)
    opt_state = optax.tree.map_params(
        make_optimizer(config, optimizer),
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    rest = jax.tree.map(lambda _: whole, state)
    return TrainState(params, opt_state, rest.step, rest.guard, rest.rng)


def put_batch(
    batch: Mapping[str, np.ndarray], partition: Partition | None
) -> dict[str, jax.Array | np.ndarray]:
    """Micro-batches [A, b, T] of this process' rows as global arrays, rows and sequence split.

    Args:
      batch: the rows that `rows_of_process` says; of these all tokens.
      partition: None leaves the arrays as they are.

    Raises:
      ValueError: rows or tokens that the devices cannot share evenly.
    """
    if partition is None:
        return dict(batch)
    index, count = rows_of_process(partition, jax.process_index())

    def put(name: str, array: np.ndarray) -> jax.Array:
        size, rows, length = array.shape
        shape = (size, rows * count, length)

        def shard(at) -> np.ndarray:
            begin, end, _ = at[1].indices(shape[1])
            return array[at[0], begin - index * rows : end - index * rows, at[2]]

        sharding = partition.sharding((None, "batch", "seq"), shape, name=name)
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: put(name, array) for name, array in batch.items()}


def rows_of_process(partition: Partition | None, process: int) -> tuple[int, int]:
    """(index, count): the rows of a micro-batch that a process loads are part `index` of `count`.

    Processes that have other tokens of the same rows, or other experts, load the same part.

    Raises:
      ValueError: the devices of the process have rows that are no such part.
    """
    if partition is None:
        return 0, 1
    mesh, axes = partition.mesh, partition.axes_of("batch")
    at = [mesh.axis_names.index(axis) for axis in axes]
    shares = np.moveaxis(np.asarray(mesh.devices), at, range(len(at)))
    shares = shares.reshape(partition.devices_of("batch"), -1)
    mine = [i for i, share in enumerate(shares) if any(d.process_index == process for d in share)]
    first, number = mine[0], len(mine)
    if mine != list(range(first, first + number)) or first % number or len(shares) % number:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: the devices of process {process} have parts {mine} of "
            f"{len(shares)} of the rows, which are no even share; split the rows over as many "
            "devices as there are processes, over a multiple or over a divisor"
        )
    return first // number, len(shares) // number


def with_shardings(state: TrainState, shardings: TrainState | None) -> TrainState:
    """An abstract state that says where its leaves belong."""
    if shardings is None:
        return state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
