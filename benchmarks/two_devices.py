"""Two devices beside one, in one run: the same work split, or twice the work, and what it takes.

    python benchmarks/two_devices.py [--json FILE] [--budget SECONDS] [--only lasp,one,fsdp,...]
    python benchmarks/two_devices.py --smoke      everything, tiny, on two CPU devices

    lasp    lightning attention with the heads of Text-01, 1M tokens of one row split in two
    layer   a whole lightning layer of bench-4b with a row of 1M tokens
    one     a training step of bench-4b on one device: what the next ones are compared to
    fsdp    the same with twice the rows, parameters and optimizer spread over both devices
    expert  the same, half of the experts on each device
    ring    softmax attention, 256K tokens of one row around a ring; also of packed documents
    moe     the experts of a layer of Text-01, half on each device, twice the tokens
    plan    what `mmx plan` says of these steps, which needs no device
    data    the step with twice the rows and everything on both devices

Each part is a process of its own, so that it finds the memory of the devices empty and the peak of
the runtime is its own. `times` is the time of one device over that of two for the same work, or the
tokens a second of two over those of one. On one device operations take their ordinary path. Of
attention, `out` is forward with its output alone, `forward` with the final state as well, which a
layer in training reports, and `both` with the backward pass. `error` is the relative difference of
two devices' results from one's, or of the first loss, the second device's rows being those of the
first. `peak` has bytes of one device as planned, as compiled and as the runtime saw them, and the
FLOPs planned over the count of `mmx.training.flops`. `--trace DIR` profiles a step of fsdp, one of
expert, passes of layer and one of lasp, keeps them there and reads them.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report  # isort: skip
import jax

import mmx
from benchmarks.parts import Emit, make_parser, memory_variables, parse, run_here, run_in_process
from benchmarks.sharded_operations import lasp, layer, moe, ring
from benchmarks.sharded_setting import DEVICES, MESHES, Setting
from benchmarks.sharded_steps import plan, train

PARTS: dict[str, Callable[[Emit, Setting], None]] = {
    "lasp": lasp,
    "layer": layer,
    "one": functools.partial(train, name="one"),
    "fsdp": functools.partial(train, name="fsdp"),
    "expert": functools.partial(train, name="expert"),
    "ring": ring,
    "moe": moe,
    "plan": plan,
    "data": functools.partial(train, name="data"),
}


# ---------------------------------------------------------------- the report


def compare(report: Report) -> None:
    """Tokens/s of two devices over those of one, and the three sizes of each step."""
    steps = {row["part"]: row for row in report.rows if "tokens_per_s" in row}
    memory = {row["memory"]: row for row in report.rows if "memory" in row}
    plans = {row["plan"]: row for row in report.rows if "plan" in row}
    if one := steps.get("one"):
        for name in MESHES:
            if row := steps.get(name):
                report.add(compared=name, to="one",
                           times=row["tokens_per_s"] / one["tokens_per_s"],
                           error=abs(row["loss"] - one["loss"]) / one["loss"])  # fmt: skip
    for name, row in memory.items():
        peak = {key: value for key, value in row.items() if key != "memory"}
        if planned := plans.get(name):
            peak["planned_GB"] = planned["planned_GB"]
            peak["flops_planned_over_counted"] = (
                planned["planned_TFLOP"] / planned["analytic_TFLOP"]
            )
        for key in ("planned", "compiled"):
            if f"{key}_GB" in peak and "runtime_GB" in peak:
                peak[f"{key}_over_runtime"] = peak[f"{key}_GB"] / peak["runtime_GB"]
        report.add(peak=name, **peak)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__, PARTS, budget=480)
    parser.add_argument("--rows", type=int, default=4, help="of a training step, a device")
    parser.add_argument("--length", type=int, default=4096, help="of its rows")
    parser.add_argument("--remat", default="", help="none, layer or superblock; as memory allows")
    parser.add_argument("--moment", default="", help="dtype of AdamW's first; as memory allows")
    parser.add_argument("--capacity", type=float, help="room of an expert, 1 being even; no bound")
    parser.add_argument("--seconds", type=float, default=5, help="of timing a training step")
    parser.add_argument("--trace", default="", metavar="DIR", help="profile, and keep it there")
    return parse(parser, PARTS)


def make_setting(options: argparse.Namespace) -> Setting:
    common = dict(
        remat=options.remat,
        moment=options.moment,
        capacity=options.capacity,
        trace=options.trace,
    )
    if options.smoke:
        tiny = dataclasses.replace(mmx.preset("tiny"), layer_kinds=("lightning", "softmax"))
        return Setting(
            config=tiny,
            rows=2,
            length=64,
            lasp_length=1024,
            lasp_heads=(4, 2),
            ring_length=256,
            ring_heads=(4, 2),
            document=64,
            moe=tiny,
            moe_tokens=64,
            head_dim=16,
            seconds=0.2,
            **common,
        )
    return Setting(
        config=mmx.preset(options.preset),
        rows=options.rows,
        length=options.length,
        lasp_length=1 << 20,
        lasp_heads=(64, 32, 16),
        ring_length=1 << 18,
        ring_heads=(32, 4),
        document=1 << 15,
        moe=mmx.preset("minimax-text-01"),
        moe_tokens=16384,
        head_dim=128,
        seconds=options.seconds,
        **common,
    )


def main() -> int:
    options = parse_options()
    if options.smoke:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    if options.part:
        return run_here(PARTS[options.part], make_setting(options), options.cache)
    parts = options.only.split(",")
    if len(jax.devices()) < DEVICES and set(parts) - {"one", "plan"}:
        print(f"{len(jax.devices())} device here; {DEVICES} are compared", file=sys.stderr)
        return 2
    report = Report(options.budget, options.json)
    # bench-4b in fp32 with all it keeps for the backward pass takes 102 GB; see results/train_h200.
    large = "h200" in jax.devices()[0].device_kind.lower()
    chosen = {
        "--remat": "none" if large else "layer",
        "--moment": "float32" if large else "bfloat16",
    }
    given = {"--remat": options.remat, "--moment": options.moment}
    with tempfile.TemporaryDirectory() as cache:
        arguments = [*sys.argv[1:], "--cache", cache]
        for flag, value in chosen.items():
            arguments += [flag, given[flag] or value]
        for part in parts:
            variables = memory_variables(part)
            if part == "plan":
                variables["JAX_PLATFORMS"] = "cpu"
            run = functools.partial(run_in_process, report, __file__, part, arguments, variables)
            report.attempt(part, run, seconds=15)
    compare(report)
    report.table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
