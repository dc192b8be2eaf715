"""Draw the committed results: python benchmarks/plot.py (writes benchmarks/results/h200.png)."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
OURS, PEER, FLOOR = "#1f6f8b", "#c9ada7", "#222222"


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}_h200.json").read_text())["rows"]


def lightning(axes) -> None:
    """Milliseconds as multiples of the memory floor."""
    found = rows("lightning")
    labels, ours, peers = [], [], []
    for kind, name in (("forward", "fwd"), ("forward_backward", "fwd+bwd")):
        for shape in ("B4 T16384 H64", "B1 T65536 H64", "B1 T65536 H8"):
            mine = next(r for r in found if r.get(kind) == shape)
            peer = next(r for r in found if r.get(f"fla_{kind}") == shape)
            batch, length, heads = (int(x[1:]) for x in shape.split())
            labels.append(f"{name}, {batch} x {length // 1024}K, {heads} heads")
            ours.append(mine["times_floor"])
            peers.append(peer["ms"] / mine["floor_ms"])
    bars(axes, labels, {"mmx": ours, "flash-linear-attention": peers})
    axes.axvline(1, color=FLOOR, linewidth=1, linestyle="--")
    axes.set_title("Lightning attention: time / memory floor (less is better)")


def grouped(axes) -> None:
    """Rate as a fraction of a dense product's."""
    found = [r for r in rows("grouped_matmul") if r.get("rows") == 65536 and r.get("inner") == 6144]
    labels, ours, peers = [], [], []
    for groups in ("balanced", "skewed"):
        for product in ("forward", "grad_x", "grad_w"):
            mine, peer = (
                next(
                    r["of_dense"]
                    for r in found
                    if (r.get("product"), r.get("who"), r.get("groups")) == (product, who, groups)
                )
                for who in ("ours", "torch")
            )
            labels.append(f"{product}, {groups}")
            ours.append(mine)
            peers.append(peer)
    bars(axes, labels, {"mmx": ours, "torch._grouped_mm": peers})
    axes.axvline(1, color=FLOOR, linewidth=1, linestyle="--")
    axes.set_title("Grouped matmul, 32 experts: rate / dense (more is better)")


def attention(axes) -> None:
    """TFLOP/s of causal attention, 64 query heads, 8 key heads of 128."""
    found = [r for r in rows("attention") if "what" in r]
    labels, series = [], {"ours": [], "torch cudnn": [], "torch flash": []}
    for what in ("forward", "fwd+bwd"):
        for batch, length in ((16, 4096), (4, 16384), (1, 65536)):
            labels.append(f"{what}, {batch} x {length // 1024}K")
            for who, values in series.items():
                wanted = (what, batch, length, who)
                values.append(
                    next(
                        r["tflops"]
                        for r in found
                        if (r["what"], r["batch"], r["length"], r["who"]) == wanted
                    )
                )
    names = {"ours": "mmx (cuDNN)", "torch cudnn": "torch (cuDNN)", "torch flash": "torch (flash)"}
    bars(axes, labels, {names[who]: values for who, values in series.items()})
    axes.set_title("Softmax attention: TFLOP/s (more is better)")


def bars(axes, labels: list[str], series: dict[str, list[float]]) -> None:
    height = 0.8 / len(series)
    colours = [OURS, PEER, "#e5d9d5"]
    for i, (name, values) in enumerate(series.items()):
        where = [j + i * height for j in range(len(labels))]
        drawn = axes.barh(where, values, height, label=name, color=colours[i])
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
    middle = height * (len(series) - 1) / 2
    axes.set_yticks([j + middle for j in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.2), constrained_layout=True)
    for draw, part in zip((lightning, grouped, attention), axes, strict=True):
        draw(part)
    figure.suptitle("One NVIDIA H200, bf16; benchmarks/*.py print these numbers", fontsize=10)
    figure.savefig(RESULTS / "h200.png", dpi=110)


if __name__ == "__main__":
    main()
