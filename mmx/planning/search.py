"""Meshes of a topology, the best first."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from mmx.planning.programs import Request, build, request
from mmx.planning.report import Plan, make_plan
from sharding import MeshConfig

TRACED = 8  # candidates that are looked at closely
SHOWN = 5


def best(fields: dict[str, Any], *, traced: int = TRACED) -> list[Plan]:
    """Plans of legal meshes that fit, by predicted throughput.

    What does not divide, and what does not hold even the arrays that stay, is left out by shapes
    alone; of the rest those with the fewest split products and the smallest arrays are traced.

    Args:
      fields: of `request`, without mesh.
      traced: how many.
    """
    candidates = []
    for mesh in _meshes(fields):
        try:
            ask = request(mesh=mesh, **fields)
            entries = build(ask).entries
        except ValueError:
            continue
        stays = sum(entry.device_bytes for entry in entries)
        if stays < ask.topology.device_hbm:
            candidates.append((mesh.tensor, mesh.seq, stays, ask))
    candidates.sort(key=lambda one: one[:3])
    plans = []
    for *_, ask in candidates[:traced]:
        try:
            plans.append(make_plan(ask))
        except ValueError:
            continue
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.bound.serial)


def _meshes(fields: dict[str, Any]) -> Iterator[MeshConfig]:
    config, topology = fields["config"], fields["topology"]
    experts = [n for n in _divisors(config.num_experts) if topology.devices % n == 0]
    tensors = [n for n in (1, 2, 4, 8, 16) if config.num_kv_heads % n == 0]
    sequences = [1 << n for n in range(10)] if fields["mode"] != "decode" else [1]
    for expert, tensor, seq in itertools.product(experts, tensors, sequences):
        rest, remainder = divmod(topology.devices, expert * tensor * seq)
        if remainder or rest < 1:
            continue
        for data in {topology.slices, math.gcd(rest, fields["batch"])}:
            if rest % data == 0:
                sizes = dict(expert=expert, tensor=tensor, seq=seq)
                yield MeshConfig(data=data, fsdp=rest // data, **sizes)


def _divisors(number: int) -> list[int]:
    return [n for n in range(number, 0, -1) if number % n == 0]


def print_best(fields: dict[str, Any], console: Console) -> Request | None:
    """Print the best five; the request of the winner, or None where none fits."""
    plans = best(fields)
    if not plans:
        console.print("no mesh that was tried fits; take more devices, or see `mmx plan --quick`")
        return None
    table = Table("mesh", "rules", "peak", "tokens/s", "share of peak", title="best meshes")
    for plan in plans[:SHOWN]:
        ask, bound = plan.request, plan.bound
        mesh = ",".join(f"{axis}={size}" for axis, size in ask.mesh.items() if size > 1)
        speed = f"{bound.tokens / bound.serial:,.0f}"
        share = f"{bound.share(bound.serial):.0%}"
        table.add_row(mesh, ask.rules.name, decimal(plan.total), speed, share)
    console.print(table)
    return plans[0].request
