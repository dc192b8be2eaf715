"""What a profile of jax says of the GPUs: how much of the time messages travel, and what they hide.

Read are the `*.trace.json.gz` that `jax.profiler.trace` writes: events with a start and a duration
in microseconds, those of the streams of a device being its kernels and copies.
"""

import gzip
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# Beginnings of the names of kernels and copies that send, in lower case.
SENDING = ("nccl", "memcpyp2p", "ragged_all_to_all", "ragged-all-to-all", "all_reduce", "allreduce")
Intervals = list[tuple[float, float]]


def union(intervals: Intervals) -> Intervals:
    """The same points in intervals that neither overlap nor touch, in order."""
    merged: Intervals = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Intervals) -> float:
    """Of a union."""
    return sum(end - begin for begin, end in intervals)


def overlap(one: Intervals, other: Intervals) -> float:
    """Length of what two unions have in common."""
    return length(one) + length(other) - length(union(one + other))


def kernels(trace: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """(device, name, begin, end) of each kernel and copy."""
    processes, threads = {}, {}
    for event in trace["traceEvents"]:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event.get("tid")] = event["args"]["name"]
    for event in trace["traceEvents"]:
        if event.get("ph") != "X":
            continue
        device = processes.get(event["pid"], "")
        # Other lines of a device repeat the same by modules and by operations.
        stream = threads.get((event["pid"], event.get("tid")), "")
        if "GPU" in device and stream.startswith("Stream"):
            begin = float(event["ts"])
            yield device, event["name"], begin, begin + float(event.get("dur", 0))


def read(trace: dict[str, Any], *, top: int = 6) -> list[dict[str, Any]]:
    """A row for each device: shares of its time, and where the most of it goes."""
    found: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for device, name, begin, end in kernels(trace):
        found[device].append((name, begin, end))
    rows = []
    for device, events in sorted(found.items()):
        sends = {name: name.lower().startswith(SENDING) for name, _, _ in events}
        sending = union([(b, e) for name, b, e in events if sends[name]])
        computing = union([(b, e) for name, b, e in events if not sends[name]])
        span = max(e for _, _, e in events) - min(b for _, b, _ in events)
        alone = length(sending) - overlap(sending, computing)
        times: dict[str, float] = defaultdict(float)
        for name, begin, end in events:
            times[name.split("(")[0][:48]] += end - begin
        largest = sorted(times.items(), key=lambda item: -item[1])[:top]
        rows.append(
            {
                "device": device,
                "span_ms": span / 1e3,
                "busy": length(union(sending + computing)) / span if span else 0.0,
                "sending": length(sending) / span if span else 0.0,
                "sending_alone": alone / length(sending) if sending else 0.0,
                "largest_ms": {name: round(time / 1e3, 2) for name, time in largest},
            }
        )
    return rows


def record(
    folder: Path, name: str, run: Callable[[], Any], *, top: int = 6
) -> list[dict[str, Any]]:
    """Profile a call, keep its trace as `folder/name.trace.json.gz`, and read it.

    Raises:
      ValueError: the profiler wrote no trace.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # the devices are what is looked at
    options.host_tracer_level = 1
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place, profiler_options=options):
            jax.block_until_ready(run())
        files = sorted(Path(place).rglob("*.trace.json.gz"))
        if not files:
            raise ValueError(f"the profiler wrote no trace of {name}")
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"{name}.trace.json.gz"
        shutil.copyfile(files[-1], kept)
    with gzip.open(kept, "rt") as file:
        return read(json.load(file), top=top)
