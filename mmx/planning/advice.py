"""What would make a program fit: other settings, planned in the same way."""

import dataclasses
import itertools
from collections.abc import Iterator

from mmx.planning import serving_mesh
from mmx.planning.programs import Request, build
from mmx.planning.report import Plan, make_plan

MOST = 3
MOST_MESHES = 2
# Where layers are not recomputed each is a copy of the experts' part of the program.
MOST_GROUPS = 16


def advise(plan: Plan, *, engine: bool = False) -> list[tuple[str, int, bool]]:
    """The settings that help most: (what to write, peak bytes of a device, whether it fits).

    Those that fit come first, and of them those that change least.

    Args:
      plan: of what does not fit.
      engine: whether it is one of `mmx.Engine`, whose commands have other options than `mmx plan`.
    """
    found = []
    for setting, other in _changes(plan.request, engine):
        try:
            total = _total(plan, other)
        except ValueError:  # not with these sizes
            continue
        found.append((setting, total, total <= other.topology.device_hbm))
        if sum(fits for *_, fits in found) == MOST:
            break  # what comes later would be listed after these
    order = sorted(
        range(len(found)), key=lambda i: (not found[i][2], 0 if found[i][2] else found[i][1])
    )
    return [found[i] for i in order[:MOST]]


def _total(plan: Plan, other: Request) -> int:
    """The estimate for another request."""
    if dataclasses.replace(plan.request, optimizer_dtype=other.optimizer_dtype) != other:
        return make_plan(other).total
    # The same program but for what stays.
    entries = build(other).entries
    optimizer = sum(entry.device_bytes for entry in entries if entry.category == "optimizer")
    return sum(plan.memory.values()) - plan.memory["optimizer"] + optimizer


def _changes(ask: Request, engine: bool) -> Iterator[tuple[str, Request]]:
    """One setting changed, the least change first."""

    def change(**fields) -> Request:
        return dataclasses.replace(ask, **fields)

    if ask.mode == "train":
        if ask.remat != "layer":
            yield "--remat layer", change(remat="layer")
        groups = 4 * ask.expert_groups
        if ask.mesh["expert"] > 1 and ask.seq % groups == 0 and groups <= MOST_GROUPS:
            yield f"--expert-groups {groups}", change(expert_groups=groups)
        if ask.batch % 2 == 0:
            batch, turns = ask.batch // 2, 2 * ask.accumulation
            setting = f"--batch {batch} --accumulation {turns}"
            yield setting, change(batch=batch, accumulation=turns)
        if ask.optimizer_dtype == "float32":
            yield "--optimizer-dtype bfloat16", change(optimizer_dtype="bfloat16")
        if ask.capacity_factor is None:
            yield "--capacity-factor 1.25", change(capacity_factor=1.25)
    else:
        yield from itertools.islice(_other_meshes(ask, engine), MOST_MESHES)
        if ask.weights == "bf16":
            yield "--weights int8", change(weights="int8")
        if ask.batch > 1:
            rows = "--rows" if engine else "--batch"
            yield f"{rows} {ask.batch // 2}", change(batch=ask.batch // 2)
    slices = 2 * ask.topology.slices
    axis = "fsdp" if ask.mode == "train" else "tensor"
    larger = dataclasses.replace(ask.topology, slices=slices)
    mesh = ask.mesh | {axis: 2 * ask.mesh[axis]}
    yield f"twice the devices, {axis}={mesh[axis]}", change(topology=larger, mesh=mesh)
    shorter = ask.seq // 2
    if shorter:
        yield f"{'--max-seq-len' if engine else '--seq'} {shorter}", change(seq=shorter)


def _other_meshes(ask: Request, engine: bool) -> Iterator[tuple[str, Request]]:
    """The same devices in another way, for inference; for an engine by the rules it has."""
    fields = {f.name: getattr(ask, f.name) for f in dataclasses.fields(ask)}
    del fields["mesh"], fields["rules"]
    for other in serving_mesh.legal(fields, ask.rules.name if engine else "auto"):
        if other.mesh != ask.mesh:
            mesh = ",".join(f"{axis}={size}" for axis, size in other.mesh.items() if size > 1)
            rules = "" if other.rules == ask.rules else f" --rules {other.rules.name}"
            yield f"--mesh {mesh}{rules}", other
