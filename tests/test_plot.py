"""`mmx plot`: the curves against sums done by hand; every way of having nothing to draw."""

import json
import os
import resource

import numpy as np
import pytest
from PIL import Image

from mmx.cli import main
from mmx.training import plotting

LAYERS = 3
STEPS = 200
SKIPPED = (40, 120)


def make_run(folder, *, steps=STEPS, seed=0, lists=True, **about):
    """A run of made-up numbers; its records."""
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 2 + 6 / step + 0.1 * chance.normal(),
            "grad_norm": float(np.exp(chance.normal())),
            "learning_rate": 1e-3 / step,
            "skipped": float(step in SKIPPED),
            "num_tokens": 100.0,
            "tokens_per_second": 1000.0 + step,
            "mfu": 0.25,
            "data_wait": 0.01,
        }
        if lists:
            tokens = [int(n) for n in chance.integers(0, 3, 2)] + [0]
            record |= {
                "tokens_by_source": tokens,
                "loss_by_source": [n * (3.0 + i) for i, n in enumerate(tokens)],
                "router_load": (1 + chance.random(LAYERS)).tolist(),
                "router_entropy": chance.random(LAYERS).tolist(),
                "dropped_tokens": [0.0, 0.01, 0.05],
                "lightning_state_norm": chance.random(2).tolist(),
            }
        if step % 50 == 0:
            record["heldout_loss"] = 3.0 - step / 100
        if step == SKIPPED[1]:
            record |= {"loss": None, "grad_norm": None}
        records.append(record)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    if about:
        (folder / "run.json").write_text(json.dumps(about))
    return records


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures = []
    save = plotting._save

    def keep(figure, out, kind):
        figures.append(figure)
        save(figure, out, kind)

    monkeypatch.setattr(plotting, "_save", keep)
    return figures


def panel(figure, title):
    (found,) = [axes for axes in figure.axes if axes.get_title("left").startswith(title)]
    return found


