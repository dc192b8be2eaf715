"""A plan: everything known of a request, as a record, and as one screen."""

import dataclasses
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mmx.planning import implicit
from mmx.planning.aot import Compiled
from mmx.planning.lowering import Lowered
from mmx.planning.memory import Work, work
from mmx.planning.programs import Program, Request, build
from mmx.planning.roofline import Roofline, roofline
from mmx.planning.walk import Collective, count, live

LARGE = 0.05  # of the memory: from here on an array is worth a warning


@dataclass(frozen=True)
class Plan:
    """What a program needs, and how fast it could be; bytes and FLOPs are of one device.

    Attributes:
      request: what was asked.
      memory: bytes by category.
      capacity: of a device.
      bound: see `Roofline`.
      messages: named and expected, or those of the compiled program.
      largest: (bytes, name, shape) of the largest arrays.
      warnings: one sentence each.
      compiled: what the compiler says; None when it was not asked.
      lowered: what became of it on the way to a compiler that is not asked; None if not tried.
    """

    request: Request
    memory: dict[str, int]
    capacity: int
    bound: Roofline
    flops_again: float
    messages: list[Collective]
    largest: list[tuple[float, str, str]]
    warnings: list[str]
    compiled: Compiled | None = None
    lowered: Lowered | None = None

    @property
    def total(self) -> int:
        """Peak: the compiler's where it was asked."""
        if self.compiled is not None and self.compiled.total:
            return self.compiled.total
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        found = (self.compiled, self.lowered)
        failed = any(one is not None and one.failure is not None for one in found)
        return not failed and self.total <= self.capacity


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector.

    A traced program is a million small objects that stay: looking for garbage among them over and
    over takes a third of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_uncollected()
def make_plan(
    ask: Request, compiler: Callable[[Request], Compiled | Lowered] | None = None
) -> Plan:
    """Plan from shapes and the traced program, and from what a compiler says of it.

    Args:
      ask: what to plan.
      compiler: `compile_request` or `lower_request`, asked after shapes have refused nothing.

    Raises:
      ValueError: sizes that the mesh cannot share evenly; and as `compiler`.
    """
    program = build(ask, folded=True)
    jaxpr = live(program.trace().jaxpr)
    counts = count(jaxpr, program.facts)
    needs = work(program, jaxpr)
    found = None if compiler is None else compiler(ask)
    compiled = found if isinstance(found, Compiled) else None
    memory = _memory(program, needs)
    messages = [*counts.collectives, *implicit.messages(program)]
    if compiled is not None and compiled.messages:
        messages = list(compiled.messages)
    kept = {name: float(size) for name, size in memory.items()}
    stays = [(float(e.device_bytes), e.name, _entry_shape(e)) for e in program.entries]
    return Plan(
        request=ask,
        memory=memory,
        capacity=ask.topology.device_hbm,
        bound=roofline(program, counts, messages, kept),
        flops_again=sum(counts.flops_again.values()) / ask.topology.devices,
        messages=sorted(messages, key=lambda message: -message.bytes),
        largest=sorted([*stays, *needs.arrays], reverse=True)[:10],
        warnings=_warnings(program, needs, counts.room, counts.unknown, compiled),
        compiled=compiled,
        lowered=found if isinstance(found, Lowered) else None,
    )


def _entry_shape(entry: Any) -> str:
    return f"{entry.dtype.name}[{','.join(map(str, entry.device_shape))}]"


def _memory(program: Program, needs: Work) -> dict[str, int]:
    found: Counter[str] = Counter()
    for entry in program.entries:
        found[entry.category] += entry.device_bytes
    if program.request.mode == "train":
        # The copy to compute with and its gradients; in fp32 there are gradients only as sums over
        # micro-batches, for what widens a gradient is fused into the update that reads it.
        narrow = 2 if program.request.dtype == "bfloat16" else 4
        if program.request.accumulation > 1:
            found["gradients"] = found["parameters"]
        found["copies to compute with"] = found["parameters"] // 4 * narrow * 2
        found["activations kept"] = int(needs.kept)
    found["work of a layer"] = int(needs.most)
    return dict(found)


