"""A mesh and its rules: what modules are handed, so that they name logical axes only."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding import rules as _rules
from sharding.rules import Rules


@dataclass(frozen=True)
class Partition:
    """How arrays are spread. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      mesh: of devices.
      rules: which of its axes split what.
      expert_groups: parts of each device's tokens that travel to the experts apart, so that one
        travels while another is computed, or where layers are recomputed, so that only one has room
        in memory; a divisor of their number.

    Raises:
      ValueError: the rules name an axis that the mesh has not, or leave one of its axes without
        anything to split, so that its devices would all do the same.
    """

    mesh: Mesh | AbstractMesh
    rules: Rules
    expert_groups: int = 1

    def __post_init__(self):
        used = set()
        for axis in _rules.LOGICAL_AXES:
            used |= set(getattr(self.rules, axis))
        for axis in sorted(used - set(self.mesh.shape)):
            raise ValueError(
                f"rules {self.rules.name!r} use mesh axis {axis!r}; the mesh has "
                f"{', '.join(self.mesh.shape)}"
            )
        for axis, size in self.mesh.shape.items():
            if size > 1 and axis not in used:
                raise ValueError(
                    f"rules {self.rules.name!r} split nothing over mesh axis {axis!r}, whose "
                    f"{size} devices would all do the same; make it 1 or choose other rules"
                )

    def axes_of(self, logical: str) -> tuple[str, ...]:
        """Mesh axes of more than one device that split a logical axis."""
        found: tuple[str, ...] = getattr(self.rules, logical)
        return tuple(axis for axis in found if self.mesh.shape[axis] > 1)

    def splits(self, *logical: str) -> bool:
        """Whether any of these logical axes is split."""
        return any(self.axes_of(axis) for axis in logical)

    def devices_of(self, *logical: str) -> int:
        """How many devices share what these logical axes split."""
        return math.prod(self.mesh.shape[name] for axis in logical for name in self.axes_of(axis))

    def spec(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], *, name: str = "array"
    ) -> PartitionSpec:
        """How an array with these logical axes is split; see `rules.spec`."""
        return _rules.spec(self.rules, axes, shape, self.mesh, name=name)

    def sharding(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], *, name: str = "array"
    ) -> NamedSharding:
        """The sharding of an array with these logical axes; see `rules.spec`."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name=name))


def constrain(x: jax.Array, *axes: str | None, partition: Partition | None) -> jax.Array:
    """Tell the compiler how `x` is spread: `constrain(x, "batch", "seq", "embed", partition=p)`.

    Without a partition, or on a mesh of one device, it is `x`: the program is then the same.

    Raises:
      ValueError: see `rules.spec`.
    """
    if partition is None or partition.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition.sharding(axes, x.shape))


def named(arrays: Any, axes: Any, partition: Partition) -> Any:
    """Shardings of a tree of arrays.

    Args:
      arrays: anything with a shape at the leaves: arrays, `jax.ShapeDtypeStruct`s.
      axes: the same tree with a tuple of logical axes at each leaf.
      partition: where they go.

    Raises:
      ValueError: see `rules.spec`; the message has the path of the array.
    """

    def leaf(path, array, names):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return partition.sharding(tuple(names), array.shape, name=name)

    return jax.tree_util.tree_map_with_path(leaf, arrays, axes)


def on_shards(
    body: Callable[..., Any], partition: Partition, *, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over the mesh of a partition, for kernels and sums that are written out.

    Loops in kernels do not declare over which axes they vary, hence no check of it. The gradient of
    an argument is summed over the axes that its spec leaves out; those of one device are put in, so
    that there is no sum over nothing.
    """
    alone = tuple(axis for axis, size in partition.mesh.shape.items() if size == 1)

    def named_all(spec: PartitionSpec) -> PartitionSpec:
        first, *rest = spec or (None,)
        return PartitionSpec((*_rules.names(first), *alone), *rest)

    return jax.shard_map(
        body,
        mesh=partition.mesh,
        in_specs=jax.tree.map(
            named_all, in_specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec)
        ),
        out_specs=out_specs,
        check_vma=False,
    )


def gathered(
    array: jax.Array,
    axes: tuple[str | None, ...],
    split: PartitionSpec,
    *,
    keep: Collection[str],
) -> jax.Array:
    """A shard made whole but for the logical axes to keep (ZeRO-3); inside `jax.shard_map`.

    Its gradient is a reduce-scatter.
    """
    for dimension, entry in enumerate(split):
        over = _rules.names(entry)
        if over and axes[dimension] not in keep:
            array = jax.lax.all_gather(array, over, axis=dimension, tiled=True)
    return array
