"""The torch peers' side of the measurements; torch is optional."""

import statistics
import time
from collections.abc import Callable
from typing import Any

try:
    import torch
except ImportError:
    torch = None


def available() -> bool:
    return torch is not None and torch.cuda.is_available()


def milliseconds(function: Callable[..., Any], *args: Any, batch_ms: float = 150.0) -> float:
    """As `measure.milliseconds`: median over batches of queued calls of the time a call takes."""
    assert torch is not None
    function(*args)
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args)
    torch.cuda.synchronize()
    once = (time.perf_counter() - start) * 1e3
    calls = max(1, min(200, int(batch_ms / once)))
    times = []
    for _ in range(7 if once < 300 else 1):
        start = time.perf_counter()
        for _ in range(calls):
            function(*args)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)
