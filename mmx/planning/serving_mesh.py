"""Meshes for inference when none was named: the experts over as many devices as can share them."""

from collections.abc import Iterator
from typing import Any

from mmx.planning.programs import Request, build, request
from sharding import MeshConfig


def legal(fields: dict[str, Any], chosen_rules: str = "auto") -> Iterator[Request]:
    """Requests for prefill or decode on all devices, the experts split most first.

    What the experts leave goes to products in decode, and to rows or the sequence in prefill;
    `data` has a copy for each slice, and more only where nothing else divides.

    Args:
      fields: of `mmx.planning.programs.request`, without mesh and rules.
      chosen_rules: as there.
    """
    for mesh in _meshes(fields):
        try:
            ask = request(mesh=mesh, chosen_rules=chosen_rules, **fields)
            build(ask)
        except ValueError:  # sizes of the model or the batch do not divide
            continue
        yield ask


def _meshes(fields: dict[str, Any]) -> Iterator[MeshConfig]:
    devices, slices = fields["topology"].devices, fields["topology"].slices
    axes = ("tensor",) if fields["mode"] == "decode" else ("fsdp", "seq", "tensor")
    for data in _divisors(devices):
        if data % slices == 0:
            for expert in reversed(_divisors(devices // data)):
                rest = devices // data // expert
                if fields["config"].num_experts % expert == 0:
                    for axis in axes if rest > 1 else axes[:1]:
                        sizes = {"fsdp": 1, axis: rest}
                        yield MeshConfig(data=data, expert=expert, **sizes)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
