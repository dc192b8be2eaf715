"""The curves of a run as one picture, from its `metrics.jsonl` and `run.json`."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from mmx.training.logbook import METRICS, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#1f5fa8", "#c8562b", "#2f8f5b", "#8a4fa3", "#b8912b", "#4a9bb0", "#a83f5f", "#6b6b6b")
_GREY = "#9a9a9a"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
_SMOOTHED = 0.02  # a curve that is noisy from step to step is averaged over this share of a run
_MOST_SOURCES = len(_COLOURS) - 1  # with a curve of their own
_FEW_STEPS = 20
_MOST_POINTS = 2000  # of a curve in the picture: more than it has pixels


def draw(run_dir: Path, out: Path) -> Path:
    """Draw a run; see `compare`."""
    return compare([run_dir], out)


def compare(run_dirs: Sequence[Path], out: Path) -> Path:
    """Draw runs over one another: eight panels against the step.

    Loss with the held-out loss (and of one run that of each source), learning rate, gradient norm
    with the skipped steps, tokens/s; and of the router's load and entropy, the share of choices
    dropped and the lightning states, the mean over layers and their range.

    Args:
      run_dirs: folders with `metrics.jsonl`, and `run.json` for the names of the sources.
      out: the picture; its suffix, such as .png, .pdf or .svg, says which kind.

    Returns:
      `out`, which is absent, old or whole at any moment.

    Raises:
      ValueError: no runs, a run without steps, a damaged file, an unknown kind of picture.
      OSError: `out` cannot be written.
    """
    if not run_dirs:
        raise ValueError("no run to draw; give the folder of one")
    runs = [_load(Path(run)) for run in run_dirs]
    # Only now: what is wrong with a run is said at once.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = sorted(FigureCanvasAgg.filetypes)
    kind = out.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise ValueError(
            f"{out}: cannot draw a {kind!r} picture; end it in one of .{', .'.join(kinds)}"
        )
    with mpl.rc_context():
        mpl.rcdefaults()  # the same picture, whatever the user's own defaults are
        mpl.rcParams.update(_STYLE)
        if max(len(run.records) for run in runs) < _FEW_STEPS:
            mpl.rcParams["lines.marker"] = "."  # one point is no line
        figure = Figure(figsize=(17, 8), layout="constrained")
        FigureCanvasAgg(figure)
        _panels(figure, runs)
        _save(figure, out, kind)
    return out


@dataclass(frozen=True)
class _Run:
    """The numbers of a run.

    Attributes:
      name: of its folder.
      records: as they were written.
      steps: of the records.
      source_names: from `run.json`; may be fewer than there are sources.
      heldout_before: held-out loss before the first step, if known.
    """

    name: str
    records: list[dict[str, Any]]
    steps: Float[np.ndarray, "N"]
    source_names: tuple[str, ...]
    heldout_before: float | None

    def scalars(self, name: str) -> Float[np.ndarray, "N"]:
        """A number of each step, NaN where there is none."""
        return np.array([_number(record.get(name)) for record in self.records])

    def lists(self, name: str) -> Float[np.ndarray, "N L"]:
        """A list of each step; all NaN where it is missing or of another length than most."""
        rows = [r[name] if isinstance(r.get(name), list) else [] for r in self.records]
        length = int(np.bincount([len(row) for row in rows if row] or [0]).argmax())
        unknown = [None] * length
        rows = [row if len(row) == length else unknown for row in rows]
        numbers = [[_number(part) for part in row] for row in rows]
        return np.array(numbers, dtype=np.float64).reshape(len(rows), length)

    def learned(self, values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Without those of the steps that were skipped: they taught nothing."""
        return np.where(self.scalars("skipped") > 0, np.nan, values)