def _warnings(
    program: Program,
    needs: Work,
    room: tuple[float, float],
    unknown: set[str],
    compiled: Compiled | None,
) -> list[str]:
    capacity, devices = program.request.topology.device_hbm, program.request.topology.devices
    found = []
    if compiled is not None and compiled.failure is not None:
        found.append(f"it does not compile: {compiled.failure}")
    for entry in program.entries:
        if devices > 1 and entry.shards == 1 and entry.device_bytes > 64 << 20:
            size = decimal(entry.device_bytes)
            found.append(f"{entry.name} is whole on every device, {size}: no rule splits it")
    for size, scope, shape in needs.stacked:
        if size > LARGE * capacity * 4 or ("bool" in shape and size > LARGE * capacity):
            found.append(
                f"a loop keeps {shape} of all its turns, {decimal(int(size))} ({_tail(scope)}): is "
                "it hoisted out of the backward pass?"
            )
    before = sum(size for size, _, _ in needs.hoisted)
    if before > LARGE * capacity:
        _, scope, shape = needs.hoisted[0]
        found.append(
            f"{decimal(int(before))} are made before the loop over the layers and kept for all its "
            f"turns unless the compiler moves them back; the largest is {shape} ({_tail(scope)})"
        )
    if room[1] > 2 and room[0] > LARGE / 4 * capacity:
        found.append(
            f"experts make room for {room[1]:.0f} times the rows they get when all get the same; "
            f"--expert-groups {2 * program.request.expert_groups} halves the room"
        )
    found += [f"a loop's turns are not known, one is counted: {_tail(one)}" for one in unknown]
    return found


def _tail(scope: str) -> str:
    return "/".join(scope.split("/")[-3:])


# ---------------------------------------------------------------- as JSON


def to_json(plan: Plan, advice: Sequence[tuple[str, int, bool]] = ()) -> dict[str, Any]:
    """The plan as plain values."""
    ask, bound = plan.request, plan.bound
    compiled = None
    if plan.compiled is not None:
        compiled = dataclasses.asdict(plan.compiled) | {"total": plan.compiled.total}
        del compiled["messages"]
    return {
        "model": ask.name,
        "mode": ask.mode,
        "topology": ask.topology.name,
        "slices": ask.topology.slices,
        "chips": ask.topology.chips,
        "devices": ask.topology.devices,
        "mesh": ask.mesh,
        "rules": ask.rules.name,
        "seq": ask.seq,
        "batch": ask.batch,
        "accumulation": ask.accumulation,
        "remat": ask.remat,
        "optimizer_dtype": ask.optimizer_dtype,
        "capacity_factor": ask.capacity_factor,
        "weights": ask.weights,
        "expert_groups": ask.expert_groups,
        "memory_bytes": plan.memory,
        "total_bytes": plan.total,
        "hbm_bytes": plan.capacity,
        "fits": plan.fits,
        "parts": [dataclasses.asdict(part) for part in bound.parts],
        "model_flops": bound.model_flops,
        "flops_again": plan.flops_again * ask.topology.devices,
        "step_seconds": {"overlapped": bound.overlapped, "serial": bound.serial},
        "tokens_per_second": {
            "overlapped": bound.tokens / bound.overlapped,
            "serial": bound.tokens / bound.serial,
        },
        "share_of_peak": {
            "overlapped": bound.share(bound.overlapped),
            "serial": bound.share(bound.serial),
        },
        "collectives": [dataclasses.asdict(message) for message in plan.messages],
        "largest": [
            {"bytes": int(size), "name": name, "shape": shape} for size, name, shape in plan.largest
        ],
        "warnings": plan.warnings,
        "compiled": compiled,
        "lowered": None if plan.lowered is None else dataclasses.asdict(plan.lowered),
        "would_fit": [
            {"setting": setting, "total_bytes": total, "fits": fits}
            for setting, total, fits in advice
        ],
    }


# ---------------------------------------------------------------- as a screen


def render(plan: Plan, advice: Sequence[tuple[str, int, bool]] = ()) -> Group:
    """One screen."""
    ask = plan.request
    mesh = (
        ", ".join(f"{axis}={size}" for axis, size in ask.mesh.items() if size > 1) or "one device"
    )
    title = (
        f"{ask.name} {ask.mode} on {ask.topology} ({ask.topology.chips} chips, "
        f"{ask.topology.devices} devices)\n{mesh}; rules {ask.rules.name}; {ask.batch} x "
        f"{ask.accumulation} rows of {ask.seq:,} tokens"
    )
    lines = [Text(f"  {warning}", style="yellow") for warning in plan.warnings]
    warnings = [Text("warnings", style="bold"), *lines] if lines else []
    return Group(
        Text(title, style="bold"),
        Columns([_memory_table(plan), _time_table(plan)]),
        Columns([_message_table(plan), _largest_table(plan)]),
        *warnings,
        *_speed(plan),
        *([] if plan.lowered is None else [Text(str(plan.lowered))]),
        *_verdict(plan, advice),
    )


