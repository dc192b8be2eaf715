"""Several processes on loopback train as one does, stop together, and end when one of them dies."""

import numpy as np
import process_runs
import pytest
import train_runs
from process_runs import KILL, STEPS, TERM, Group, by_hand, command, free_port

from mmx.training.checkpoint import complete_steps
from sharding.processes import Processes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return train_runs.corpus(tmp_path_factory.mktemp("corpus")).folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def group(processes, programs, tmp_path):
    """Start some processes of one run, with four devices in all; `at` is for the last of them."""

    def start(count, arguments, *, at=None):
        port, found = free_port(), Group(processes, tmp_path, programs)
        for number in range(count):
            options = arguments + by_hand(port, number, count)
            last = number == count - 1
            found.start(options, devices=4 // count, at=at if last else None)
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


def test_four_processes_killed_and_two_that_go_on_train_as_one(corpus, alone, group, tmp_path):
    folder = tmp_path / "run"
    # SIGKILL to one of four ends the others.
    four = group(4, command(corpus, folder), at=(3, KILL))
    four.children[3].join(600)
    codes, errors = four.end(limit=60)
    assert codes == [1, 1, 1, -KILL]
    assert errors == [gone(3), gone(3), gone(3), []]
    assert complete_steps(folder / "checkpoints") == [2]
    # Two go on; SIGTERM to one of them saves the same step in both.
    two = group(2, command(corpus, folder), at=(4, TERM))
    assert two.end() == ([0, 0], [[], []])
    stopped = complete_steps(folder / "checkpoints")[-1]
    assert 4 <= stopped < STEPS
    told, quiet = (log.read_text() for log in two.logs)
    assert "mmx: process 1 of 2 (by hand), coordinator 127.0.0.1:" in quiet
    for word in ("going on after step 2", f"step 4/{STEPS}", "run the same command", "held-out"):
        assert word in told
        assert word not in quiet  # process 0 speaks for all
    ours, theirs = process_runs.records(folder), process_runs.records(alone)[:stopped]
    assert [record["step"] for record in ours] == list(range(1, stopped + 1))
    for name in ("loss", "grad_norm", "heldout_loss"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
        # Four devices and one program in all; sums between devices may be in another order.
        np.testing.assert_allclose(*np.array(pairs).T, rtol=1e-5, err_msg=name)
        assert len({a for a, _ in pairs}) > 1
    written, expected = (run / "samples/step_00000004.txt" for run in (folder, alone))
    assert written.read_text() == expected.read_text()


@pytest.mark.parametrize(
    ("count", "victim", "ending", "code", "victims_code"),
    [
        (3, 2, process_runs.die, 1, -KILL),
        # It serves the coordination: jax alone would abort the others with a stack trace.
        (2, 0, process_runs.die, 1, -KILL),
        (2, 1, process_runs.fail, 2, 2),
        (2, 0, process_runs.interrupt, 130, 130),
        (2, 1, None, 0, 0),
    ],
)
def test_how_one_ends_all_end(processes, tmp_path, count, victim, ending, code, victims_code):
    address, found = f"127.0.0.1:{free_port()}", Group(processes, tmp_path, None)
    for number in range(count):
        found.logs.append(tmp_path / f"log-{number}")
        asked = (Processes(address, number, count), found.logs[-1])
        options = (*asked, ending if number == victim else None)
        found.children.append(processes.Process(target=process_runs.collectives, args=options))
        found.children[-1].start()
    found.children[victim].join(120)
    codes, errors = found.end(limit=60)
    for number in range(count):
        if number == victim:
            assert codes[number] == victims_code
            words = {process_runs.fail: "the disk is full", process_runs.interrupt: "interrupted"}
            told = words.get(ending)
            assert errors[number] == ([f"mmx: error: {told}"] if told else [])
            assert "Traceback" not in found.logs[number].read_text()
        else:
            said = {
                process_runs.die: gone(victim),
                process_runs.fail: [f"mmx: error: process {victim} ended: the disk is full"],
                process_runs.interrupt: [f"mmx: error: process {victim} ended: interrupted"],
                None: [],
            }
            assert codes[number] == code
            assert errors[number] == said[ending]


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