def _load(run_dir: Path) -> _Run:
    records = read(run_dir)
    if not records:
        raise ValueError(f"{run_dir / METRICS}: holds no step yet; draw it after the first one")
    about: Any = {}
    path = run_dir / "run.json"
    if path.is_file():
        try:
            about = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); remove it to draw without it") from None
    about = about if isinstance(about, dict) else {}
    names = about.get("source_names")
    before = _number(about.get("heldout_loss_before"))
    return _Run(
        name=run_dir.resolve().name,
        records=records,
        steps=np.array([record["step"] for record in records], dtype=np.float64),
        source_names=tuple(map(str, names)) if isinstance(names, list) else (),
        heldout_before=before if np.isfinite(before) else None,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


# ---------------------------------------------------------------- panels


def _panels(figure: "Figure", runs: Sequence[_Run]) -> None:
    axes = figure.subplots(2, 4, sharex=True)
    begin, end = (f(run.steps[i] for run in runs) for f, i in ((min, 0), (max, -1)))
    axes[0, 0].set_xlim(begin - 1 - 0.02 * (end - begin + 1), end + 0.02 * (end - begin + 1))
    _draw_loss(axes[0, 0], runs)
    _draw_scalar(axes[0, 1], runs, "learning_rate", "learning rate")
    axes[0, 1].yaxis.set_major_formatter("{x:g}")
    _draw_grad_norm(axes[0, 2], runs)
    _draw_scalar(axes[0, 3], runs, "tokens_per_second", "tokens/s", smooth=True)
    axes[0, 3].yaxis.set_major_formatter(_engineering())
    if len(runs) == 1:
        axes[0, 3].set_title(_speed(runs[0]), loc="right", color=_GREY, fontsize=8)
    _draw_layers(axes[1, 0], runs, "router_load", "router load (busiest / mean)")
    _draw_layers(axes[1, 1], runs, "router_entropy", "router entropy (nats)")
    _draw_layers(axes[1, 2], runs, "dropped_tokens", "dropped choices (%)", scale=100)
    _draw_layers(axes[1, 3], runs, "lightning_state_norm", "lightning states (rms)")
    for panel in axes[1]:
        panel.set_xlabel("step")
        panel.xaxis.set_major_formatter(_engineering())
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in axes.flat:
        if not panel.has_data():
            panel.text(
                0.5, 0.5, "not recorded", color=_GREY, ha="center", transform=panel.transAxes
            )
            panel.tick_params(left=False, labelleft=False)
            panel.grid(visible=False)
    title = _title(runs[0]) if len(runs) == 1 else ", ".join(run.name for run in runs)
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=12, fontweight="bold")


def _title(run: _Run) -> str:
    loss = run.scalars("loss")
    title = f"{run.name}  ·  step {run.steps[-1]:,.0f}"
    tokens = np.nansum(run.scalars("num_tokens"))
    if tokens:
        title += f"  ·  {tokens:,.0f} tokens"
    if np.isfinite(loss).any():
        title += f"  ·  loss {loss[np.isfinite(loss)][-1]:.4f}"
    _, heldout = _heldout(run)
    return title + (f"  ·  held-out {heldout[-1]:.4f}" if heldout.size else "")


def _speed(run: _Run) -> str:
    """The middle of what the steps say about the use of the device."""
    shares = {"of peak": run.scalars("mfu"), "data wait": run.scalars("data_wait")}
    known = {name: x[np.isfinite(x)] for name, x in shares.items()}
    return ", ".join(f"{np.median(x):.1%} {name}" for name, x in known.items() if x.size)


def _draw_loss(panel: "Axes", runs: Sequence[_Run]) -> None:
    single = len(runs) == 1
    panel.set_title("loss (nats a token)" + ("" if single else ", dashed: held out"))
    seen = []
    for run, colour in _coloured(runs):
        loss = run.scalars("loss")
        smoothed = _smooth(run.learned(loss))
        seen.append(smoothed)
        label = "all" if single else run.name
        panel.plot(*_thin(run.steps, smoothed), color=colour, label=_literal(label), zorder=3)
        if single:
            panel.plot(*_thin(run.steps, loss), color=colour, alpha=0.25, linewidth=0.7)
            seen += _draw_sources(panel, run)
        steps, heldout = _heldout(run)
        if heldout.size:
            seen.append(heldout)
            panel.plot(
                steps,
                heldout,
                color="black" if single else colour,
                linestyle="--",
                marker="o",
                markersize=3.5,
                linewidth=1,
                label="held out" if single else None,
                zorder=4,
            )
    _focus(panel, seen)
    panel.legend(loc="upper right", ncols=2 if len(panel.lines) > 6 else 1)


def _draw_sources(panel: "Axes", run: _Run) -> list[Float[np.ndarray, "N"]]:
    """The loss of each source, where there are several; of many those with most targets."""
    sums, tokens = run.lists("loss_by_source"), run.lists("tokens_by_source")
    if sums.shape != tokens.shape or sums.shape[1] < 2:
        return []
    curves = []
    most = np.argsort(-np.nansum(tokens, axis=0), kind="stable")[:_MOST_SOURCES]
    for index in sorted(most):
        # Means of means would count a step with three targets as much as one with thousands.
        total = _smooth(run.learned(sums[:, index]))
        count = _smooth(run.learned(np.where(np.isnan(sums[:, index]), np.nan, tokens[:, index])))
        with np.errstate(divide="ignore", invalid="ignore"):
            curve = np.where(count > 0, total / count, np.nan)
        if not np.isfinite(curve).any():
            continue
        names = run.source_names
        name = names[index] if index < len(names) else f"source {index}"
        colour = _COLOURS[1 + len(curves)]
        panel.plot(
            *_thin(run.steps, curve), color=colour, linewidth=0.9, alpha=0.9, label=_literal(name)
        )
        curves.append(curve)
    return curves


