"""From the logical axes of an array to the axes of the mesh: which dimension is split over what.

An array names its dimensions ('embed', 'heads', ...); `Rules` say which mesh axes split a name.
Nothing is left whole in silence: a size that does not divide is refused, and the caller may store
the array padded.

`embed` has three meanings, told apart by the other axes of the array: the width of activations
(arrays with 'batch' or 'seq'), of the experts' weights (arrays with 'experts'), and of all other
weights. The experts are split over `expert` already and their ZeRO-3 is over what remains, while
the other weights are split over all of it: the paper's separate process groups (section 3.1).
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """Mesh axes over which each logical axis is split, outermost first; () leaves it whole.

    Attributes:
      name: for messages.
      embed: of weights that are no expert's.
      expert_embed: 'embed' of an array that also has 'experts'.
      activation_embed: 'embed' of an array that also has 'batch' or 'seq'.
      pages: of keys and values (`sharding.paged`).
    """

    name: str
    batch: Axes = ()
    seq: Axes = ()
    embed: Axes = ()
    expert_embed: Axes = ()
    activation_embed: Axes = ()
    heads: Axes = ()
    kv_heads: Axes = ()
    head_dim: Axes = ()
    mlp: Axes = ()
    experts: Axes = ()
    expert_mlp: Axes = ()
    vocab: Axes = ()
    layers: Axes = ()
    pages: Axes = ()


LOGICAL_AXES = tuple(field.name for field in dataclasses.fields(Rules) if field.name != "name")

# ZeRO-3 alone: all devices see other rows, parameters and optimizer are spread over all.
FSDP = Rules("fsdp", batch=("data", "fsdp"), embed=("fsdp",), expert_embed=("fsdp",))
# ... and each layer's products split over `tensor`.
TENSOR = dataclasses.replace(
    FSDP,
    name="tensor",
    heads=("tensor",),
    kv_heads=("tensor",),
    mlp=("tensor",),
    expert_mlp=("tensor",),
    vocab=("tensor",),
)
# ... and experts over `expert`, which splits the batch as well.
EXPERT = dataclasses.replace(
    TENSOR,
    name="expert",
    batch=("data", "fsdp", "expert"),
    seq=("seq",),
    embed=("fsdp", "expert", "seq"),
    expert_embed=("fsdp", "seq"),
    experts=("expert",),
)
# Few rows of great length: `expert` splits the sequence instead of the batch.
LONG_CONTEXT = dataclasses.replace(
    EXPERT, name="long_context", batch=("data", "fsdp"), seq=("expert", "seq")
)
# Parameters stay where they are used. The devices of `expert` share each other layer's products;
# those of `seq` share keys and values of long contexts alone.
SERVING = Rules(
    "serving",
    batch=("data", "fsdp"),
    heads=("expert", "tensor"),
    kv_heads=("expert", "tensor"),
    mlp=("expert", "tensor"),
    experts=("expert",),
    expert_mlp=("tensor",),
    vocab=("expert", "tensor"),
    pages=("seq",),
)


def spec(
    rules: Rules,
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    *,
    name: str = "array",
) -> PartitionSpec:
    """How an array with these logical axes is split.

    Args:
      rules: which mesh axes split a logical one; mesh axes of size 1 are left out.
      axes: the logical axis of each dimension; None is never split.
      shape: sizes of the dimensions.
      mesh: with devices or abstract.
      name: of the array, for messages.

    Raises:
      ValueError: an unknown axis, two axes of the array on one of the mesh, or a size that the
        devices cannot share evenly.
    """
    if len(axes) != len(shape):
        raise ValueError(
            f"{name}: {len(axes)} logical axes {tuple(axes)} for shape {tuple(shape)}; name one a "
            "dimension, or None"
        )
    entries: list[tuple[str, ...] | str | None] = []
    taken: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        found = () if axis is None else _mesh_axes(rules, axis, axes, mesh, name)
        for mesh_axis in found:
            if mesh_axis in taken:
                raise ValueError(
                    f"{name} with axes {tuple(axes)}: {taken[mesh_axis]!r} and {axis!r} are both "
                    f"split over mesh axis {mesh_axis!r} by rules {rules.name!r}; give one of them "
                    "another mesh axis, or ()"
                )
            taken[mesh_axis] = str(axis)
        found = tuple(mesh_axis for mesh_axis in found if mesh.shape[mesh_axis] > 1)
        _require_divisible(name, axis, size, found, mesh)
        entries.append(found[0] if len(found) == 1 else found or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def padded_size(
    size: int, axis: str, axes: Sequence[str | None], *, rules: Rules, mesh: Mesh | AbstractMesh
) -> int:
    """The least size of dimension `axis`, at least `size`, that the devices share evenly."""
    found = _mesh_axes(rules, axis, axes, mesh, "padded_size")
    count = math.prod(mesh.shape[mesh_axis] for mesh_axis in found)
    return -(-size // count) * count


@dataclass(frozen=True)
class Row:
    """One array of a `table`: its shape as stored, how it is split, and bytes on each device."""

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int


def table(
    specs: Iterable[tuple[str, Sequence[int], Sequence[str | None], int]],
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    *,
    padded: Collection[str] = (),
) -> list[Row]:
    """What every array puts on each device.

    Args:
      specs: (name, shape, logical axes, bytes of one number) of each array.
      mesh: with devices or abstract.
      rules: of the split.
      padded: logical axes to store padded to what the devices share evenly.

    Raises:
      ValueError: see `spec`.
    """
    rows = []
    for name, shape, axes, itemsize in specs:
        stored = tuple(
            padded_size(size, axis, axes, rules=rules, mesh=mesh)
            if axis and axis in padded
            else size
            for size, axis in zip(shape, axes, strict=True)
        )
        split = spec(rules, axes, stored, mesh, name=name)
        devices = math.prod(mesh.shape[axis] for entry in split for axis in names(entry))
        rows.append(Row(name, stored, split, math.prod(stored) * itemsize // devices))
    return rows


def names(entry: str | Sequence[str] | None) -> Axes:
    """The mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _mesh_axes(
    rules: Rules, axis: str, axes: Sequence[str | None], mesh: Mesh | AbstractMesh, name: str
) -> Axes:
    if axis not in LOGICAL_AXES:
        raise ValueError(
            f"{name} with axes {tuple(axes)}: unknown logical axis {axis!r}; choose None or one of "
            f"{', '.join(LOGICAL_AXES)}"
        )
    meaning = axis
    if axis == "embed" and "experts" in axes:
        meaning = "expert_embed"
    elif axis == "embed" and ("batch" in axes or "seq" in axes):
        meaning = "activation_embed"
    found: Axes = getattr(rules, meaning)
    for mesh_axis in found:
        if mesh_axis not in mesh.shape:
            raise ValueError(
                f"rules {rules.name!r} split {meaning!r} over {mesh_axis!r}, which is no axis of "
                f"the mesh; it has {', '.join(mesh.shape)}"
            )
    return found


def _require_divisible(
    name: str, axis: str | None, size: int, found: Axes, mesh: Mesh | AbstractMesh
) -> None:
    count = math.prod(mesh.shape[mesh_axis] for mesh_axis in found)
    if size % count == 0:
        return
    over = " x ".join(f"{mesh_axis}={mesh.shape[mesh_axis]}" for mesh_axis in found)
    if axis in ("batch", "seq"):  # a choice of whoever runs it, as the devices are
        least = size // count * count
        sizes = f"{least} or {least + count}" if least else f"{count}"
        raise ValueError(
            f"{name}: {axis!r} has size {size}, which {count} devices ({over}) cannot share "
            f"evenly; the nearest sizes that they can are {sizes}"
        )
    below = max(n for n in range(1, count) if size % n == 0)
    above = next((n for n in range(count, size + 1) if size % n == 0), None)
    nearest = f"{below}" if above is None else f"{below} or {above}"
    padded = ""
    if axis == "vocab":
        padded = f"; or pad it to {-(-size // count) * count} words (padded_size)"
    raise ValueError(
        f"{name}: {axis!r} has size {size}, which {count} devices ({over}) cannot share evenly; "
        f"the nearest numbers that can are {nearest}{padded}"
    )