def labelled(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line.get_xdata(), line.get_ydata()


def window_mean(values, steps):
    """The smoothing, one number after the other."""
    half = round(0.02 * steps / 2)
    assert half == 2
    means = []
    for index in range(len(values)):
        left = min(half, index)
        around = np.array(values[index - left : index + left + 1], dtype=float)
        around = around[np.isfinite(around)]
        means.append(around.mean() if around.size else np.nan)
    return means


# ---------------------------------------------------------------- the curves


def test_every_panel_shows_the_numbers_of_the_run(tmp_path, drawn):
    records = make_run(
        tmp_path / "run", source_names=["code", "$x$", "_unused"], heldout_loss_before=9.0
    )
    assert plotting.draw(tmp_path / "run", tmp_path / "a.png") == tmp_path / "a.png"
    (figure,) = drawn
    assert len(figure.axes) == 8

    loss = panel(figure, "loss")
    unskipped = [np.nan if r["skipped"] else r["loss"] for r in records]
    steps, values = labelled(loss, "all")
    np.testing.assert_array_equal(steps, np.arange(1, STEPS + 1))
    np.testing.assert_allclose(values, window_mean(unskipped, STEPS), rtol=1e-12)
    steps, values = labelled(loss, "held out")
    np.testing.assert_array_equal(steps, [0, 50, 100, 150, 200])
    np.testing.assert_allclose(values, [9.0, 2.5, 2.0, 1.5, 1.0])
    # Targets of source i all lose 3 + i, however many a step has of them; the third has none.
    for index, name in enumerate(["code", r"\$x\$"]):
        _, values = labelled(loss, name)
        assert np.isfinite(values).mean() > 0.9
        np.testing.assert_allclose(values[np.isfinite(values)], 3 + index, rtol=1e-12)
    assert len(loss.get_legend().get_texts()) == 4

    (rate,) = panel(figure, "learning rate").lines
    np.testing.assert_allclose(rate.get_ydata(), [r["learning_rate"] for r in records])
    norms, smooth, crosses, _ = panel(figure, "gradient norm").lines
    expected = np.array([r["grad_norm"] or np.nan for r in records])
    np.testing.assert_allclose(norms.get_ydata(), expected)
    assert np.isfinite(smooth.get_ydata()).all()
    assert tuple(crosses.get_xdata()) == SKIPPED
    np.testing.assert_allclose(crosses.get_ydata(), [expected[39], np.nanmax(expected)])
    speed = panel(figure, "tokens/s")
    np.testing.assert_allclose(speed.lines[0].get_ydata(), 1001.0 + np.arange(STEPS))
    assert speed.get_title("right") == "25.0% of peak, 1.0% data wait"
    title = figure.get_suptitle()
    loss = records[-1]["loss"]
    assert title == f"run  ·  step 200  ·  20,000 tokens  ·  loss {loss:.4f}  ·  held-out 1.0000"


@pytest.mark.parametrize(
    ("name", "title", "scale"),
    [
        ("router_load", "router load", 1),
        ("router_entropy", "router entropy", 1),
        ("dropped_tokens", "dropped choices (%)", 100),
        ("lightning_state_norm", "lightning states", 1),
    ],
)
def test_layers_are_a_mean_in_its_range(tmp_path, drawn, name, title, scale):
    records = make_run(tmp_path / "run")
    plotting.draw(tmp_path / "run", tmp_path / "a.png")
    axes = panel(drawn[0], title)
    values = scale * np.array([record[name] for record in records])
    (mean,) = axes.lines
    expected = window_mean(values.mean(axis=1), STEPS)
    np.testing.assert_allclose(mean.get_ydata(), expected, rtol=1e-12)
    (band,) = axes.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    np.testing.assert_allclose(low, min(window_mean(values.min(axis=1), STEPS)), rtol=1e-9)
    np.testing.assert_allclose(high, max(window_mean(values.max(axis=1), STEPS)), rtol=1e-9)
    assert axes.get_title("right") == f"mean and range of {values.shape[1]} layers"


def test_a_spike_does_not_flatten_the_loss(tmp_path, drawn):
    records = make_run(tmp_path / "run", steps=400, lists=False)
    records[300]["loss"] = 1e4
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run/metrics.jsonl").write_text(text)
    plotting.draw(tmp_path / "run", tmp_path / "a.png")
    low, high = panel(drawn[0], "loss").get_ylim()
    assert low < 2
    assert 7 < high < 10


def test_several_runs_are_laid_over_one_another(tmp_path, drawn, capsys):
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", steps=100, seed=1, lists=False)
    out = tmp_path / "both.png"
    runs = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert main(["plot", *runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    rates = panel(drawn[0], "learning rate").lines
    assert [len(line.get_xdata()) for line in rates] == [len(first), len(second)]
    assert rates[0].get_color() != rates[1].get_color()
    names = [text.get_text() for text in panel(drawn[0], "loss").get_legend().get_texts()]
    assert names == ["first", "second"]
    assert main(["plot", *runs]) == 2
    assert "--out FILE" in capsys.readouterr().err


def test_long_runs_are_thinned_and_end_at_their_last_step():
    for number in (1, 1999, 2000, 2001, 54_321):
        steps = np.arange(1.0, number + 1)
        thin, values = plotting._thin(steps, 2 * steps)
        assert len(thin) <= 2000
        assert thin[-1] == number
        np.testing.assert_array_equal(values, 2 * thin)
        assert len(set(np.diff(thin))) <= 1
    assert len(thin) > 1000


# ---------------------------------------------------------------- the file


def test_the_picture_is_beside_the_run_and_whole(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["plot", str(tmp_path / "run")]) == 0
    out = tmp_path / "run/plot.png"
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    dark = pixels < 200
    # Each of the 2 x 4 panels has been drawn into.
    for row in np.array_split(dark, 2, axis=0):
        assert all(part.mean() > 0.005 for part in np.array_split(row, 4, axis=1))
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "plot.png"]


@pytest.mark.parametrize(("suffix", "begin"), [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_other_kinds_of_picture(tmp_path, suffix, begin):
    make_run(tmp_path / "run", steps=5)
    out = plotting.draw(tmp_path / "run", tmp_path / f"a{suffix}")
    assert out.read_bytes().startswith(begin)


def test_a_run_still_writing_and_one_of_a_single_bare_step(tmp_path, drawn):
    make_run(tmp_path / "live")
    with (tmp_path / "live/metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "lo')
    plotting.draw(tmp_path / "live", tmp_path / "a.png")
    assert panel(drawn[0], "learning rate").lines[0].get_xdata()[-1] == STEPS
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    plotting.draw(tmp_path / "bare", tmp_path / "b.png")
    empty = [axes for axes in drawn[1].axes if axes.texts]
    assert len(empty) == 7
    (tmp_path / "odd").mkdir()
    odd = [
        {"step": 1, "loss": "high", "router_load": [1, 2]},
        {"step": 2, "loss": 3.5, "router_load": 1.5, "loss_by_source": [1.0, None]},
        {"step": 3, "loss": 3.0, "router_load": [1, 2, 3], "grad_norm": 0.0},
        {"step": 4, "loss": 2.5, "router_load": [3, 5]},
    ]
    (tmp_path / "odd/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in odd))
    plotting.draw(tmp_path / "odd", tmp_path / "c.png")
    (mean,) = panel(drawn[2], "router load").lines
    assert list(mean.get_xdata()) == [1, 4]
    assert list(mean.get_ydata()) == [1.5, 4]


@pytest.mark.parametrize(
    ("metrics", "about", "message"),
    [
        (None, None, "metrics.jsonl: no such file"),
        ("", None, "holds no step yet"),
        ('{"step": 1, "lo', None, "holds no step yet"),
        ('{"step": 1}\nxx\n{"step": 3}\n', None, "metrics.jsonl: line 2 is not a JSON object"),
        ('{"step": 2}\n{"step": 1}\n', None, "line 2 is of step 1"),
        ('{"step": 1}\n', "{", "run.json: not JSON"),
    ],
    ids=["no metrics", "empty", "torn", "corrupt", "out of order", "run.json"],
)
def test_nothing_to_draw_is_one_line(tmp_path, capsys, metrics, about, message):
    run = tmp_path / "run"
    run.mkdir()
    if metrics is not None:
        (run / "metrics.jsonl").write_text(metrics)
    if about is not None:
        (run / "run.json").write_text(about)
    assert main(["plot", str(run)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (run / "plot.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["run/metrics.jsonl"], "run/metrics.jsonl: no such folder"),
        (["run", "--out", "a.gpx"], "a.gpx: cannot draw a 'gpx' picture"),
        (["run", "--out", "no/where.png"], "no/where.png: No such file or directory"),
        (["run", "--out", "folder.png"], "folder.png: Is a directory"),
        (["run", "--out", "run/metrics.jsonl/a.png"], "a.png: Not a directory"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    make_run(tmp_path / "run", steps=5)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "run"]


def test_a_full_disk_keeps_the_picture_before(tmp_path, capsys):
    make_run(tmp_path / "run", steps=30)
    out = tmp_path / "run/plot.png"
    assert main(["plot", str(tmp_path / "run")]) == 0
    before = out.read_bytes()
    with out.open("rb") as reader:
        assert main(["plot", str(tmp_path / "run")]) == 0
        # Whoever looks at the picture while it is drawn again sees the old one to its end.
        assert os.fstat(reader.fileno()).st_ino != out.stat().st_ino
        assert reader.read() == before
    before = out.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # A limit on the size of files fails in the middle of a write, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        code = main(["plot", str(tmp_path / "run")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert capsys.readouterr().err.endswith("plot.png: File too large\n")
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "plot.png"]
