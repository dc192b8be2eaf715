"""The benchmark of two devices: what it reads off a profile, and the rows it derives."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import device_trace, two_devices
from benchmarks.measure import Report


def meta(kind, pid, tid, name):
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def kernel(pid, tid, name, begin, end):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": begin, "dur": end - begin}


def test_shares_of_an_invented_profile():
    trace = {
        "traceEvents": [
            meta("process_name", 1, 0, "/device:GPU:0"),
            meta("process_name", 9, 0, "/host:CPU"),
            meta("thread_name", 1, 7, "Stream #7(Compute)"),
            meta("thread_name", 1, 8, "Stream #8(Collective)"),
            meta("thread_name", 1, 9, "XLA Ops"),
            meta("thread_name", 9, 7, "Stream #7"),
            kernel(1, 7, "gemm", 0, 400),
            kernel(1, 7, "gemm", 300, 500),  # on top of the one before
            kernel(1, 8, "ncclDevKernel_AllGather(x)", 400, 700),  # 100 of 300 under a product
            kernel(1, 7, "loop_fusion", 900, 1000),  # nothing runs from 700 to 900
            kernel(1, 9, "all-gather", 0, 1000),  # the same again, by operations
            kernel(9, 7, "nccl of the host", 0, 5000),
        ]
    }
    (row,) = device_trace.read(trace, top=2)
    assert row["device"] == "/device:GPU:0"
    assert row["span_ms"] == pytest.approx(1.0)
    assert row["busy"] == pytest.approx(0.8)
    assert row["sending"] == pytest.approx(0.3)
    assert row["sending_alone"] == pytest.approx(2 / 3)
    assert row["largest_ms"] == {"gemm": 0.6, "ncclDevKernel_AllGather": 0.3}


def test_union_of_intervals():
    assert device_trace.union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert device_trace.overlap([(0, 4), (5, 6)], [(3, 5.5)]) == pytest.approx(1.5)


def test_ratios_and_sizes_of_the_steps():
    report = Report(60, None)
    report.add(part="one", tokens_per_s=100.0, loss=2.0)
    report.add(part="fsdp", tokens_per_s=190.0, loss=2.01)
    report.add(memory="fsdp", compiled_GB=9.0, runtime_GB=10.0)
    report.add(plan="fsdp", planned_GB=11.0, planned_TFLOP=21.0, analytic_TFLOP=20.0)
    two_devices.compare(report)
    step, peak = report.rows[4:]
    assert step == {
        "compared": "fsdp", "to": "one", "times": pytest.approx(1.9), "error": pytest.approx(0.005)
    }  # fmt: skip
    assert peak["planned_over_runtime"] == pytest.approx(1.1)
    assert peak["compiled_over_runtime"] == pytest.approx(0.9)
    assert peak["flops_planned_over_counted"] == pytest.approx(1.05)
