"""What a program holds while it runs, from shapes alone: an estimate, where nothing is compiled.

Arrays that stay are exact. What comes and goes is followed through the traced program in its order,
elementwise work taken to be fused; the compiler orders and fuses as it likes, and its own analysis
replaces these numbers wherever a program is compiled.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Jaxpr, Literal

from mmx.planning.equations import inner_jaxprs, size_of
from mmx.planning.programs import Program
from mmx.planning.steps import (
    WHOLE,
    Step,
    Widened,
    carried_by,
    carried_inside,
    same_shape,
    steps_of,
)
from mmx.planning.walk import layer_of

Size = Callable[[Any], float]
# Their results are the very arrays that their bodies end with.
_OPEN = frozenset({"shard_map", "cond"})


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
    kept = most = early = 0.0
    head = 0.0
    widened: dict[Any, Any] = {}
    for eqn, inside in _outermost(jaxpr, size):
        if eqn.primitive.name == "shard_map":
            # The head: what its forward pass leaves is there during its backward pass.
            (body,) = inner_jaxprs(eqn)
            given = {
                inner: widened[outer]
                for inner, outer in zip(body.invars, eqn.invars, strict=True)
                if not isinstance(outer, Literal) and outer in widened
            }
            most = max(most, head + _peak_of(body, size_of, {}, given, {}))
            results = _results(eqn, inside)
            for number, dtype in steps_of(body, given, {}).widened_ends.items():
                widened[eqn.outvars[number]] = dtype
                results[number] *= dtype.itemsize / eqn.outvars[number].aval.dtype.itemsize
            head += sum(results)
            continue
        scan, body = eqn, eqn.params["jaxpr"].jaxpr
        carried = sum(map(size, scan.invars[carried_by(scan)]))
        most = max(most, carried + _peak(body, size))
        if program.request.mode == "train" and program.request.remat == "none":
            early = max(early, _early(body, weights))
        pairs = zip(body.outvars, scan.outvars, strict=True)
        stacked = [inner for inner, outer in pairs if not same_shape(inner, outer)]
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
    return Work(kept, most + early, largest[:10], stacked[:10], hoisted[:10])


def _early(body: Jaxpr, weights: dict) -> float:
    """Bytes of experts' weights, and of their gradients, beside those of the layer at work.

    Unless layers are recomputed nothing holds back the gathering of the other layers' weights in a
    loop's turn, nor hurries the scattering of their gradients: a compiler that hides messages
    begins the one early and ends the other late.
    """
    layers: dict[Any, float] = {}
    for experts in body.eqns:
        for eqn in (inner for one in _bodies(experts) for inner in one.eqns):
            if eqn.primitive.name == "all_gather" and "gather_experts" in _scope("", eqn):
                layer = layer_of(experts)
                layers[layer] = layers.get(layer, 0.0) + sum(map(size_of, eqn.outvars))
    whole = sum(weights.get(layer, 1) * bytes_ for layer, bytes_ in layers.items())
    return 2 * (whole - max(layers.values(), default=0))


def _constants(jaxpr: Jaxpr) -> set[Any]:
    """Results that depend on no argument."""
    known: set[Any] = set()
    for eqn in jaxpr.eqns:
        if all(isinstance(v, Literal) or v in known for v in eqn.invars):
            known |= set(eqn.outvars)
    return known


def _hoisted(jaxpr: Jaxpr, size: Size, weights: dict) -> Iterator[tuple[float, str, str]]:
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    read = {v for scan in scans for v in scan.invars if not isinstance(v, Literal)}
    known = _constants(jaxpr) & read if scans else set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "shard_map" and known.intersection(eqn.outvars):
            layer = layer_of(eqn)
            times = 1 if layer is None else weights.get(layer, 1)
            for v, bytes_ in zip(eqn.outvars, _results(eqn, size), strict=True):
                if v in known:
                    yield bytes_ * times, _scope("", eqn), _shape(v)
        for inner in _bodies(eqn):
            yield from _hoisted(inner, _inside(eqn, size), weights)


def _stacked(jaxpr: Jaxpr, size: Size, scope: str) -> Iterator[tuple[float, str, str]]:
    for eqn in jaxpr.eqns:
        bodies = list(_bodies(eqn))
        if not bodies:
            continue
        here = _scope(scope, eqn)
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            for inner, outer in zip(body.outvars, eqn.outvars, strict=True):
                if not same_shape(inner, outer):
                    yield eqn.params["length"] * size(inner), here, _shape(outer)
        for one in bodies:
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
            # All layers, one of them, and one as it is cut out of all.
            for shape in (entry.shape, entry.shape[1:], (1, *entry.shape[1:])):
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
    return _peak_of(jaxpr, size, {}, {}, {})


def _peak_of(
    jaxpr: Jaxpr, size: Size, known: dict[Any, float], widened: Widened, carried: dict[Any, Any]
) -> float:
    """`_peak`; `known` has those of bodies met before, by identity and what is widened."""
    steps, ends, _ = steps_of(jaxpr, widened, carried)
    sizes = {
        value: bytes_
        for step in steps
        for value, bytes_ in zip(step.makes, _results(step.eqn, size), strict=False)
    }
    stored, last = _stored(steps, ends, sizes)
    freed: dict[int, list[int]] = {}
    for value, number in last.items():
        if value not in ends:
            freed.setdefault(number, []).append(value)
    alive: dict[int, float] = {}
    now = most = 0.0
    for number, step in enumerate(steps):
        inner = 0.0
        for body in _bodies(step.eqn):
            key = id(body), step.widened
            if key not in known:
                given = {body.invars[place]: dtype for place, dtype in step.widened}
                kept = carried_inside(step.eqn, body)
                known[key] = _peak_of(body, _inside(step.eqn, size), known, given, kept)
            inner = max(inner, known[key])
        before = now
        for value in step.makes:
            if value not in alive and value in stored:
                alive[value] = sizes[value]
                now += sizes[value]
        opened = step.eqn.primitive.name in _OPEN
        most = max(most, now, inner + (before if opened else now))
        now -= sum(alive.pop(value, 0.0) for value in freed.get(number, ()))
    return most


def _stored(
    steps: list[Step], ends: set[int], sizes: dict[int, float]
) -> tuple[set[int], dict[int, int]]:
    """Which values are arrays, and the number of the step that needs each of them last.

    The result of elementwise work is one if something reads it that wants an array, or if several
    do and it is no larger than what it is made of. Else whoever reads it makes it anew, of arrays
    that must be there until then.
    """
    wanted = {value for step in steps if step.whole for value in step.reads} | ends
    readers = Counter(value for step in steps for value in step.reads)
    made_of: dict[int, frozenset[int]] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        arrays = frozenset[int]().union(*(made_of.get(value, ()) for value in step.reads))
        last.update(dict.fromkeys(arrays, number))
        room = sum(map(sizes.__getitem__, arrays))
        for value in step.makes:
            shared = readers[value] > 1 and sizes[value] <= room
            own = step.whole or step.reduces or value in wanted or shared
            made_of[value] = frozenset((value,)) if own else arrays
            if own:
                last.setdefault(value, number)
    return {value for value, arrays in made_of.items() if arrays == {value}}, last


def _results(eqn: Any, size: Size) -> list[float]:
    """Bytes of each result on a device."""
    if eqn.primitive.name != "shard_map":
        return [size(v) for v in eqn.outvars]
    (body,) = inner_jaxprs(eqn)
    return [0.0 if isinstance(v, Literal) else size_of(v) for v in body.outvars]


def _bodies(eqn: Any) -> Iterator[Jaxpr]:
    if eqn.primitive.name != "pallas_call":
        yield from inner_jaxprs(eqn)


def _inside(eqn: Any, size: Size) -> Size:
    return size_of if eqn.primitive.name == "shard_map" else size


def _arrays(jaxpr: Jaxpr, size: Size, scope: str) -> Iterator[tuple[float, str, str]]:
    for eqn in jaxpr.eqns:
        bodies, whole = list(_bodies(eqn)), eqn.primitive.name in WHOLE
        if not bodies and not whole:
            continue
        here = _scope(scope, eqn)
        if whole:
            for v, bytes_ in zip(eqn.outvars, _results(eqn, size), strict=True):
                yield bytes_, here, f"{eqn.primitive.name} {_shape(v)}"
        for one in bodies:
            yield from _arrays(one, _inside(eqn, size), here)
