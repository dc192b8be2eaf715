"""Names of machines, 'v5p:8x8x8' or 'h200:8x16', and of meshes, 'fsdp=16,expert=32'."""

import difflib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from mmx.planning.chips import CHIPS, Chip
from sharding.mesh import AXES, MeshConfig

_SMALL = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}
_MOST_CHIPS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}


@dataclass(frozen=True)
class Topology:
    """A machine: `slices` times a block of chips.

    Attributes:
      chip: of which all are.
      shape: of one slice: the torus of a TPU; GPUs of a host, and hosts.
      slices: blocks with a slow network between them.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """What jax calls devices."""
        return self.chips * self.chip.devices

    @property
    def device_flops(self) -> float:
        return self.chip.bf16_flops / self.chip.devices

    @property
    def device_hbm(self) -> int:
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def device_hbm_rate(self) -> float:
        return self.chip.hbm_rate / self.chip.devices

    def __str__(self) -> str:
        slices = f"{self.slices} x " if self.slices > 1 else ""
        return f"{slices}{self.name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """The machine of this name.

    Raises:
      ValueError: there is none; the message has the names there are and the nearest.
    """
    if slices < 1:
        raise ValueError(f"--slices is {slices}; it must be at least 1")
    name, colon, sizes = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower(), CHIPS, n=1, cutoff=0.3)
        example = next(iter(_shapes(CHIPS[near[0] if near else "v5p"])))
        nearest = f"; the nearest is {_named(near[0], example)}" if near else ""
        raise ValueError(
            f"--topology {text!r} names no chip of {', '.join(CHIPS)}{nearest}; write CHIP:SHAPE, "
            "as v5p:8x8x8, v6e:16x16 or h200:8x16 (GPUs of a host x hosts)"
        )
    chip = CHIPS[name]
    parts = sizes.lower().split("x") if colon else []
    known = list(_shapes(chip))
    if not all(part.isdecimal() and 0 < int(part) < 10**6 for part in parts) or not parts:
        raise _unknown(text, chip, known, None)
    shape = tuple(int(part) for part in parts)
    if chip.kind == "gpu":
        shape = (*shape, 1)[:2] if len(shape) == 1 else shape
        if len(shape) != 2 or shape[0] > chip.host_chips:
            raise _unknown(text, chip, known, shape)
    elif tuple(sorted(shape)) not in {tuple(sorted(one)) for one in known}:
        raise _unknown(text, chip, known, shape)
    return Topology(chip, shape, slices)


def _shapes(chip: Chip) -> Iterator[tuple[int, ...]]:
    """Shapes of one slice, smallest first."""
    if chip.kind == "gpu":
        yield from ((gpus, 1) for gpus in (1, 2, 4, 8))
        yield from ((chip.host_chips, hosts) for hosts in (2, 4, 8, 16, 32, 64))
        return
    yield from _SMALL[chip.torus]
    if chip.torus == 3:
        cubes = itertools.combinations_with_replacement(range(4, 33, 4), 3)
        fitting = (one for one in cubes if math.prod(one) <= _MOST_CHIPS[chip.name])
        yield from sorted(fitting, key=math.prod)


def _unknown(
    text: str, chip: Chip, known: list[tuple[int, ...]], shape: tuple[int, ...] | None
) -> ValueError:
    chips = math.prod(shape) if shape else 1
    nearest = min(known, key=lambda one: abs(math.log(math.prod(one) / chips)))
    names = [_named(chip.name, one) for one in known]
    listed = ", ".join(names[:10] + (["...", names[-1]] if len(names) > 10 else []))
    what = "multiples of 4 in each dimension above 2x4x4; " if chip.torus == 3 else ""
    return ValueError(
        f"--topology {text!r} is no shape of {chip.name}; there are {listed} ({what}the nearest is "
        f"{_named(chip.name, nearest)})"
    )


def _named(chip: str, shape: tuple[int, ...]) -> str:
    return f"{chip}:{'x'.join(map(str, shape))}"


def parse_mesh(text: str, *, fsdp: int = -1) -> MeshConfig:
    """'fsdp=16,expert=32' as a mesh; axes that are not named are 1, and fsdp all that is left.

    Args:
      text: as on a command line.
      fsdp: what that axis is where it is not named.

    Raises:
      ValueError: an axis that is none, named twice, or a size that is no number.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(",") if text else []:
        axis, equals, size = part.partition("=")
        if axis not in AXES:
            near = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.3)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"--mesh: {axis!r} is no axis of {', '.join(AXES)}{nearest}")
        if axis in sizes:
            raise ValueError(f"--mesh names {axis} twice; give each axis one size")
        if not equals or not size.removeprefix("-").isdecimal():
            raise ValueError(f"--mesh: {part!r} is not AXIS=NUMBER, as in fsdp=16,expert=32")
        sizes[axis] = int(size)
    return MeshConfig(**({"fsdp": fsdp} | sizes))