def _draw_grad_norm(panel: "Axes", runs: Sequence[_Run]) -> None:
    panel.set_title("gradient norm")
    num_skipped = 0
    for run, colour in _coloured(runs):
        norm = run.scalars("grad_norm")
        if not (norm > 0).any():
            continue
        panel.set_yscale("log")
        panel.plot(*_thin(run.steps, norm), color=colour, alpha=0.35, linewidth=0.8)
        panel.plot(*_thin(run.steps, _smooth(run.learned(norm))), color=colour)
        skipped = run.scalars("skipped") > 0
        num_skipped += int(skipped.sum())
        # On the upper edge where the norm was not finite.
        where = np.where(np.isfinite(norm), norm, np.nanmax(norm))[skipped]
        panel.plot(run.steps[skipped], where, "x", color="#d01c1c", markersize=5, zorder=5)
    if num_skipped:
        panel.plot([], [], "x", color="#d01c1c", label=f"skipped ({num_skipped:,})")
        panel.legend(loc="upper right")


def _draw_scalar(
    panel: "Axes", runs: Sequence[_Run], name: str, title: str, *, smooth: bool = False
) -> None:
    panel.set_title(title)
    for run, colour in _coloured(runs):
        values = run.scalars(name)
        if not np.isfinite(values).any():
            continue
        if smooth:
            panel.plot(*_thin(run.steps, values), color=colour, alpha=0.25, linewidth=0.7)
            values = _smooth(values)
        panel.plot(*_thin(run.steps, values), color=colour)
    if panel.has_data():
        panel.set_ylim(bottom=0)


def _draw_layers(
    panel: "Axes", runs: Sequence[_Run], name: str, title: str, *, scale: float = 1
) -> None:
    """The mean over layers as a line in their range."""
    panel.set_title(title)
    for run, colour in _coloured(runs):
        values = scale * run.lists(name)
        if not values.size or not np.isfinite(values).any():
            continue
        rows = np.isfinite(values).all(axis=1)
        values, steps = values[rows], run.steps[rows]
        curves = (_smooth(edge) for edge in (values.min(1), values.max(1), values.mean(1)))
        (thin, low), (_, high), (_, mean) = (_thin(steps, curve) for curve in curves)
        panel.fill_between(thin, low, high, color=colour, alpha=0.18, linewidth=0)
        panel.plot(thin, mean, color=colour)
    if panel.has_data() and len(runs) == 1:
        layers = runs[0].lists(name).shape[1]
        text = f"mean and range of {layers} layers" if layers > 1 else "1 layer"
        panel.set_title(text, loc="right", color=_GREY, fontsize=8)


# ---------------------------------------------------------------- numbers


def _heldout(run: _Run) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"]]:
    """Steps and held-out losses where there are any, that before the first step included."""
    losses = run.scalars("heldout_loss")
    known = np.isfinite(losses)
    steps, losses = run.steps[known], losses[known]
    if run.heldout_before is None:
        return steps, losses
    return np.insert(steps, 0, 0), np.insert(losses, 0, run.heldout_before)


def _smooth(values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Mean over a window around each number; NaN counts for nothing."""
    half = round(_SMOOTHED * len(values) / 2)
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    count = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    # At the beginning, where losses fall fast, the window shrinks on both sides alike, or the curve
    # would begin too low. At the end it keeps its left half: one step alone says little.
    reach = np.minimum(half, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    number = count[high] - count[low]
    mean = (total[high] - total[low]) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)


def _thin(
    steps: Float[np.ndarray, "N"], values: Float[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"]]:
    """Evenly many of the points, at most `_MOST_POINTS` and the last one among them."""
    every = -(-len(steps) // _MOST_POINTS)
    chosen = np.arange(len(steps) - 1, -1, -every)[::-1]
    return steps[chosen], values[chosen]


def _focus(panel: "Axes", curves: Sequence[Float[np.ndarray, "_"]]) -> None:
    """Limits around where curves begin and nearly all they do: one spike would flatten them."""
    known = [curve[np.isfinite(curve)] for curve in curves]
    known = [curve for curve in known if curve.size]
    if known:
        # A spike in a smoothed curve is as wide as the window.
        high = max(max(curve[0], np.quantile(curve, 1 - 1.5 * _SMOOTHED)) for curve in known)
        low = min(curve.min() for curve in known)
        margin = 0.05 * max(high - low, 1e-3 * abs(high), 1e-6)
        panel.set_ylim(low - margin, high + margin)


# ---------------------------------------------------------------- drawing


def _coloured(runs: Sequence[_Run]) -> list[tuple[_Run, str]]:
    return [(run, _COLOURS[i % len(_COLOURS)]) for i, run in enumerate(runs)]


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _literal(text: str) -> str:
    """Text that matplotlib neither reads as mathematics nor, as a label, leaves out."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _save(figure: "Figure", out: Path, kind: str) -> None:
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(draft, format=kind, dpi=110)
        draft.replace(out)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(out)) from None
    finally:
        with suppress(OSError):
            draft.unlink()
