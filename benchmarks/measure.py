"""What benchmarks share: the machine, its ceilings measured in the same run, timing, a table."""

import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# Peers share the GPU; must be set before jax starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp


def environment() -> dict[str, Any]:
    """Hardware, versions and date."""
    packages = ["jax", "jaxlib", "torch", "triton", "flash-linear-attention", "fla-core"]
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def milliseconds(function: Callable[..., Any], *args: Any, batch_ms: float = 50.0) -> float:
    """Median over 7 batches of queued calls, each batch about `batch_ms` long, of the time a call.

    Queued calls hide the launch: this is the time the device needs. The first call compiles.
    """
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    once = (time.perf_counter() - start) * 1e3
    calls = max(1, min(200, int(batch_ms / once)))
    times, result = [], None
    for _ in range(7 if once < 300 else 1):
        start = time.perf_counter()
        for _ in range(calls):
            result = None  # its memory is there for the next one
            result = function(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """GB/s of a copy of so many fp32 numbers (4 GiB), counting what is read and what is written."""
    x = jnp.ones((size,), jnp.float32)
    return 2 * x.nbytes / milliseconds(jax.jit(lambda x: x + 1), x) / 1e6


def matmul_rate(size: int = 8192) -> float:
    """TFLOP/s of a bf16 product of two random square matrices."""
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / milliseconds(jax.jit(jnp.matmul), x, y, batch_ms=150) / 1e9


class Report:
    """Rows of measurements: printed as they come, written as JSON, tabled at the end."""

    def __init__(self, budget: float, file: str | None):
        self.start, self.budget, self.file = time.perf_counter(), budget, file
        self.rows: list[dict[str, Any]] = []
        self.about = environment()

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.start)

    def add(self, **row: Any) -> None:
        """Keep and print a row, and write the file anew, so that a kill loses nothing."""
        self.rows.append(row)
        print(f"[{time.perf_counter() - self.start:4.0f}s]", _line(row), flush=True)
        if self.file:
            Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**self.about, "rows": self.rows}, indent=1)
            Path(self.file).write_text(text + "\n")

    def attempt(self, name: str, function: Callable[[], None], seconds: float = 10) -> None:
        """Run a measurement if there is time; a failure is reported and the rest goes on."""
        if self.left() < seconds:
            print(f"no time left for {name}", flush=True)
            return
        try:
            function()
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            print(f"FAILED {name}: {message}", flush=True)

    def table(self) -> None:
        """All rows once more, short."""
        print("\n" + json.dumps(self.about))
        for row in self.rows:
            print(_line(row))


def _line(row: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{key}={show(value)}" for key, value in row.items())
