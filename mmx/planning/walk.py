"""What a traced program does, counted from its jaxpr: loops multiplied, kernels by their own count.

XLA's cost analysis counts the body of a loop once, so of a scanned model it sees a fraction. Here
every equation counts as often as it runs, and for the part of the model whose name scope it has.

Outside of `shard_map` shapes are those of all devices together; inside they are one device's, and
are multiplied by the devices, so that one sum is of the whole machine. Work that devices repeat
outside of `shard_map` is not seen.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.interpreters.partial_eval as pe
from jax.extend.core import ClosedJaxpr, Jaxpr

from mmx.planning.equations import (
    dot_flops,
    equations,
    fixed_turns,
    groups_used,
    inner_jaxprs,
    opened,
    product_flops,
    products,
    size_of,
    stored_size,
    visited_share,
)

PARTS = ("lightning", "softmax", "experts", "dense", "head", "optimizer", "other")
# Of a scope, inside the names of a path; the first that is there.
_SCOPES = (
    ("optimizer", "optimizer"),
    ("head", "head"),
    ("router", "dense"),
    ("moe", "experts"),
    ("lightning_attention", "lightning"),
    ("softmax_attention", "softmax"),
    ("layer", "dense"),
)
_NAMES = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_LAYER = re.compile(r"layer_(\d+)$")
COLLECTIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "ppermute": "collective-permute",
}
# What reads or writes memory even where XLA fuses all it can.
_MOVES = frozenset(
    {"gather", "scatter", "scatter-add", "scatter_add", "sort", "concatenate", "cumsum"}
    | {"dynamic_update_slice"}
)


@dataclass(frozen=True)
class Site:
    """Where an equation is.

    Attributes:
      names: of the scopes around it, outermost first.
      times: how often it runs.
      devices: by how many one device's shapes are multiplied; 1 outside of `shard_map`.
      axis_sizes: of the mesh inside `shard_map`.
      loops: lengths of the scans around it, outermost first.
    """

    names: tuple[str, ...] = ()
    times: float = 1
    devices: int = 1
    axis_sizes: Mapping[str, int] = field(default_factory=dict)
    loops: tuple[int, ...] = ()

    @property
    def again(self) -> bool:
        """Whether it repeats what was computed before, to save memory."""
        return "rematted_computation" in self.names

    @property
    def part(self) -> str:
        part = part_of_names(self.names)
        # Projections and norms of an attention; its messages are its own.
        inner = part not in ("lightning", "softmax") or "attend" in self.names
        return part if inner else "dense"


def layer_of(eqn: Any) -> int | None:
    """The number, in its superblock, of the layer an equation belongs to."""
    names = _NAMES.findall(str(eqn.source_info.name_stack))
    return next((int(m[1]) for name in names if (m := _LAYER.match(name))), None)


def part_of_names(names: Collection[str]) -> str:
    """The part of the model that has these scopes around it."""
    found = {"layer" if _LAYER.match(name) else name for name in names}
    return next((part for scope, part in _SCOPES if scope in found), "other")


@dataclass(frozen=True)
class Collective:
    """One kind of message over the same mesh axes, for the same part.

    Attributes:
      kind: as XLA calls it.
      axes: of the mesh, as they are named in the program.
      part: of the model.
      count: calls a step.
      bytes: of all calls on one device, each the larger of operand and result.
    """

    kind: str
    axes: tuple[str, ...]
    part: str
    count: float
    bytes: float


@dataclass
class Counts:
    """Sums over a program, of all devices together.

    Attributes:
      flops: of products by part, a multiplication and an addition being two.
      flops_again: the share of them in recomputation: of layers, of the head's blocks, and what the
        backward pass of an attention does beyond the two products that each of its forward needs.
      flops_backward: of backward passes, recomputed layers left out.
      bytes: that products, kernels, gathers and the like read and write; elementwise work is taken
        to be fused into them, so this is a floor.
      collectives: explicit ones, those of `shard_map`.
      room: bytes of the largest buffer that an exchange fills, and how many times the rows are that
        it has room for when experts are even.
      unknown: loops whose number of turns only the data says, and that hold products or messages.
    """

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops_again: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops_backward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    messages: dict[tuple[str, tuple[str, ...], str], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0, 0.0])
    )
    room: tuple[float, float] = (0.0, 1.0)
    unknown: set[str] = field(default_factory=set)

    @property
    def collectives(self) -> list[Collective]:
        found = [Collective(*key, count, size) for key, (count, size) in self.messages.items()]
        return sorted(found, key=lambda c: -c.bytes)


@dataclass(frozen=True)
class Facts:
    """What a program does not say of itself.

    Attributes:
      layer_weights: how many layers of the model one of the traced superblock stands for.
      expert_rows: rows that the experts of one device (outside of `shard_map`: of all) take, given
        the devices of the site; None takes all rows there is room for.
      context: keys that paged attention visits.
      accumulation: micro-batches of a step.
    """

    layer_weights: tuple[int, ...] = ()
    expert_rows: Callable[[Site], float] | None = None
    context: int = 1
    accumulation: int = 1


def live(closed: ClosedJaxpr) -> Jaxpr:
    """A traced program without what nobody reads, as XLA will have it."""
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return jaxpr


def count(jaxpr: Jaxpr, facts: Facts | None = None) -> Counts:
    """Everything a program does; see `live`."""
    counts = Counts()
    _Walk(facts or Facts(), counts).run(jaxpr, Site())
    for part in ("lightning", "softmax"):
        backward = counts.flops_backward[part]
        forward = counts.flops[part] - counts.flops_again[part] - backward
        counts.flops_again[part] += max(0.0, backward - 2 * forward)
    return counts


class _Walk:
    def __init__(self, facts: Facts, counts: Counts):
        self.facts, self.counts = facts, counts

    def run(self, jaxpr: Jaxpr, site: Site) -> None:
        made = {}
        for eqn in jaxpr.eqns:
            made |= dict.fromkeys(eqn.outvars, eqn)
            self.equation(eqn, self.inside(site, eqn), made)

    def inside(self, site: Site, eqn: Any) -> Site:
        """The site of an equation: its own scopes after those around it."""
        own = tuple(_NAMES.findall(str(eqn.source_info.name_stack)))
        times = site.times
        layers = [int(m[1]) for name in own if (m := _LAYER.match(name))]
        if layers and not any(map(_LAYER.match, site.names)):
            times *= dict(enumerate(self.facts.layer_weights)).get(layers[0], 1)
        return _replaced(site, names=site.names + own, times=times)

    def equation(self, eqn: Any, site: Site, made: dict) -> None:
        name = eqn.primitive.name
        if name == "scan":
            length = eqn.params["length"]
            loops = (*site.loops, length)
            inner = _replaced(site, times=site.times * length, loops=loops)
            self.run(eqn.params["jaxpr"].jaxpr, inner)
        elif name == "while":
            turns = self.turns(eqn, site)
            self.run(eqn.params["body_jaxpr"].jaxpr, _replaced(site, times=site.times * turns))
        elif name == "cond":
            self.run(max((b.jaxpr for b in eqn.params["branches"]), key=product_flops), site)
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            manual = eqn.params.get("manual_axes") or mesh.axis_names
            sizes = {axis: mesh.shape[axis] for axis in manual}
            devices = site.devices * math.prod(sizes.values())
            inner = _replaced(site, devices=devices, axis_sizes={**site.axis_sizes, **sizes})
            self.run(opened(eqn.params["jaxpr"]), inner)
        elif name == "pallas_call":
            self.kernel(eqn, site)
        elif name in COLLECTIVES:
            self.collective(eqn, site)
        elif name == "dot_general":
            self.add(site, dot_flops(eqn), self.traffic(eqn, made))
        elif name in ("ragged_dot_general", "ragged_dot"):
            rows, width = eqn.invars[0].aval.shape[-2:]
            flops = 2 * self.rows(rows, site) * width * eqn.outvars[0].aval.shape[-1]
            self.add(site, flops, self.traffic(eqn, made))
        elif name in _MOVES:
            # In place but for what is new.
            size = 2 * size_of(eqn.invars[1] if name == "dynamic_update_slice" else eqn.outvars[0])
            self.add(site, 0, size)
        else:
            for inner in inner_jaxprs(eqn):
                self.run(inner, site)

    def add(self, site: Site, flops: float, moved: float) -> None:
        times = site.times * site.devices
        self.counts.flops[site.part] += times * flops
        if site.again:
            self.counts.flops_again[site.part] += times * flops
        elif "transpose" in site.names:
            self.counts.flops_backward[site.part] += times * flops
        self.counts.bytes[site.part] += times * moved

    def traffic(self, eqn: Any, made: dict) -> float:
        """Operands and results of a product; an operand that is cast on the way as it is stored."""
        return sum(stored_size(v, made) for v in eqn.invars) + sum(map(size_of, eqn.outvars))

    def collective(self, eqn: Any, site: Site) -> None:
        params = eqn.params
        axes = params.get("axes", params.get("axis_name", ()))
        axes = axes if isinstance(axes, tuple) else (axes,)
        axes = tuple(axis for axis in axes if isinstance(axis, str))
        if math.prod(site.axis_sizes.get(axis, 1) for axis in axes) == 1:
            return
        if all(source == target for source, target in params.get("perm", [(0, 1)])):
            return  # nobody sends anything, and XLA drops it
        kind = COLLECTIVES[eqn.primitive.name]
        pairs = zip(eqn.invars, eqn.outvars, strict=False)
        for operand, result in [(eqn.invars[0], eqn.outvars[0])] if "ragged" in kind else pairs:
            size = max(size_of(operand), size_of(result))
            if kind == "ragged-all-to-all":  # the rows there are, not the room for them
                rows = min(size_of(operand), size_of(result))
                self.counts.room = max(self.counts.room, (size, size / rows))
                size = rows
            entry = self.counts.messages[kind, axes, part_of_names(site.names)]
            entry[0] += site.times
            entry[1] += site.times * size

    def kernel(self, eqn: Any, site: Site) -> None:
        """A Pallas kernel: its own estimate if it has one, else its products times its grid."""
        moved = sum(map(size_of, (*eqn.invars, *eqn.outvars)))
        estimate = eqn.params.get("cost_estimate")
        if estimate is None:
            grid = [size for size in eqn.params["grid_mapping"].grid if isinstance(size, int)]
            once = Counts()
            _Walk(Facts(), once).run(opened(eqn.params["jaxpr"]), Site())
            flops = sum(once.flops.values()) * math.prod(grid) * visited_share(eqn, grid)
        else:
            flops = estimate.flops
            if "grouped_matmul" in site.names:
                flops, moved = self.grouped(eqn, site, flops)
        self.add(site, flops, moved)

    def grouped(self, eqn: Any, site: Site, flops: float) -> tuple[float, float]:
        """Of a grouped product, what the rows there are ask for of the room that there is."""
        arrays = [v for v in (*eqn.invars, *eqn.outvars) if v.aval.ndim >= 2]
        sides = [set(v.aval.shape) for v in arrays if v.aval.ndim == 2]
        room = max(set.intersection(*sides) or set.union(*sides))  # the size they have in common
        rows = self.rows(room, site)
        share = rows / room
        moved = 0.0
        for v in arrays:
            groups = v.aval.shape[0]
            used = share if v.aval.ndim == 2 else max(1.0, groups_used(groups, rows)) / groups
            moved += size_of(v) * used
        return flops * share, moved

    def rows(self, room: int, site: Site) -> float:
        """Rows of a grouped product that some expert takes, of those there is room for."""
        expected = self.facts.expert_rows
        return room if expected is None else min(room, expected(site))

    def turns(self, eqn: Any, site: Site) -> float:
        """How often a while loop turns."""
        fixed = fixed_turns(eqn)
        if fixed is not None:
            return fixed
        body = eqn.params["body_jaxpr"].jaxpr
        first = next(products(body), None)
        if "grouped_matmul" in site.names and first is not None:
            return self.blocks(first, eqn, site)
        if "attend" in site.names and first is not None:
            # Blocks of keys, of which a causal query sees half; scanned over blocks of queries.
            block = max(first.invars[1].aval.shape[1], 1)
            if site.loops and "softmax_attention" in site.names and self.facts.context == 1:
                return (site.loops[-1] + 1) / 2
            return max(1, self.facts.context / block)
        if not site.names and first is not None:
            return self.facts.accumulation
        if first is not None or any(e.primitive.name in COLLECTIVES for e in equations(body)):
            self.counts.unknown.add("/".join(site.names))
        return 1

    def blocks(self, product: Any, eqn: Any, site: Site) -> float:
        """Blocks of rows of the XLA form of a grouped product, the groups taken to be even."""
        shapes = [v.aval.shape for v in eqn.invars if getattr(v.aval, "ndim", 0) >= 2]
        groups = max((s[0] for s in shapes if len(s) == 3), default=1)
        room = max((s[0] for s in shapes if len(s) == 2), default=1)
        size = product.invars[0].aval.shape[0]
        rows = self.rows(room, site)
        used = max(1.0, groups_used(groups, rows))
        return used * math.ceil(rows / used / size - 1e-9)


def _replaced(site: Site, **changes: Any) -> Site:
    return Site(**{**vars(site), **changes})
