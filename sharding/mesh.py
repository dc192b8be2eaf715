"""The mesh of devices: five axes, always all there by name, of size 1 where one is not used.

    data     copies of the model, each with batches of its own; between slices first
    fsdp     splits the batch and every parameter (ZeRO-3)
    expert   splits the experts, and the batch or the sequence
    seq      splits the sequence
    tensor   splits heads, widths and the vocabulary

Outermost first: neighbours along the last axes are nearest to each other in the machine, and they
talk most.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "seq", "tensor")
# One axis, or several as one, the first of them outermost.
AxisName = str | tuple[str, ...]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1, at most once, takes all that the others leave."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
                raise ValueError(
                    f"mesh axis {axis} is {size!r}; it must be a number of devices, or -1 for all "
                    "that the other axes leave"
                )
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(
                f"mesh axes {' and '.join(free)} are both -1; only one can take what is left: "
                "give the others a number of devices"
            )


def axis_sizes(config: MeshConfig, num_devices: int, *, slices: int = 1) -> dict[str, int]:
    """Devices along each axis, in the order of AXES, when there are `num_devices`.

    Args:
      config: as asked.
      num_devices: in all slices together.
      slices: groups of devices with a slow network between them. Only `data`, and when that is not
        enough `fsdp`, may reach over it: the number of slices divides `data`, or `data` divides it
        and what remains divides `fsdp`.

    Raises:
      ValueError: no such mesh; the message names the nearest one there is.
    """
    asked = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in asked if size != -1)
    sizes = [num_devices // fixed if size == -1 else size for size in asked]
    if math.prod(sizes) == num_devices and _over_slices(sizes, slices) is not None:
        return dict(zip(AXES, sizes, strict=True))
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, asked, strict=True))
    if math.prod(sizes) == num_devices:
        problem = (
            f"cannot be laid over {slices} slices: the slices must divide data, or data them and "
            "what is left fsdp"
        )
    elif -1 in asked:
        problem = f"takes a multiple of {fixed} devices and there are {num_devices}"
    else:
        problem = f"takes {fixed} devices and there are {num_devices}"
    nearest = _nearest(asked, num_devices, slices)
    remedy = (
        f"no mesh of {num_devices} devices spans {slices} slices evenly: pass as many of each"
        if nearest is None
        else "the nearest that fits is "
        + ", ".join(f"{axis}={size}" for axis, size in zip(AXES, nearest, strict=True))
    )
    raise ValueError(f"mesh {wanted} {problem}; {remedy}")


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None, *, slices: int | None = None
) -> Mesh:
    """A mesh over devices of one process or of many, of one slice or of several.

    Within a slice the devices are arranged to suit its network (`mesh_utils`: the torus of a TPU;
    elsewhere the order they come in, which is host after host).

    Args:
      config: devices along each axis.
      devices: all there are when None.
      slices: None is what TPU devices say of themselves, and 1 elsewhere. A number cuts devices
        that do not say into as many equal runs.

    Raises:
      ValueError: the axes do not fit the devices or the slices.
    """
    found = list(jax.devices() if devices is None else devices)
    blocks = _slices(found, slices)
    sizes = list(axis_sizes(config, len(found), slices=len(blocks)).values())
    over = _over_slices(sizes, len(blocks))
    assert over is not None
    inside = (sizes[0] // over[0], sizes[1] // over[1], *sizes[2:])
    arranged = [
        mesh_utils.create_device_mesh(inside, block, allow_split_physical_axes=True)
        for block in blocks
    ]
    # Slices reach over fsdp only where data has one place in each of them, so this order is right.
    array = np.stack(arranged).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _over_slices(sizes: Sequence[int], slices: int) -> tuple[int, int] | None:
    """How many slices data and fsdp reach over; None when they cannot."""
    if sizes[0] % slices == 0:
        return slices, 1
    if slices % sizes[0] == 0 and sizes[1] % (slices // sizes[0]) == 0:
        return sizes[0], slices // sizes[0]
    return None


def _slices(devices: list[Any], slices: int | None) -> list[list[Any]]:
    # On GPUs jax calls a host a slice; between hosts any axis may run, and the order sees to that.
    says: list[Any] = [getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"]
    if len(says) == len(devices) and None not in says:
        blocks = [
            [d for d, index in zip(devices, says, strict=True) if index == wanted]
            for wanted in sorted(set(says))
        ]
        if slices not in (None, len(blocks)):
            raise ValueError(
                f"slices is {slices}, but the devices belong to {len(blocks)}; leave it None"
            )
    else:
        count = slices or 1
        if count < 1 or len(devices) % count:
            raise ValueError(
                f"{len(devices)} devices cannot be cut into {slices} equal slices; choose a "
                f"divisor of {len(devices)}"
            )
        size = len(devices) // count
        blocks = [devices[i * size : (i + 1) * size] for i in range(count)]
    if len({len(block) for block in blocks}) > 1:
        counts = ", ".join(str(len(block)) for block in blocks)
        raise ValueError(f"the slices have {counts} devices; pass as many of each")
    return blocks


def _nearest(asked: Sequence[int], num_devices: int, slices: int) -> tuple[int, ...] | None:
    """The mesh that changes the fewest axes, and those by the smallest ratio."""

    def distance(sizes: tuple[int, ...]):
        ratios = [abs(math.log(s / a)) for s, a in zip(sizes, asked, strict=True) if a != -1]
        return sum(ratio > 0 for ratio in ratios), sum(ratios), sizes

    legal = (sizes for sizes in _products(num_devices, len(asked)) if _over_slices(sizes, slices))
    return min(legal, key=distance, default=None)


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product, in order."""
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _products(number // first, factors - 1):
                yield (first, *rest)
