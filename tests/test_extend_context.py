"""The recipe of context extension on a model of seconds: what it reports, and going on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import train_runs
from process_runs import EXTENSION, TERM, Group, by_hand, free_port

from mmx.data import tokenizer as bpe
from mmx.evaluation.needles import needle_accuracy
from mmx.training.checkpoint import complete_steps
from mmx.training.run_folder import reserved
from mmx.training.runs import load_run, run_config
from recipes import extend_context
from recipes.extend_context import PRESETS
from recipes.origins import digest

pytestmark = pytest.mark.usefixtures("quick_programs")
STAGES = EXTENSION.stages


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    root = tmp_path_factory.mktemp("extend")
    manifest = train_runs.corpus(root / "corpus")
    train_runs.run(manifest, root / "run", 3)
    train_runs.run(manifest, root / "other", 4)
    return root, manifest


def recipe_of(root: Path, manifest, name="long"):
    return dataclasses.replace(
        EXTENSION, from_run=root / "run", run_dir=root / name, corpus=manifest.folder
    )


@pytest.fixture(scope="module")
def extend(pretrained, processes, tmp_path_factory):
    """Run the command in processes of one device each; the reports and what each said.

    `at` is for the last of them: (step, signal). With `code` what went wrong is in the place of the
    reports.
    """
    root, manifest = pretrained
    programs = tmp_path_factory.mktemp("programs")

    def run(folder, count=1, at=None, base="run", code=0):
        port, found = free_port(), Group(processes, tmp_path_factory.mktemp("logs"), programs)
        for number in range(count):
            arguments = [
                "extend", "demo", "--from", str(root / base), "--run-dir", str(folder),
                "--corpus", str(manifest.folder),
                *(by_hand(port, number, count) if count > 1 else ()),
            ]  # fmt: skip
            found.start(arguments, devices=1, at=at if number == count - 1 else None)
        codes, errors = found.end()
        assert codes == [code] * count
        file = folder / "extension.json"
        reports = json.loads(file.read_text()) if file.exists() else []
        assert code or errors == [[]] * count
        return errors if code else reports, [log.read_text() for log in found.logs]

    return run


@pytest.fixture(scope="module")
def extended(pretrained, extend):
    return extend(pretrained[0] / "long")


def test_stages_follow_each_other_and_are_reported(pretrained, extended, extend):
    root, manifest = pretrained
    reports, (said,) = extended
    assert "RoPE" in said
    lines = [line for line in said.splitlines() if line.startswith("after ")]
    for line, row in zip(lines, reports, strict=True):
        assert f"after stage {row['stage']}: length {row['seq_len']}" in line
        assert f"short text {row['short_loss_before']:.3f} -> {row['short_loss']:.3f}" in line
        assert f"retrieved {np.mean(row['needles']['exact']):.0%}" in line
    assert [row["seq_len"] for row in reports] == [128, 256]
    for row, stage in zip(reports, STAGES, strict=True):
        step, config = run_config(root / "long" / row["run"])
        assert step == 5
        assert config.rope_theta == stage.rope_theta
        assert config.max_seq_len == stage.seq_len
        assert row["tokens"] == 5 * 8 * stage.seq_len
        # The reported numbers are those of the saved model.
        config, params = load_run(root / "long" / row["run"])
        assert config == dataclasses.replace(
            train_runs.CONFIG, rope_theta=stage.rope_theta, max_seq_len=stage.seq_len
        )
        needles = needle_accuracy(
            params, config, bpe.load_tokenizer(manifest.tokenizer_file), length=stage.seq_len,
            depths=(0.0, 1.0), count=2, seed=0, batch_size=1,
        )  # fmt: skip
        assert row["needles"]["loss"] == pytest.approx(needles.loss, rel=1e-5)
        assert row["needles"]["exact"] == list(needles.exact)
        # Three steps of training before: all losses are still near log(320) = 5.77.
        assert abs(row["short_loss"] - row["short_loss_before"]) > 1e-4
        assert 3 < row["short_loss"] < 6
        assert row["heldout_loss"] < row["heldout_loss_before"]
    # Training begins with the parameters of the stage before, not anew
    # (5.83). RoPE's base and the length change its loss by little, so early in training.
    assert reports[1]["heldout_loss_before"] == pytest.approx(reports[0]["heldout_loss"], abs=0.02)
    assert reports[1]["heldout_loss_before"] < 5.7
    assert reports[0]["short_loss_before"] == reports[1]["short_loss_before"]
    # A second run trains nothing and measures the same.
    metrics = root / "long/stage-2-256/metrics.jsonl"
    lines = metrics.read_text()
    again, _ = extend(root / "long")
    assert metrics.read_text() == lines
    assert again[1]["needles"] == reports[1]["needles"]
    assert again[1]["short_loss"] == reports[1]["short_loss"]


def everything(folder):
    """What each file holds and when it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_stages_of_another_base_are_not_passed_off(pretrained, extended):
    root, manifest = pretrained
    recipe = recipe_of(root, manifest)
    before = everything(root / "long")
    first = root / "long" / extended[0][0]["run"]
    with pytest.raises(ValueError, match=r"other at step 4 .*; choose another --run-dir") as caught:
        extend_context.run(dataclasses.replace(recipe, from_run=root / "other"))
    assert str(caught.value).startswith(f"{first}: began with {root / 'run'} at step 3 (parameters")
    assert everything(root / "long") == before


