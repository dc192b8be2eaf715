"""Messages between devices in a compiled program: its text, with loops multiplied.

The compiler adds collectives that no program names (those that bring a weight to where it is used)
and merges or moves those that are named, so a compiled program is asked itself.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mmx.planning.walk import PARTS, Collective, part_of_names

KINDS = (
    "ragged-all-to-all",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-~]+) = (.*)$")
_OPCODE = re.compile(r"(?<![\w%.\-])([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-~]+)")
_BRANCHES = re.compile(r"(?:branch_computations|true_computation|false_computation)=\{?([^}\s]*)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5}


@dataclass
class _Computation:
    lines: list[str] = field(default_factory=list)
    entry: bool = False


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Kind, mesh axes, part, count and bytes of every message of a step, on one device.

    Bytes of a call are the larger of operand and result; of a ragged exchange the smaller, which
    is the rows there are where experts are even and the other the room for them. A loop turns as
    often as the compiler says or its condition shows, else once.

    Args:
      text: `compiled.as_text()`.
      mesh: axes in order with their sizes.
    """
    computations = _parse(text)
    found: dict[tuple[str, tuple[str, ...], str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for line, times in _run(computations):
        kind = _kind(line)
        if kind is None:
            continue
        axes = _axes(line, mesh)
        if math.prod(mesh[axis] for axis in axes) == 1:
            continue  # every device to itself
        name = _NAME.search(line)
        part = part_of_names(re.findall(r"[A-Za-z_]\w*", name[1]) if name else [])
        entry = found[kind, axes, part]
        entry[0] += times
        entry[1] += times * _size(line, kind, computations)
    result = [Collective(*key, count, size) for key, (count, size) in found.items()]
    return sorted(result, key=lambda c: (-c.bytes, PARTS.index(c.part)))


def _parse(text: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = {}
    current = None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header[2]] = _Computation(entry=bool(header[1]))
        elif current is not None and _INSTRUCTION.match(line):
            current.lines.append(line)
    return computations


def _run(computations: dict[str, _Computation]) -> Iterator[tuple[str, float]]:
    """Every instruction that runs, with how often."""
    entry = next(name for name, one in computations.items() if one.entry)
    stack = [(entry, 1.0)]
    while stack:
        name, times = stack.pop()
        for line in computations[name].lines:
            yield line, times
            opcode = _opcode(line)
            turns = times
            if opcode == "while":
                turns = times * _trips(line, computations)
            branches = _BRANCHES.search(line)
            called = _CALLED.findall(line) if opcode != "all-reduce" else []
            if branches:
                called += [one.strip().lstrip("%") for one in branches[1].split(",")]
            # A condition has no messages; a reduction's sum is no program of its own.
            stack += [(one, turns) for one in called if one in computations]


def _opcode(line: str) -> str:
    match = _INSTRUCTION.match(line)
    found = _OPCODE.search(match[2]) if match else None
    return found[1] if found else ""


def _kind(line: str) -> str | None:
    opcode = _opcode(line).removesuffix("-start")
    return opcode if opcode in KINDS else None


def _trips(line: str, computations: dict[str, _Computation]) -> int:
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-~]+)", line)
    if condition is None:
        return 1
    text = "\n".join(_nested(condition[1], computations))
    # `i < n` of a counter from zero: the one integer constant of the condition.
    constants = {int(n) for n in re.findall(r"s32\[\][^=]*constant\((\d+)\)", text)}
    return constants.pop() if len(constants) == 1 and "direction=LT" in text else 1


def _nested(name: str, computations: dict[str, _Computation]) -> Iterator[str]:
    for line in computations[name].lines if name in computations else ():
        yield line
        for called in _CALLED.findall(line):
            yield from _nested(called, computations)


def _size(line: str, kind: str, computations: dict[str, _Computation]) -> float:
    body = line.split(" = ", 1)[1]
    opcode = _OPCODE.search(body)
    assert opcode is not None
    results = [_bytes(one) for one in _ARRAY.finditer(body[: opcode.start()])]
    if opcode[1].endswith("-start") and len(results) > 1:
        # (operands..., results..., context): the larger half is what matters.
        return max(results)
    total = sum(results)
    group = _group_size(line)
    if kind == "reduce-scatter":
        return total * group
    if kind == "ragged-all-to-all":
        operands = [_operand_bytes(name, computations) for name in _operands(body, opcode.end())]
        return min([total, *(size for size in operands[:1] if size)])
    return total


def _operands(body: str, start: int) -> list[str]:
    return re.findall(r"%([\w.\-~]+)", body[start : body.index(")", start)])


def _operand_bytes(name: str, computations: dict[str, _Computation]) -> float:
    for computation in computations.values():
        for line in computation.lines:
            match = _INSTRUCTION.match(line)
            if match and match[1] == name:
                opcode = _OPCODE.search(match[2])
                head = match[2][: opcode.start()] if opcode else match[2]
                return sum(_bytes(one) for one in _ARRAY.finditer(head))
    return 0


def _bytes(array: re.Match) -> float:
    sizes = [int(n) for n in array[2].split(",") if n]
    digits = re.search(r"\d+", array[1])
    width = _WIDTHS.get(array[1]) or (int(digits[0]) / 8 if digits else 0)
    return math.prod(sizes) * width


# ---------------------------------------------------------------- groups of devices


def _group_size(line: str) -> int:
    group = _first_group(line)
    return len(group) if group else 1


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    named = re.search(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}", line)
    if named:
        axes = tuple(re.findall(r"'(\w+)'", named[1]))
        if all(axis in mesh for axis in axes):
            return axes
    group = _first_group(line)
    if not group:
        return tuple(axis for axis, size in mesh.items() if size > 1)
    strides, stride = {}, 1
    for axis, size in reversed(list(mesh.items())):
        strides[axis], stride = stride, stride * size
    places = [{axis: d // strides[axis] % size for axis, size in mesh.items()} for d in group]
    return tuple(axis for axis in mesh if len({place[axis] for place in places}) > 1)


def _first_group(line: str) -> list[int]:
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        numbers = [
            tuple(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)", pairs[1])
        ]
        return _chain(numbers)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        wanted = re.findall(r"'(\w+)'", named[2])
        ranges = [range(n) if axis in wanted else (0,) for axis, n in sizes.items()]
        return [_flat(place, list(sizes.values())) for place in itertools.product(*ranges)]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(shape)))
        places = itertools.product(*(range(shape[axis]) for axis in order))
        first = itertools.islice(places, int(iota[2]))
        unordered = (dict(zip(order, place, strict=True)) for place in first)
        return [_flat([one[axis] for axis in range(len(shape))], shape) for one in unordered]
    return []


def _chain(pairs: list[tuple[int, ...]]) -> list[int]:
    """The devices that one can reach, of the largest ring there is."""
    rings: list[set[int]] = []
    for pair in pairs:
        touched = [ring for ring in rings if ring & set(pair)]
        rings = [ring for ring in rings if ring not in touched]
        rings.append(set(pair).union(*touched))
    return sorted(max(rings, key=len))


def _flat(place, sizes: list[int]) -> int:
    number = 0
    for index, size in zip(place, sizes, strict=True):
        number = number * size + index
    return number
