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

    Raises:
      ValueError: rows or tokens that the devices cannot share evenly.
    """
    if partition is None:
        return dict(batch)
    # Checked when the run is made: what is local here has no shape to check.
    rows, tokens = partition.axes_of("batch"), partition.axes_of("seq")
    spread = NamedSharding(partition.mesh, PartitionSpec(None, rows or None, tokens or None))
    return {
        name: jax.make_array_from_process_local_data(spread, array) for name, array in batch.items()
    }


def with_shardings(state: TrainState, shardings: TrainState | None) -> TrainState:
    """An abstract state that says where its leaves belong."""
    if shardings is None:
        return state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