def test_two_extensions_in_one_folder_are_refused(pretrained):
    """Before the second notes another base for a stage that the first has no checkpoint of yet."""
    root, manifest = pretrained
    recipe = recipe_of(root, manifest, "busy")
    with (
        reserved(root / "busy"),
        pytest.raises(ValueError, match="busy: another run is training in this folder"),
    ):
        extend_context.run(recipe)
    assert list((root / "busy").iterdir()) == []


@pytest.mark.parametrize("changed", [{"steps": 6}, {"seq_len": 192}])
def test_no_stage_is_trained_on_below_a_later_one(pretrained, extended, changed):
    root, manifest = pretrained
    stages = dataclasses.replace(STAGES[0], **changed), *STAGES[1:]
    before = everything(root / "long")
    second = root / "long" / extended[0][1]["run"]
    with pytest.raises(ValueError, match=r"which comes before it, has .* steps now") as caught:
        extend_context.run(dataclasses.replace(recipe_of(root, manifest), stages=stages))
    assert str(caught.value).startswith(f"{second}: began with ")
    assert everything(root / "long") == before


def test_an_interrupted_extension_goes_on_bit_for_bit(pretrained, extended, extend, tmp_path):
    root, _ = pretrained
    assert extend(tmp_path, at=(3, TERM))[0] == []
    origin = (tmp_path / "stage-1-128/origin.json").read_bytes()
    reports, (said,) = extend(tmp_path)
    assert "going on after step 3" in " ".join(said.split())
    assert reports == extended[0]
    assert (tmp_path / "stage-1-128/origin.json").read_bytes() == origin
    for row in reports:
        ours, theirs = (load_run(folder / row["run"])[1] for folder in (tmp_path, root / "long"))
        assert digest(ours) == digest(theirs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"needles": 0}, "--needles is 0"),
        ({"depths": (0.5, 2.0)}, "--depths is 0.5 2.0"),
        ({"save_every": 0}, "--save-every is 0"),
        ({"short_len": 33}, "--short-len: rows of 33 tokens"),
        ({"stages": (STAGES[0], dataclasses.replace(STAGES[1], learning_rate=-1.0))},
         "--stages.1.learning-rate is -1.0"),
        ({"stages": (STAGES[0], dataclasses.replace(STAGES[1], seq_len=250))},
         "--stages.1: rows of 250 tokens"),
        ({"stages": (STAGES[1], STAGES[0])}, r"--stages.N.seq-len: lengths are \(256, 128\)"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_any_work(pretrained, changes, words):
    root, manifest = pretrained
    recipe = dataclasses.replace(recipe_of(root, manifest, "unused"), **changes)
    with pytest.raises(ValueError, match=f"^{words}"):
        extend_context.run(recipe)
    assert not (root / "unused").exists()


def check_alike(ours, theirs, *, rel):
    """Two reports of a stage: fp32 sums in another order, through the steps of Adam before."""
    assert ours.keys() == theirs.keys()
    numbers, expected = (row | row["needles"] for row in (ours, theirs))
    for name in expected.keys() - {"run", "needles"}:
        assert numbers[name] == pytest.approx(expected[name], rel=rel), name


@pytest.mark.slow
def test_four_processes_measure_what_one_does(extended, extend, tmp_path):
    """Through both stages."""
    reports, (told, *quiet) = extend(tmp_path / "long", 4)
    assert "report: " in told
    assert not any("report: " in words for words in quiet)
    for ours, theirs, rel in zip(reports, extended[0], (1e-4, 1e-3), strict=True):
        check_alike(ours, theirs, rel=rel)


@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_stop_together(extended, extend, tmp_path):
    """Tokens of every row are split between them, and so are the parameters."""
    folder = tmp_path / "long"
    # The signal comes before the last step of a stage: both stop at the beginning of the next.
    (ours,), (told, quiet) = extend(folder, 2, at=(STAGES[0].steps, TERM))
    for words in ("long documents: in", "after stage 1", "stopped by a signal", "report: "):
        assert words in told
        assert words not in quiet  # process 0 speaks for all
    (theirs, following), _ = extended
    check_alike(ours, theirs, rel=1e-4)
    assert complete_steps(folder / following["run"] / "checkpoints")[-1] < STAGES[1].steps
    # The next stage has begun with the parameters of the one before.
    about = json.loads((folder / following["run"] / "run.json").read_text())
    before = following["heldout_loss_before"]
    assert about["heldout_loss_before"] == pytest.approx(before, rel=1e-4)
    # Neither process goes on with another base; with the same both do, to the end.
    errors, _ = extend(folder, 2, base="other", code=2)
    for (line,) in errors:
        assert f"{folder / ours['run']}: began with " in line
        assert "; choose another --run-dir, or remove " in line
    again, (told, _) = extend(folder, 2)
    assert again[0] == ours
    assert "going on after step " in " ".join(told.split())
    check_alike(again[1], following, rel=1e-3)


def test_presets_have_the_lengths_and_bases_of_the_paper():
    stages = PRESETS["456b"].stages
    assert [(s.seq_len, s.rope_theta) for s in stages] == [
        (131072, 5e6), (524288, 1e7), (1048576, 1e7)
    ]  # fmt: skip
    tokens = [s.seq_len * s.steps * s.batch_size * s.accumulation for s in stages]
    for got, want in zip(tokens, (300e9, 32e9, 26e9), strict=True):
        assert got == pytest.approx(want, rel=0.01)
    for recipe in PRESETS.values():
        last = [weights.at(10**9) for weights in extend_context.weights_of(recipe)]
        for stage, shares in zip(recipe.stages, last, strict=True):
            assert shares[f"long-qa-{stage.seq_len}"] == pytest.approx(0.1)
    assert [s.seq_len for s in PRESETS["demo"].stages] == [1024, 4096, 16384]


def test_bad_input_is_one_line(pretrained, tmp_path):
    root, manifest = pretrained
    with pytest.raises(ValueError, match="did you mean 'demo'"):
        extend_context.main(["dmo"])
    with pytest.raises(ValueError, match="no such folder"):
        extend_context.run(dataclasses.replace(recipe_of(root, manifest), from_run=tmp_path / "x"))
    other = train_runs.corpus(tmp_path / "other")
    (other.folder / "manifest.json").write_text(
        (other.folder / "manifest.json").read_text().replace(other.tokenizer_sha256, "0" * 64)
    )
    with pytest.raises(ValueError, match="has another tokenizer than"):
        extend_context.run(
            dataclasses.replace(recipe_of(root, manifest, "unused"), corpus=other.folder)
        )
    assert not (root / "unused").exists()
