import json
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import train_runs

import mmx
from mmx.cli import main
from mmx.training import loop
from mmx.training.checkpoint import SaveFailed

pytestmark = pytest.mark.usefixtures("quick_programs")
STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return train_runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_runs.run(corpus, folder, STEPS)


@pytest.fixture(scope="module")
def run_child(processes, corpus):
    """Train in a process of its own, compiling as this one does; gives its exit code."""

    def run(folder, steps, **options):
        quick = jax.config.values["jax_disable_most_optimizations"]
        arguments = corpus.folder, folder, steps, quick
        child = processes.Process(target=train_runs.child, args=arguments, kwargs=options)
        child.start()
        child.join()
        return child.exitcode

    return run


def test_a_run_leaves_what_it_promises(whole):
    folder, result = whole
    assert result.finished
    assert [step for step, _ in train_runs.losses(folder)] == list(range(1, STEPS + 1))
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [3, 6, STEPS]
    assert result.heldout_after < result.heldout_before
    about = json.loads((folder / "run.json").read_text())
    assert about["source_names"] == ["one", "two"]
    assert about["model"]["embed_dim"] == train_runs.CONFIG.embed_dim
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record["data_wait"] <= 1 for record in records)
    last = records[-1]
    assert last["num_compiles"] == 1  # for both batch sizes
    assert last["heldout_loss"] == result.heldout_after
    # Targets of two micro-batches: more than one of them can hold.
    assert last["num_targets"] > train_runs.ROWS * train_runs.LENGTH
    config, params = mmx.load(folder)
    assert config == train_runs.CONFIG
    assert np.array_equal(params["head"]["kernel"], np.asarray(result.params["head"]["kernel"]))


def test_a_run_that_stops_and_goes_on_is_the_same_run(corpus, whole, tmp_path):
    train_runs.run(corpus, tmp_path, 4)
    train_runs.run(corpus, tmp_path, STEPS)
    assert train_runs.losses(tmp_path) == train_runs.losses(whole[0])
    assert train_runs.digest(tmp_path, STEPS) == train_runs.digest(whole[0], STEPS)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_a_killed_run_repeats_the_lost_steps_bit_for_bit(corpus, whole, run_child, tmp_path, step):
    assert run_child(tmp_path, STEPS, kill_at=step) == -signal.SIGKILL
    assert train_runs.losses(tmp_path)[-1][0] == step
    train_runs.run(corpus, tmp_path, STEPS)
    assert train_runs.losses(tmp_path) == train_runs.losses(whole[0])
    assert train_runs.digest(tmp_path, STEPS) == train_runs.digest(whole[0], STEPS)


def test_a_run_goes_on_on_other_numbers_of_devices(corpus, whole, run_child, tmp_path):
    assert run_child(tmp_path, 3, devices=8) == 0
    train_runs.run(corpus, tmp_path, 6)  # on one
    assert run_child(tmp_path, STEPS, devices=4) == 0
    ours, theirs = (np.array(train_runs.losses(f)) for f in (tmp_path, whole[0]))
    # The order of sums differs with the devices, and nothing else.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(corpus, whole, tmp_path, monkeypatch, number):
    update = loop.Display.update

    def signalled(self, record):
        update(self, record)
        if record["step"] == 4:
            signal.raise_signal(number)

    monkeypatch.setattr(loop.Display, "update", signalled)
    handler = signal.getsignal(number)
    result = train_runs.run(corpus, tmp_path, STEPS)
    assert not result.finished
    assert result.step in (4, 5)
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    train_runs.run(corpus, tmp_path, STEPS)
    assert train_runs.digest(tmp_path, STEPS) == train_runs.digest(whole[0], STEPS)


def test_a_save_that_fails_costs_no_training(corpus, whole, tmp_path, monkeypatch):
    save, failed = loop.Checkpoints.save, []

    def full(self, step, *args, **kwargs):
        if step == 3:
            failed.append(step)
            raise SaveFailed("step 3 could not be saved: No space left on device")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(loop.Checkpoints, "save", full)
    assert train_runs.run(corpus, tmp_path, STEPS).finished
    assert failed == [3]
    assert train_runs.digest(tmp_path, STEPS) == train_runs.digest(whole[0], STEPS)


def test_skipped_steps_in_a_row_end_the_run(corpus, tmp_path, monkeypatch):
    make = loop.make_train_step

    def poisoned(*args, **kwargs):
        program = make(*args, **kwargs)

        class Poisoned:
            num_compiles = 1

            def __call__(self, state, batch, accumulation):
                if int(state.step) >= 3:
                    params = {
                        **state.params,
                        "embed": {"embedding": np.nan * state.params["embed"]["embedding"]},
                    }
                    kept = state.params
                    after, metrics = program(replace(state, params=params), batch, accumulation)
                    return replace(after, params=kept), metrics
                return program(state, batch, accumulation)

        return Poisoned()

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    with pytest.raises(loop.TrainingStopped, match="5 steps in a row were skipped"):
        train_runs.run(corpus, tmp_path, 30, max_skipped=5, heldout_every=0)
    records = train_runs.losses(tmp_path)
    # The step that was under way when the fifth was seen is recorded and saved like any other.
    assert (tmp_path / "checkpoints" / f"{len(records):08d}").is_dir()
    assert [step for step, loss in records if loss is None] == list(range(4, len(records) + 1))


def test_data_that_end_end_the_run(corpus, tmp_path):
    with pytest.raises(loop.TrainingStopped, match="the data ended at step"):
        train_runs.run(corpus, tmp_path, 1000, epochs=1, save_every=1000, heldout_every=0)
    assert (tmp_path / "checkpoints" / f"{len(train_runs.losses(tmp_path)):08d}").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(config=replace(train_runs.CONFIG, expert_dim=32)), "expert_dim"),
        (dict(seed=1), "seed"),
        (dict(config=replace(train_runs.CONFIG, vocab_size=200)), "vocab_size=200"),
    ],
)
def test_another_run_s_folder_is_refused(corpus, whole, change, message):
    before = train_runs.losses(whole[0])
    with pytest.raises(ValueError, match=message):
        train_runs.run(corpus, whole[0], STEPS, **change)
    assert train_runs.losses(whole[0]) == before


def _fails(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmx: error: ")
    assert error.count("\n") == 1
    return error


def test_bad_commands_say_what_to_do(capsys, tmp_path, corpus):
    assert "did you mean 'demo'?" in _fails(capsys, "train", "demmo")
    assert "unknown preset 'x'" in _fails(capsys, "train", "x")
    shards = ("--corpus", corpus.folder)
    error = _fails(capsys, "train", "demo", *shards, "--seq-len", 10**9)
    assert "max_seq_len" in error
    error = _fails(capsys, "train", "demo", "--corpus", tmp_path, "--run-dir", tmp_path / "r")
    assert "mmx data build" in error
    weights = ("--weights", "onne", "1.0")
    error = _fails(capsys, "train", "demo", *shards, *weights, "--run-dir", tmp_path / "r")
    assert "did you mean 'one'?" in error
    (tmp_path / "file").write_text("")
    weights = ("--weights", "one", "1.0")
    error = _fails(capsys, "train", "demo", *shards, *weights, "--run-dir", tmp_path / "file")
    assert "choose another run folder" in error
    assert not (Path(tmp_path) / "r").exists()
