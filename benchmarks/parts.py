"""Parts of a benchmark, each in a process of its own.

So each finds the memory of the device empty, and none can take the others down.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from benchmarks.measure import Report

ROW = "row "  # begins a line of a part that is a row of the report
# The rest of the memory is for CUDA itself, its graphs and the process that waits.
MEMORY_SHARE = 0.92

Emit = Callable[..., None]


def make_parser(
    doc: str | None, parts: Collection[str], *, budget: float
) -> argparse.ArgumentParser:
    """Options that every script of parts has; described by the first line of its docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--budget", type=float, default=budget, help="seconds")
    parser.add_argument("--only", default=",".join(parts), help="parts, in the order to run them")
    parser.add_argument("--preset", default="bench-4b")
    parser.add_argument("--smoke", action="store_true", help="everything, tiny")
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, parts: Collection[str]) -> argparse.Namespace:
    """The options; ends with code 2 where `--only` names no part."""
    options = parser.parse_args()
    wrong = set(options.only.split(",")) - set(parts)
    if wrong:
        parser.error(f"--only: unknown {', '.join(sorted(wrong))}; choose from {', '.join(parts)}")
    return options


def short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def run_here(part: Callable[[Emit, Any], None], setting: Any, cache: str) -> int:
    """Run a part, its rows on stdout; the exit status."""
    # The parts multiply the same shapes: what one has tuned, the next need not.
    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        part(lambda **row: print(ROW + json.dumps(row), flush=True), setting)
    except Exception as error:
        # A device out of memory lists all of its buffers; the end says where.
        print("".join(traceback.format_tb(error.__traceback__, limit=-4)) + short(error))
        return 1
    return 0


def run_in_process(
    report: Report, script: str, part: str, arguments: list[str], variables: Mapping[str, str]
) -> None:
    """Run a part of a script until the budget ends; its rows join the report.

    Args:
      variables: of the environment, beside what is there.
    """
    command = [sys.executable, "-u", script, "--part", part, *arguments]
    environment = os.environ | variables
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        timer = threading.Timer(report.left(), process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith(ROW):
                report.add(**json.loads(line[len(ROW) :]))
            else:
                print(line, end="", flush=True)
        timer.cancel()
    if process.returncode:
        late = " (no time was left)" if report.left() <= 0 else ""
        raise RuntimeError(f"the process ended with {process.returncode}{late}")


def memory_variables(part: str) -> dict[str, str]:
    """XLA takes its share of the memory at once, but for the peer, which brings its own pool."""
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if part == "peer" else "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(MEMORY_SHARE),
    }
