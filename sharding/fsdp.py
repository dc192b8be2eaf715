"""Fully sharded data parallelism: one mesh axis that splits both the batch and every parameter."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

AXIS = "fsdp"
# The dimension of a parameter that is split, in order of preference: those that all devices read
# in full anyway, so that what is gathered is one layer at a time. 'layers' is scanned over.
_SPLIT = ("embed", "vocab", "expert_mlp", "mlp", "heads", "experts")


def fsdp_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices along one axis."""
    found = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(found),), (AXIS,), axis_types=(AxisType.Auto,), devices=found)


def parameter_spec(
    shape: Sequence[int], axes: Sequence[str | None], num_devices: int
) -> PartitionSpec:
    """How a parameter with these logical axes is split; one no axis of which divides is whole."""
    for name in _SPLIT:
        for dimension, (size, axis) in enumerate(zip(shape, axes, strict=True)):
            if axis == name and size % num_devices == 0:
                return PartitionSpec(*(None,) * dimension, AXIS)
    return PartitionSpec()
