"""The plan of a conversion as rows to print: what becomes of each tensor of the source."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mmx.convert.plan import Plan
from mmx.convert.source import CARRIED, PARAMS


@dataclass(frozen=True)
class Row:
    """One line of the printed plan: what a tensor of the source becomes."""

    key: str
    target: str
    shape: tuple[int, ...]
    dtype: str
    transform: str
    nbytes: int


def rows(plan: Plan) -> Iterator[Row]:
    """Every tensor of the source with what becomes of it, then what is computed."""
    source = plan.source
    targets = _targets(plan)
    for place, entry in source.entries.items():
        target, dtype = targets[place]
        stored = source.dtype(entry)
        nbytes = math.prod(entry.matrix) * stored.itemsize
        steps = [] if plan.tensors or not entry.transpose else ["transpose"]
        steps += [f"{stored} -> {dtype}"] if stored != dtype else []
        key = entry.key if source.fields is not None and source.form != "orbax" else entry.path
        shown = ", ".join(steps) or "copy"
        yield Row(key, target, entry.matrix, str(stored), shown, nbytes)
    kept = {name.replace("/", ".") for name in plan.trees.get(CARRIED, {})} | set(plan.tensors)
    for key, stored in source.carried.items():
        where = f"{CARRIED}/{key.replace('.', '/')}" if plan.trees else key
        target, how = (where, "copy") if key in kept else ("-", "dropped")
        yield Row(key, target, stored.shape, str(stored.dtype), how, stored.nbytes)
    for key, reason in source.dropped.items():
        yield Row(key, "-", (), "", f"dropped ({reason})", 0)
    for name, tensor in plan.tensors.items():
        if tensor.kind == "table":
            stored = tensor.stored
            yield Row("-", name, stored.shape, str(stored.dtype), "computed", stored.nbytes)


def _targets(plan: Plan) -> dict[tuple[str, tuple[int, ...]], tuple[str, np.dtype]]:
    """Of each part of each parameter, where it goes and its dtype there."""
    if plan.trees:
        arrays = plan.trees[PARAMS]
        return {
            (path, index): (f"{PARAMS}/{path}{list(index) or ''}", jnp.dtype(arrays[path].dtype))
            for path, index in plan.source.entries
        }
    found: dict[tuple[str, tuple[int, ...]], tuple[str, np.dtype]] = {}
    for name, tensor in plan.tensors.items():
        for entry in tensor.entries:
            part = ", ".join(
                f"{p.start}:{p.stop}" if isinstance(p, slice) else str(p) for p in entry.key_slice
            )
            target = f"{name}[{part}]" if part else name
            found[entry.path, entry.index] = (target, tensor.stored.dtype)
    return found
