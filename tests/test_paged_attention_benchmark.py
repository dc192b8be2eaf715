"""The benchmark of paged attention runs, and its check can say no."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import paged_attention
from benchmarks.measure import Report


def test_it_runs_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "rows.json"
    paged_attention.main(["--tiny", "--only", "decode,prefill", "--json", str(file)])
    assert "FAILED" not in capsys.readouterr().out
    decode, prefill = json.loads(file.read_text())["rows"]
    size = 512 * 2 * 2 * 16 * 2  # keys and values of two heads of 16 in bf16
    assert decode["MB"] == size / 1e6
    np.testing.assert_allclose(decode["GBps"] * decode["us"] * 1e3, size)
    assert prefill["prefill"] == 100
    seen = sum(range(101, 133))
    np.testing.assert_allclose(prefill["tflops"] * prefill["ms"] * 1e9, 4 * 4 * 16 * seen)


def test_the_check_finds_a_missing_key(monkeypatch):
    def attend(*arrays, original=paged_attention.paged_attention, **static):
        *rest, positions = arrays
        return original(*rest, jnp.where(positions >= 0, positions - 1, -1), **static)

    report = Report(100, None)
    paged_attention.check_one(report, "", "xla", [[5, 9]], 2, 1, 8, 16)
    monkeypatch.setattr(paged_attention, "paged_attention", attend)
    paged_attention.check_one(report, "", "xla", [[5, 9]], 2, 1, 8, 16)
    assert [row["verdict"] for row in report.rows] == ["ok", "WRONG"]
