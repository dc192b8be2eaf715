"""The folder of a run: one run's at a time, and nothing in it taken for what it is not."""

import json
import shutil
import signal

import pytest
import train_runs

from mmx.data.batches import Batches
from mmx.training import loop
from mmx.training.run_folder import reserved

pytestmark = pytest.mark.usefixtures("quick_programs")
STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return train_runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_runs.run(corpus, folder, STEPS)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_two_runs_in_one_folder_are_refused(corpus, copied):
    before = (copied / "metrics.jsonl").read_bytes()
    with reserved(copied), pytest.raises(ValueError, match="another run is training in this"):
        train_runs.run(corpus, copied, STEPS + 1)
    assert (copied / "metrics.jsonl").read_bytes() == before
    assert train_runs.run(corpus, copied, STEPS + 1).finished  # the lock has ended


@pytest.mark.parametrize("damage", ["a byte less", "no manifest"])
def test_steps_of_which_none_is_whole_are_no_new_run(corpus, copied, damage):
    for step in (copied / "checkpoints").iterdir():
        if damage == "no manifest":
            (step / "MANIFEST.json").unlink()
        else:
            path = step / "data.json"
            path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    with (
        pytest.raises(ValueError, match=r"none of its 3 steps is whole \(.*; bring the files back"),
        pytest.warns(UserWarning, match="is not complete and ignored"),
    ):
        train_runs.run(corpus, copied, STEPS)
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("change", ["missing", "cut", "another"])
def test_another_tokenizer_in_the_corpus_is_refused(tmp_path, change):
    manifest = train_runs.corpus(tmp_path / "corpus")
    path = manifest.tokenizer_file
    content = path.read_text()
    path.unlink()
    if change != "missing":
        path.write_text(content[:100] if change == "cut" else content + "\n")
    with pytest.raises(ValueError, match=r"tokenizer.json: .*; bring it back, or build the corpus"):
        train_runs.run(manifest, tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{bad", "[]", "[" * 100_000])
def test_a_run_json_that_is_none_is_refused(corpus, copied, content):
    (copied / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json: not what a run writes; remove it"):
        train_runs.run(corpus, copied, STEPS + 1)
    (copied / "run.json").unlink()
    assert train_runs.run(corpus, copied, STEPS + 1).finished
    assert json.loads((copied / "run.json").read_text())["steps"] == STEPS + 1


@pytest.mark.parametrize("error", [StopIteration(), ValueError("shard 7: record 3 is damaged")])
def test_what_was_trained_is_saved_when_a_batch_does_not_come(
    corpus, whole, tmp_path, monkeypatch, error
):
    """In the middle of a step of two micro-batches, the first of which is read again later."""
    following, calls = Batches.__next__, []

    def failing(self):
        if self.get_state()["max_epochs"] == [None, None]:  # of training
            calls.append(1)
            if len(calls) == 8:  # four steps of one, two of two
                raise error
        return following(self)

    monkeypatch.setattr(Batches, "__next__", failing)
    message = "the data ended at step" if isinstance(error, StopIteration) else "shard 7: record 3"
    with pytest.raises(loop.TrainingStopped, match=message):
        train_runs.run(corpus, tmp_path, STEPS)
    assert len(train_runs.losses(tmp_path)) == 5
    assert (tmp_path / "checkpoints" / "00000005").is_dir()
    monkeypatch.undo()
    train_runs.run(corpus, tmp_path, STEPS)
    assert train_runs.digest(tmp_path, STEPS) == train_runs.digest(whole, STEPS)


def test_a_signal_before_the_first_step_saves_and_ends(corpus, whole, tmp_path, monkeypatch):
    def signalled(*args, original=loop.init_state, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "init_state", signalled)
    result = train_runs.run(corpus, tmp_path, STEPS)
    assert (result.step, result.finished) == (0, False)
    monkeypatch.undo()
    train_runs.run(corpus, tmp_path, STEPS)
    assert train_runs.losses(tmp_path) == train_runs.losses(whole)
    assert train_runs.digest(tmp_path, STEPS) == train_runs.digest(whole, STEPS)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("heldout_every", -1), ("sample_every", -1)]
)
def test_numbers_out_of_range_are_refused(corpus, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least"):
        train_runs.run(corpus, tmp_path, **{"steps": STEPS, name: value})
