"""Draw what benchmarks/inference.py has measured: python benchmarks/plot_inference.py FILE.json

Writes FILE.png: time per token and time to the first token over the context, and tokens/s over the
rows that decode together; beside each the floor that the bytes or FLOPs allow, and the twin. Of
several runs of the same the last counts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "mmx": "#1f6f8b",
    "int8": "#57a773",
    "fp8 keys and values": "#e08e45",
    "all softmax": "#c9ada7",
    "floor": "#222222",
}
PARTS = {"decode": "mmx", "fp8": "fp8 keys and values", "int8": "int8", "twin": "all softmax"}
Series = dict[str, list[tuple[float, float]]]


def ceiling(rows: list[dict[str, Any]], key: str) -> float | None:
    return next((row[key] for row in rows if key in row), None)


def per_token(rows: list[dict[str, Any]]) -> Series:
    """Milliseconds a step of one row, over the context; the floor of the hybrid."""
    found: Series = {}
    copy = ceiling(rows, "copy_GBs")
    for row in rows:
        if row.get("rows") != 1 or "ms" not in row or row.get("part") not in PARTS:
            continue
        found.setdefault(PARTS[row["part"]], []).append((row["context"], row["ms"]))
        if row["part"] == "decode" and copy:
            floor = (row["context"], 1e3 * row["floor_GB"] / copy)
            found.setdefault("floor", []).append(floor)
    return {name: sorted(dict(points).items()) for name, points in found.items()}


def throughput(rows: list[dict[str, Any]]) -> Series:
    """Tokens/s over the rows, at the context that most of them have been measured at."""
    decoded = [r for r in rows if r.get("part") in PARTS and "tokens_per_s" in r]
    contexts = [r["context"] for r in decoded]
    context = max(contexts, key=contexts.count, default=None)
    copy = ceiling(rows, "copy_GBs")
    found: Series = {}
    for row in decoded:
        if row["context"] != context:
            continue
        found.setdefault(PARTS[row["part"]], []).append((row["rows"], row["tokens_per_s"]))
        if row["part"] == "decode" and copy:
            floor = (row["rows"], row["rows"] * copy / row["floor_GB"])
            found.setdefault("floor", []).append(floor)
    return {name: sorted(dict(points).items()) for name, points in found.items()}


def first_token(rows: list[dict[str, Any]]) -> Series:
    """Seconds to the first token over the length of the prompt; the floor at the matmul rate."""
    found: Series = {}
    rate = ceiling(rows, "matmul_TFLOPs")
    for row in rows:
        if row.get("part") not in ("first", "twin_first") or "seconds" not in row:
            continue
        name = "mmx" if row["part"] == "first" else "all softmax"
        found.setdefault(name, []).append((row["prompt"], row["seconds"]))
        if name == "mmx" and rate:
            found.setdefault("floor", []).append((row["prompt"], row["total_TFLOP"] / rate))
    return {name: sorted(points) for name, points in found.items()}


def draw(axes, series: Series, title: str, across: str, up: str) -> None:
    for name, points in series.items():
        style = dict(linestyle="--") if name == "floor" else dict(marker="o")
        axes.plot(*zip(*points, strict=True), label=name, color=COLOURS[name], **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def main(file: str) -> Path:
    """Draw a file; where the picture is."""
    content = json.loads(Path(file).read_text())
    rows = content["rows"]
    panels = [
        (per_token(rows), "One row: time per token", "tokens of context", "ms"),
        (first_token(rows), "Time to the first token", "tokens of the prompt", "s"),
        (throughput(rows), "Rows together", "rows", "tokens/s"),
    ]
    panels = [panel for panel in panels if panel[0]]  # what has been measured
    across = max(1, len(panels))
    figure, axes = plt.subplots(
        1, across, figsize=(16 / 3 * across, 4.2), layout="constrained", squeeze=False
    )
    for one, panel in zip(axes[0], panels, strict=False):
        draw(one, *panel)
    figure.suptitle(str(content.get("device", "")), fontsize=10)
    out = Path(file).with_suffix(".png")
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the file that benchmarks/inference.py --json has written")
    print(main(sys.argv[1]))
