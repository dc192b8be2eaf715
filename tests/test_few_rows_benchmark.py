"""The benchmark of decoding few rows runs, and its check can say no."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import few_rows
from benchmarks.measure import Report


def test_it_runs_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "rows.json"
    few_rows.main(["--tiny", "--only", "states,experts", "--json", str(file)])
    assert "FAILED" not in capsys.readouterr().out
    copied, *rows = json.loads(file.read_text())["rows"]
    sizes = [2 * rows_ * 2 * 64 * 64 * 4 for rows_ in (1, 3)]  # of states, read and written
    sizes += [row["experts"] * 3 * 64 * 128 * 2 for row in rows[2:]]
    for row, size in zip(rows, sizes, strict=True):
        np.testing.assert_allclose(row["GBps"] * row["us"] * 1e3, size, rtol=1e-6)
        np.testing.assert_allclose(row["of_floor"] * copied["copy_GBs"], row["GBps"])
    assert rows[2]["experts"] == 2


def test_the_check_finds_what_is_wrong_or_not_repeated():
    report, wanted = Report(100, None), np.ones(8)
    changing = map(np.asarray, itertools.cycle([wanted, wanted * (1 + 1e-7)]))
    for run in (lambda: wanted, lambda: wanted + 1e-3, lambda: wanted * np.nan, changing.__next__):
        few_rows.repeats(report, "products", 1, run, wanted, 3)
    assert [row["verdict"] for row in report.rows] == ["ok", "WRONG", "WRONG", "WRONG"]
