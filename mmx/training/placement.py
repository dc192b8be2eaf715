"""Where the arrays of a run live: on one device, or spread over all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx.config import ModelConfig
from mmx.model import param_specs
from mmx.training.optimizer import OptimizerOptions, make_optimizer
from mmx.training.state import TrainState, abstract_state
from sharding import fsdp


@dataclass(frozen=True)
class Placement:
    """One device when `mesh` is None; else rows of the batch and parameters split over its axis."""

    mesh: Mesh | None = None

    def shardings(self, config: ModelConfig, optimizer: OptimizerOptions) -> TrainState | None:
        """Shardings of a training state; moments lie as their parameters do."""
        if self.mesh is None:
            return None
        mesh, size = self.mesh, self.mesh.size
        whole = NamedSharding(mesh, PartitionSpec())
        state = abstract_state(config, optimizer)
        params = jax.tree.map(
            lambda spec: NamedSharding(mesh, fsdp.parameter_spec(spec.shape, spec.axes, size)),
            param_specs(config),
        )
        opt_state = optax.tree.map_params(
            make_optimizer(config, optimizer),
            lambda _, sharding: sharding,
            state.opt_state,
            params,
            transform_non_params=lambda _: whole,
        )
        rest = jax.tree.map(lambda _: whole, state)
        return TrainState(params, opt_state, rest.step, rest.guard, rest.rng)

    def put_state(self, state: TrainState, shardings: TrainState | None) -> TrainState:
        """The state on its devices."""
        return state if shardings is None else jax.device_put(state, shardings)

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Micro-batches [A, b, T] of this process' rows, as global arrays split over the rows."""
        if self.mesh is None:
            return dict(batch)
        rows = NamedSharding(self.mesh, PartitionSpec(None, fsdp.AXIS))
        return {
            name: jax.make_array_from_process_local_data(rows, array)
            for name, array in batch.items()
        }


def default_placement(rows: int) -> Placement:
    """All devices there are.

    Args:
      rows: of a micro-batch, over all processes; a multiple of the number of devices.

    Raises:
      ValueError: the rows cannot be split over the devices.
    """
    devices = jax.device_count()
    if devices == 1:
        return Placement()
    if rows % devices:
        raise ValueError(
            f"{rows} rows cannot be split over {devices} devices; make batch_size a multiple"
        )
    return Placement(fsdp.fsdp_mesh())


def with_shardings(state: TrainState, shardings: TrainState | None) -> TrainState:
    """An abstract state that says where its leaves belong."""
    if shardings is None:
        return state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
