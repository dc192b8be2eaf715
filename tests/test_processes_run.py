"""Several processes on loopback train as one does, stop together, and end when one of them dies."""

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
    """Start two processes of one run; `at` is for the one that is the victim."""

    def start(arguments, *, victim=1, at=None):
        port, found = free_port(), Group(processes, tmp_path, programs)
        for number in range(2):
            options = arguments + by_hand(port, number, 2)
            found.start(options, at=at if number == victim else None)
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


def gone(process):
    return [
        f"mmx: error: process {process} is gone (its connection broke); start all again to go on "
        "from the last checkpoint"
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_stopped_killed_and_started_again_train_as_one(
    corpus, alone, group, tmp_path
):
    folder = tmp_path / "run"
    # SIGTERM to one of them saves the same step in both.
    first = group(command(corpus, folder), at=(2, TERM))
    assert first.end() == ([0, 0], [[], []])
    stopped = complete_steps(folder / "checkpoints")[-1]
    assert 2 <= stopped < 6
    assert len(process_runs.records(folder)) == stopped
    told, quiet = (log.read_text() for log in first.logs)
    assert "mmx: process 1 of 2 (by hand), coordinator 127.0.0.1:" in quiet
    for word in ("step 1/", "run the same command", "devices ", "held-out loss"):
        assert word in told
        assert word not in quiet  # process 0 speaks for all
    # SIGKILL to one of them ends the other.
    second = group(command(corpus, folder), at=(7, KILL))
    second.children[1].join(600)
    codes, errors = second.end(limit=60)
    assert codes == [1, -KILL]
    assert errors == [gone(1), []]
    assert complete_steps(folder / "checkpoints")[-1] == 6
    assert group(command(corpus, folder)).end() == ([0, 0], [[], []])
    ours, theirs = process_runs.records(folder), process_runs.records(alone)
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "heldout_loss"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
        # Four devices and one program in both; sums between devices may be in another order.
        np.testing.assert_allclose(*np.array(pairs).T, rtol=1e-5, err_msg=name)
        assert len({a for a, _ in pairs}) > 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_others_end_when_process_0_is_killed(corpus, group, tmp_path):
    """It serves the coordination: jax alone would abort them with a stack trace."""
    found = group(command(corpus, tmp_path / "run"), victim=0, at=(3, KILL))
    found.children[0].join(600)
    codes, errors = found.end(limit=60)
    assert codes == [-KILL, 1]
    assert errors == [[], gone(0)]


def test_commands_that_differ_and_one_that_waits_alone(processes, programs, corpus, tmp_path):
    """Refused before any device is touched, in one line and with exit code 2."""
    arguments, found = command(corpus, tmp_path / "run"), Group(processes, tmp_path, programs)
    port, lonely = free_port(), free_port()
    found.start([*arguments, *by_hand(port, 0, 2)])
    found.start([*arguments, "--seq-len", "16", *by_hand(port, 1, 2)])
    found.start([*arguments, "--peer-timeout", "2", *by_hand(lonely, 0, 2)])
    codes, errors = found.end(limit=60)
    assert codes == [2, 2, 2]
    differ = (
        "mmx: error: process 1 has seq_len = 16, process 0 has 32; start all processes with the "
        "same command"
    )
    missing = (
        "mmx: error: process 1 of 2 did not come within 2 seconds; look at what became of it, or "
        "wait longer with --peer-timeout"
    )
    assert errors == [[differ], [differ], [missing]]
    for log in found.logs:
        assert len(log.read_text().splitlines()) == 2  # that, and what was found
    assert not (tmp_path / "run").exists()
