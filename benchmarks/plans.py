"""Plans of the released models for pods: writes docs/plans.md. Nothing is measured or run.

    python benchmarks/plans.py                     quick plans of all, into the document
    python benchmarks/plans.py --compile NAME ...  compile those first, one after the other

What a compiler said is kept in results/plans.json, with the day, and shown beside the estimates.
"""

import argparse
import datetime
import importlib.metadata
import io
import json
import resource
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
DOCUMENT = ROOT / "docs" / "plans.md"
TEXT_01 = "minimax-text-01"
MILLION = str(1 << 20)
EXAMPLES = {
    "train 8K, 512 v5p": (
        f"{TEXT_01} --mode train --topology v5p:8x8x8 --mesh fsdp=16,expert=32 --seq 8192 "
        "--batch 512 --expert-groups 8"
    ),
    "train 8K, 1024 v5p": (
        f"{TEXT_01} --mode train --topology v5p:8x8x16 --mesh fsdp=32,expert=32 --seq 8192 "
        "--batch 1024 --expert-groups 8"
    ),
    "train 8K, 2048 v5p": (
        f"{TEXT_01} --mode train --topology v5p:8x16x16 --mesh data=4,fsdp=16,expert=32 --seq 8192 "
        "--batch 2048 --expert-groups 8"
    ),
    "train 1M, 512 v5p": (
        f"{TEXT_01} --mode train --topology v5p:8x8x8 --mesh fsdp=8,expert=32,seq=2 --seq "
        f"{MILLION} --batch 8 --expert-groups 8"
    ),
    "prefill 1M, 64 v5p": (
        f"{TEXT_01} --mode prefill --topology v5p:4x4x4 --mesh expert=32,seq=2 --seq {MILLION}"
    ),
    "prefill 1M, 256 v6e": (
        f"{TEXT_01} --mode prefill --topology v6e:16x16 --mesh expert=32,seq=8 --seq {MILLION}"
    ),
    "decode 4M, 64 v5p": (
        f"{TEXT_01} --mode decode --topology v5p:4x4x4 --mesh expert=8,tensor=8 --seq {1 << 22}"
    ),
    "decode 4M, 256 v6e": (
        f"{TEXT_01} --mode decode --topology v6e:16x16 --mesh expert=32,tensor=8 --seq {1 << 22}"
    ),
    "decode 128K in int8, 8 H200": (
        f"{TEXT_01} --mode decode --topology h200:8 --mesh expert=8 --seq {1 << 17} --batch 8 "
        "--weights int8"
    ),
}
COLUMNS = ("peak GB", "of", "fits", "PFLOP a step", "tokens/s at most", "share of peak")
HEAD = """# Plans

What `mmx plan` says of MiniMax-Text-01 on machines nobody had at hand. MiniMax-M1 is the same
network, so the same plans are its. `python benchmarks/plans.py` writes this page; a test compares
its table with plans made anew.

**Nothing here was run or measured.** Bytes that stay on a device are exact; what comes and goes is
an estimate from the traced program unless the compiler's figure stands beside it. Times are bounds:
every part of the model at the peak rate of what it needs most, messages without latency. The first
rate is with messages hidden behind the work of the same part, the second without.

Where the compiler was asked, its figure says whether the plan fits: the sum of all it allocates,
which is what it compares with the memory of a device. The estimates of memory are those of a
program in its own order, fused as one would by hand; of nine figures that compilers gave for decode
and for training (three of one H200) they are within 8 %, of two for prefill 9 and 11 % below.

On GPUs nothing is compiled: counted is the program with the XLA form of its kernels. Without
`--quick` the program is also lowered, with the kernels it would run.
"""


def options_of(name: str):
    from mmx.cli import plan

    return plan.parse(EXAMPLES[name].split())


def quick(name: str):
    """The plan of an example from shapes and its traced program."""
    from mmx.cli import plan
    from mmx.planning.report import make_plan

    return make_plan(plan.request_of(options_of(name)))


def row(plan) -> tuple[float, float, str, float, float, float, float, float]:
    """What the table has of a plan."""
    bound = plan.bound
    return (
        plan.total / 1e9,
        plan.capacity / 1e9,
        "yes" if plan.fits else "no",
        (sum(p.flops for p in bound.parts) * plan.request.topology.devices) / 1e15,
        bound.tokens / bound.overlapped,
        bound.tokens / bound.serial,
        bound.share(bound.overlapped),
        bound.share(bound.serial),
    )


def line(name: str, plan, compiled: dict | None) -> str:
    peak, capacity, fits, flops, fast, slow, share, less = row(plan)
    seen = "-"
    if compiled:
        seen = f"{compiled['total'] / 1e9:.1f}" if compiled["total"] else "does not compile"
        # The compiler knows better than the estimate.
        fits = "yes" if not compiled["failure"] and compiled["total"] <= plan.capacity else "no"
    return (
        f"| {name} | {peak:.1f} | {seen} | {capacity:.1f} | {fits} | {flops:.4g} | "
        f"{fast:,.0f} / {slow:,.0f} | {share:.2f} / {less:.2f} |"
    )


def compile_one(name: str) -> dict:
    """What the compiler says of an example, and what asking took."""
    from mmx.cli import plan
    from mmx.planning.aot import compile_request

    compiled = compile_request(plan.request_of(options_of(name)))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "jax": importlib.metadata.version("jax"),
        "seconds": round(compiled.seconds, 1),
        "resident_GB": round(kilobytes * 1024 / 1e9, 2),
        "arguments": compiled.arguments,
        "temporary": compiled.temporary,
        "total": compiled.total,
        "failure": compiled.failure,
    }


def document(known: dict[str, dict]) -> str:
    from rich.console import Console

    from mmx.planning.report import render

    lines, screens = [], []
    for name in EXAMPLES:
        plan = quick(name)
        lines.append(line(name, plan, known.get(name)))
        if not screens:
            console = Console(width=100, color_system=None, file=io.StringIO())
            console.print(render(plan))
            text = console.file.getvalue()
            screen = "\n".join(one.rstrip() for one in text.splitlines())
            screens.append(f"## The screen of the first\n\n```\n{screen}\n```\n")
    columns = " | ".join(("plan", COLUMNS[0], "compiler's", *COLUMNS[1:]))
    table = f"| {columns} |\n|{'---|' * (len(COLUMNS) + 2)}\n" + "\n".join(lines)
    commands = "\n".join(f".venv/bin/mmx plan {text} --quick" for text in EXAMPLES.values())
    said = "\n".join(
        f"- {name}: {one['seconds']:.0f} s and {one['resident_GB']} GB of memory on {one['date']}, "
        f"jax {one['jax']}{': ' + one['failure'][:160] if one['failure'] else ''}"
        for name, one in known.items()
    )
    compiled = f"## What was compiled\n\n{said or 'Nothing yet.'}\n"
    return (
        f"{HEAD}\n{table}\n\n{compiled}\n## The commands\n\n```sh\n{commands}\n```\n\n{screens[0]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", nargs="+", choices=EXAMPLES, default=[], metavar="NAME")
    chosen = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in chosen.compile:
        known[name] = compile_one(name)
        print(name, known[name], flush=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    DOCUMENT.write_text(document(known))


if __name__ == "__main__":
    main()
