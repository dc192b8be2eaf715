"""What a program holds while it runs, from shapes alone: an estimate, where nothing is compiled.

Arrays that stay are exact. What comes and goes is followed through the traced program in its order,
elementwise work taken to be fused; the compiler orders and fuses as it likes, and its own analysis
replaces these numbers wherever a program is compiled.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Jaxpr, Literal

from mmx.planning.equations import inner_jaxprs, size_of
from mmx.planning.programs import Program
from mmx.planning.walk import COLLECTIVES, layer_of

# Their results are views of an operand.
_VIEWS = frozenset(
    {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "optimization_barrier", "name"}
    | {"stop_gradient", "copy", "transpose"}
)
# Their results are always arrays of their own; all others are fused into who reads them.
_WHOLE = frozenset(
    {"dot_general", "ragged_dot_general", "gather", "scatter", "scatter-add", "sort", "concatenate"}
    | {"pallas_call", "scan", "while", "cond", "shard_map", "dynamic_update_slice", "cumsum"}
    | {"custom_partitioning", "ffi_call", *COLLECTIVES}
)
Size = Callable[[Any], float]


@dataclass(frozen=True)
class Work:
    """Bytes of one device that come and go.

    Attributes:
      kept: what the forward pass keeps for the backward one, all layers.
      most: the most that is there at once beside.
      arrays: (bytes, scope, shape) of the largest that are made.
      stacked: the same, of what loops keep of each turn; a mask that does not depend on what is
        differentiated is kept for all turns at once.
      hoisted: the same, of what is made of nothing before a loop that reads it in every turn: jax
        moves it there when it differentiates the loop. Not in `most`, for XLA may move it back.
    """

    kept: float
    most: float
    arrays: list[tuple[float, str, str]]
    stacked: list[tuple[float, str, str]]
    hoisted: list[tuple[float, str, str]]


def work(program: Program, jaxpr: Jaxpr) -> Work:
    """What a traced program needs beside its arguments and their gradients."""
    size = _device_size(program)
    weights = dict(enumerate(program.facts.layer_weights))
    kept = most = 0.0
    head = 0.0
    for eqn, inside in _outermost(jaxpr, size):
        if eqn.primitive.name == "shard_map":
            # The head: what its forward pass leaves is there during its backward pass.
            (body,) = inner_jaxprs(eqn)
            most = max(most, head + _peak(body, size_of))
            head += sum(_results(eqn, inside))
            continue
        scan, body = eqn, eqn.params["jaxpr"].jaxpr
        most = max(most, _peak(body, size))
        pairs = zip(body.outvars, scan.outvars, strict=True)
        stacked = [inner for inner, outer in pairs if _shape(inner) != _shape(outer)]
        backward = "transpose" in str(scan.source_info.name_stack)
        if program.request.mode == "train" and not backward:
            made = {v: eqn for eqn in body.eqns for v in eqn.outvars}
            for v in stacked:
                layer = layer_of(made[v]) if not isinstance(v, Literal) and v in made else None
                stands_for = 1 if layer is None else weights.get(layer, 1)
                kept += scan.params["length"] * stands_for * size(v)
    largest = sorted(set(_arrays(jaxpr, size, "")), reverse=True)
    stacked = sorted(set(_stacked(jaxpr, size, "")), reverse=True)
    hoisted = sorted(set(_hoisted(jaxpr, size, weights)), reverse=True)
    return Work(kept, most, largest[:10], stacked[:10], hoisted[:10])


def _constants(jaxpr: Jaxpr) -> set[Any]:
    """Results that depend on no argument."""
    known: set[Any] = set()
    for eqn in jaxpr.eqns:
        if all(isinstance(v, Literal) or v in known for v in eqn.invars):
            known |= set(eqn.outvars)
    return known


def _hoisted(jaxpr: Jaxpr, size: Size, weights: dict) -> Iterator[tuple[float, str, str]]:
    known = _constants(jaxpr)
    read = {v for eqn in jaxpr.eqns if eqn.primitive.name == "scan" for v in _variables(eqn)}
    for eqn in jaxpr.eqns:
        for v, bytes_ in zip(eqn.outvars, _results(eqn, size), strict=True):
            if v in known and v in read and eqn.primitive.name == "shard_map":
                layer = layer_of(eqn)
                times = 1 if layer is None else weights.get(layer, 1)
                yield bytes_ * times, _scope("", eqn), _shape(v)
        for inner in _bodies(eqn):
            yield from _hoisted(inner, _inside(eqn, size), weights)


def _stacked(jaxpr: Jaxpr, size: Size, scope: str) -> Iterator[tuple[float, str, str]]:
    for eqn in jaxpr.eqns:
        here = _scope(scope, eqn)
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            for inner, outer in zip(body.outvars, eqn.outvars, strict=True):
                if _shape(inner) != _shape(outer):
                    yield eqn.params["length"] * size(inner), here, _shape(outer)
        for one in _bodies(eqn):
            yield from _stacked(one, _inside(eqn, size), here)


def _scope(scope: str, eqn: Any) -> str:
    return "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))


def _shape(v: Any) -> str:
    return getattr(v.aval, "str_short", lambda: "")()


def _outermost(jaxpr: Jaxpr, size: Size) -> Iterator[tuple[Any, Size]]:
    """The scans and the `shard_map`s that lie in no other; what is made of nothing left out."""
    known = _constants(jaxpr)
    for eqn in jaxpr.eqns:
        if eqn.outvars and all(v in known for v in eqn.outvars):
            continue
        if eqn.primitive.name in ("scan", "shard_map"):
            yield eqn, size
        else:
            for inner in inner_jaxprs(eqn):
                yield from _outermost(inner, size)


def _device_size(program: Program) -> Size:
    """Bytes on a device of an array outside of `shard_map`, whose split is the compiler's choice.

    Weights and their gradients lie as they do in the state; what has tokens is split as tokens are.
    """
    ask, partition = program.request, program.partition
    tokens = ask.batch * (1 if ask.mode == "decode" else ask.seq)
    over = partition.devices_of("batch", "seq")
    shards: dict[tuple[int, ...], int] = {}
    memory = ("keys and values", "states")
    donated = {entry.shape for entry in program.entries if entry.category in memory}
    for entry in program.entries:
        if entry.category in ("parameters", *memory):
            for shape in (entry.shape, entry.shape[1:]):
                shards[shape] = max(shards.get(shape, 1), entry.shards)

    def size(v: Any) -> float:
        whole = size_of(v)
        shape = getattr(v.aval, "shape", ())
        if shape in donated:  # updated in place
            return 0.0
        if shape in shards and len(shape) > 1:
            return whole / shards[shape]
        elements = math.prod(shape)
        return whole / over if elements and elements % tokens == 0 and tokens > 1 else whole

    return size


def _peak(jaxpr: Jaxpr, size: Size) -> float:
    """The most bytes at once of what a jaxpr makes, its arguments not counted."""
    alias, readers = _views(jaxpr), _readers(jaxpr)

    def root(v):
        while v in alias:
            v = alias[v]
        return v

    last = {root(v): number for number, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn)}
    ends = {root(v) for v in jaxpr.outvars if not isinstance(v, Literal)}
    freed: dict[int, list[Any]] = {}
    for v, number in last.items():
        if v not in ends:
            freed.setdefault(number, []).append(v)
    alive: dict[Any, float] = {}
    now = most = 0.0
    for number, eqn in enumerate(jaxpr.eqns):
        inner = max((_peak(one, _inside(eqn, size)) for one in _bodies(eqn)), default=0.0)
        for v, bytes_ in zip(eqn.outvars, _results(eqn, size), strict=True):
            if v not in alias and _is_array(eqn, v, readers, ends):
                alive[v] = bytes_
                now += bytes_
        most = max(most, now + inner)
        now -= sum(alive.pop(v, 0.0) for v in freed.get(number, ()))
    return most


def _variables(eqn: Any) -> Iterator[Any]:
    return (v for v in eqn.invars if not isinstance(v, Literal))


def _readers(jaxpr: Jaxpr) -> dict[Any, list[Any]]:
    readers: dict[Any, list[Any]] = {}
    for eqn in jaxpr.eqns:
        for v in _variables(eqn):
            readers.setdefault(v, []).append(eqn)
    return readers


def _views(jaxpr: Jaxpr) -> dict[Any, Any]:
    """Results that are views, and what they are views of."""
    views = (eqn for eqn in jaxpr.eqns if eqn.primitive.name in _VIEWS)
    pairs = (pair for eqn in views for pair in zip(eqn.outvars, eqn.invars, strict=False))
    return {out: given for out, given in pairs if not isinstance(given, Literal)}


def _results(eqn: Any, size: Size) -> list[float]:
    """Bytes of each result on a device."""
    if eqn.primitive.name != "shard_map":
        return [size(v) for v in eqn.outvars]
    (body,) = inner_jaxprs(eqn)
    return [0.0 if isinstance(v, Literal) else size_of(v) for v in body.outvars]


def _is_array(eqn: Any, v: Any, readers: dict, ends: set) -> bool:
    if eqn.primitive.name in _WHOLE or any(True for _ in inner_jaxprs(eqn)) or v in ends:
        return True
    return any(reader.primitive.name in _WHOLE for reader in readers.get(v, ()))


def _bodies(eqn: Any) -> Iterator[Jaxpr]:
    if eqn.primitive.name != "pallas_call":
        yield from inner_jaxprs(eqn)


def _inside(eqn: Any, size: Size) -> Size:
    return size_of if eqn.primitive.name == "shard_map" else size


def _arrays(jaxpr: Jaxpr, size: Size, scope: str) -> Iterator[tuple[float, str, str]]:
    for eqn in jaxpr.eqns:
        here = _scope(scope, eqn)
        if eqn.primitive.name in _WHOLE:
            for v, bytes_ in zip(eqn.outvars, _results(eqn, size), strict=True):
                yield bytes_, here, f"{eqn.primitive.name} {_shape(v)}"
        for one in _bodies(eqn):
            yield from _arrays(one, _inside(eqn, size), here)
