"""How long messages take: the links that the devices along a mesh axis have between them.

A model of bandwidth alone. On a TPU the n devices of a group are taken to fill log n / log side
dimensions of the torus, each a ring if the torus closes there; on GPUs a group that lies inside a
host has NVLink, any other the hosts' network. Latency is left out.
"""

import math
from collections.abc import Mapping

from mmx.planning.topology import Topology
from mmx.planning.walk import Collective
from sharding.mesh import AXES


def group_size(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    """Devices of one group."""
    return math.prod(mesh[axis] for axis in axes)


def seconds(message: Collective, topology: Topology, mesh: Mapping[str, int]) -> float:
    """Time of all calls of a collective, one after the other.

    An all-gather passes (n - 1) / n of its result over each device's links, as does a
    reduce-scatter of its operand; an all-reduce is both; a permute sends its operand once. In an
    all-to-all on rings of s devices the links in the middle carry s / 8 of what each sends.
    """
    n = group_size(message.axes, mesh)
    if n < 2:
        return 0.0
    rate, rings = _rate(message.axes, topology, mesh)
    share = (n - 1) / n
    if message.kind == "all-reduce":
        return 2 * share * message.bytes / rate
    if "all-to-all" in message.kind:
        side = n ** (1 / rings) if rings else 0
        hops = max(side / 4, share) if rings else share
        return hops * message.bytes / rate * (rings or 1)
    if message.kind == "collective-permute":
        return message.bytes / (rate / (2 * rings) if rings else rate)
    return share * message.bytes / rate


def _rate(axes: tuple[str, ...], topology: Topology, mesh: Mapping[str, int]) -> tuple[float, int]:
    """Bytes a second of a device to its group one way, and torus dimensions (0: a switch)."""
    chip = topology.chip
    if topology.slices > 1 and _crosses_slices(axes, topology, mesh):
        return chip.outside_rate / chip.devices, 0
    if chip.kind == "gpu":
        inside = math.prod(mesh[axis] for axis in AXES[AXES.index(axes[0]) :])
        near = inside <= topology.shape[0]
        return (chip.link_rate if near else chip.outside_rate), 0
    side = math.prod(topology.shape) ** (1 / len(topology.shape))
    n = group_size(axes, mesh)
    rings = max(1, min(chip.torus, round(math.log(n) / math.log(max(side, 2)))))
    closed = 4 if chip.torus == 3 else 16
    ways = 2 if min(topology.shape) >= closed else 1
    return rings * ways * chip.link_rate / chip.devices, rings


def _crosses_slices(axes: tuple[str, ...], topology: Topology, mesh: Mapping[str, int]) -> bool:
    # Slices lie along data first, and along fsdp as far as data is not enough.
    return "data" in axes or ("fsdp" in axes and mesh["data"] < topology.slices)
