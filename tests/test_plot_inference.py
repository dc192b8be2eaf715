"""The plot of the inference benchmark: its numbers are those of the file."""

import json

import pytest

from benchmarks import plot_inference

ROWS = [
    dict(copy_GBs=4000.0, matmul_TFLOPs=800.0),
    dict(part="decode", rows=1, context=4096, ms=2.0, tokens_per_s=500.0, floor_GB=4.0),
    dict(part="decode", rows=1, context=1024, ms=1.5, tokens_per_s=650.0, floor_GB=2.0),
    dict(part="decode", rows=8, context=1024, ms=2.0, tokens_per_s=4000.0, floor_GB=8.0),
    dict(part="twin", rows=1, context=1024, ms=3.0, tokens_per_s=333.0, floor_GB=2.5),
    dict(part="twin", rows=1, context=4096, left_out="keys and values above 60 GB"),
    dict(part="first", prompt=1024, seconds=0.25, total_TFLOP=80.0),
    dict(part="twin_first", prompt=1024, seconds=0.5, total_TFLOP=90.0),
    dict(part="twin_first", prompt=4096, left_out="keys and values above 60 GB"),
    dict(of_floor=0.5, part="decode", rows=1, context=1024),
    dict(of_matmul=0.5, part="first", prompt=1024),
]


def test_lines_are_the_rows(tmp_path):
    assert plot_inference.per_token(ROWS) == {
        "mmx": [(1024, 1.5), (4096, 2.0)],
        "floor": [(1024, 0.5), (4096, 1.0)],
        "all softmax": [(1024, 3.0)],
    }
    assert plot_inference.throughput(ROWS) == {
        "mmx": [(1, 650.0), (8, 4000.0)],
        "floor": [(1, 2000.0), (8, 4000.0)],
        "all softmax": [(1, 333.0)],
    }
    assert plot_inference.first_token(ROWS) == {
        "mmx": [(1024, 0.25)], "floor": [(1024, 0.1)], "all softmax": [(1024, 0.5)],
    }  # fmt: skip
    file = tmp_path / "inference.json"
    for rows in (ROWS, ROWS[1:2], []):  # a run that was cut short is drawn, too
        file.write_text(json.dumps({"device": "it", "rows": rows}))
        out = plot_inference.main(str(file))
        assert out == tmp_path / "inference.png"
        assert out.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileNotFoundError):
        plot_inference.main(str(tmp_path / "none.json"))
