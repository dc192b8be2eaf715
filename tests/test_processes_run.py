"""Several processes on loopback train as one does, stop together, and end when one of them dies."""

import time

import numpy as np
import process_runs
import pytest
import train_runs
from process_runs import KILL, STEPS, TERM, Group, by_hand, command, free_port

from mmx.training.checkpoint import complete_steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return train_runs.corpus(tmp_path_factory.mktemp("corpus")).folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def group(processes, programs, tmp_path):
    """Start processes 0 to count - 1 of one run; `at` is for the last of them."""

    def start(count, arguments, *, devices=2, at=None, port=None):
        port = port or free_port()
        found = Group(processes, tmp_path, programs)
        for number in range(count):
            found.start(
                arguments + by_hand(port, number, count),
                devices=devices,
                at=at if number == count - 1 else None,
            )
        return found

    return start


@pytest.fixture(scope="module")
def alone(processes, programs, corpus, tmp_path_factory):
    """The same global batch in one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    found = Group(processes, tmp_path_factory.mktemp("logs"), programs)
    codes, _ = found.start(command(corpus, folder), devices=4).end()
    assert codes == [0]
    assert "mmx: process" not in found.logs[0].read_text()
    return folder


@pytest.mark.slow
def test_processes_train_as_one_stop_together_and_go_on(corpus, alone, group, tmp_path):
    """SIGTERM to one of two saves the same step in both; four processes go on from there."""
    folder = tmp_path / "run"
    first = group(2, command(corpus, folder), at=(3, TERM))
    assert first.end() == ([0, 0], [[], []])
    stopped = complete_steps(folder / "checkpoints")[-1]
    assert 3 <= stopped < STEPS
    assert len(process_runs.records(folder)) == stopped
    quiet, told = (first.logs[i].read_text() for i in (1, 0))
    assert "mmx: process 1 of 2 (by hand), coordinator 127.0.0.1:" in quiet
    assert "step 1/" in told
    assert "run again" not in quiet
    for word in ("step 1/", "run the same", "devices", "held-out"):
        assert word not in quiet  # process 0 speaks for all
    second = group(4, command(corpus, folder), devices=1)
    assert second.end() == ([0] * 4, [[]] * 4)
    ours, theirs = process_runs.records(folder), process_runs.records(alone)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "heldout_loss"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
        # Devices and program are the same four; only the order of sums between them may differ.
        np.testing.assert_allclose(*np.array(pairs).T, rtol=1e-5, err_msg=name)
        assert len({a for a, _ in pairs}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_others(corpus, alone, processes, programs, tmp_path, victim):
    folder, port = tmp_path / "run", free_port()
    found = Group(processes, tmp_path, programs)
    for number in range(2):
        arguments = command(corpus, folder) + by_hand(port, number, 2)
        found.start(arguments, at=(4, KILL) if number == victim else None)
    found.children[victim].join(200)
    begin = time.monotonic()
    codes, errors = found.end(limit=60)
    assert time.monotonic() - begin < 60
    assert codes[victim] == -KILL
    assert codes[1 - victim] == 1
    assert errors[1 - victim] == [
        f"mmx: error: process {victim} is gone (its connection broke); start all again to go on "
        "from the last checkpoint"
    ]
    assert complete_steps(folder / "checkpoints") == [2]
    if victim == 1:
        again = Group(processes, tmp_path, programs).start(command(corpus, folder), devices=4)
        assert again.end()[0] == [0]
        ours, theirs = process_runs.records(folder), process_runs.records(alone)
        pairs = [(a["loss"], b["loss"]) for a, b in zip(ours, theirs, strict=True)]
        np.testing.assert_allclose(*np.array(pairs).T, rtol=1e-5)  # as above