def render_memory(plan: Plan, advice: Sequence[tuple[str, int, bool]]) -> Group:
    """What is of use when memory has run out: the bytes, and what would help."""
    helps = [
        Text(f"  {setting}: {decimal(total)} instead of {decimal(plan.total)}")
        for setting, total, _ in advice
    ]
    return Group(_memory_table(plan), _largest_table(plan), Text("what would help"), *helps)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        words = column in ("a device", "part", "kind", "axes", "array")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table


def _short(scope: str) -> str:
    """The end of a scope, without what every one has."""
    plain = [one for one in scope.split("/") if one not in ("rematted_computation", "")]
    return "/".join(plain[-2:])[-34:]


def _memory_table(plan: Plan) -> Table:
    source = "estimate" if plan.compiled is None else "estimate beside the compiler's"
    table = _table(f"memory ({source})", "a device", "bytes")
    for name, size in sorted(plan.memory.items(), key=lambda item: -item[1]):
        table.add_row(name, decimal(size))
    table.add_section()
    if plan.compiled is not None:
        table.add_row("estimate", decimal(sum(plan.memory.values())))
        table.add_row("compiler: arguments", decimal(plan.compiled.arguments))
        table.add_row("compiler: temporary", decimal(plan.compiled.temporary))
    table.add_row("peak", decimal(plan.total))
    table.add_row("memory of a device", decimal(plan.capacity))
    left = plan.capacity - plan.total
    table.add_row("head-room", decimal(left) if left >= 0 else f"-{decimal(-left)}")
    return table


def _time_table(plan: Plan) -> Table:
    bound = plan.bound
    table = _table("a step at the peak rates, ms", "part", "TFLOP", "compute", "HBM", "network")
    for part in bound.parts:
        times = (f"{1e3 * t:.3g}" for t in (part.compute, part.memory, part.network))
        table.add_row(part.name, f"{part.flops / 1e12:.3g}", *times)
    table.add_section()
    for name, seconds in (("overlapped", bound.overlapped), ("not overlapped", bound.serial)):
        table.add_row(name, "", f"{1e3 * seconds:.4g}", "", "")
    if plan.flops_again:
        table.caption = f"{plan.flops_again / 1e12:.3g} of the TFLOP are computed again"
    return table


def _largest_table(plan: Plan) -> Table:
    table = _table("largest arrays", "bytes", "array")
    for size, name, shape in plan.largest:
        table.add_row(decimal(int(size)), f"{_short(name)} {shape.split(' ')[-1]}")
    return table


def _message_table(plan: Plan) -> Table:
    source = "named and expected" if plan.compiled is None else "of the compiled program"
    table = _table(f"messages a step ({source})", "kind", "axes", "part", "count", "bytes")
    for message in plan.messages[:8]:
        table.add_row(
            message.kind,
            ", ".join(message.axes),
            message.part,
            f"{message.count:.0f}",
            decimal(int(message.bytes)),
        )
    return table


def _speed(plan: Plan) -> list[Text]:
    bound = plan.bound
    return [
        Text(
            f"at most {bound.tokens / seconds:,.0f} tokens/s, {bound.share(seconds):.0%} of the "
            f"peak, with messages {how}"
        )
        for how, seconds in (("overlapped", bound.overlapped), ("not overlapped", bound.serial))
    ]


def _verdict(plan: Plan, advice: Sequence[tuple[str, int, bool]]) -> list[Text]:
    if plan.fits:
        left = decimal(plan.capacity - plan.total)
        return [Text(f"it fits, with {left} to spare on each device", style="bold green")]
    over = plan.total - plan.capacity
    by = f" by {decimal(over)} on each device" if over > 0 else ""
    lines = [Text(f"it does not fit{by}", style="bold red")]
    for setting, total, fits in advice:
        verdict = "fits" if fits else "does not fit"
        lines.append(Text(f"  {setting}: {decimal(total)}, {verdict}"))
    return lines
