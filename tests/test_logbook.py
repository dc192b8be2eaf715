"""Metrics on disk, whatever happens to the process that writes them."""

import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mmx.training.logbook import Logbook, read


def lines(run_dir):
    return (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def write_steps(run_dir, steps, *, first_step=None, **options):
    steps = list(steps)
    with Logbook(run_dir, first_step=first_step or steps[0], tensorboard=False, **options) as log:
        for step in steps:
            log.write({"step": step, "loss": 10.0 / step, "writer": first_step or steps[0]})


def spoil(run_dir, data):
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(data)


# ---------------------------------------------------------------- what is on disk


def test_a_record_is_one_line_with_the_values_given(tmp_path):
    with Logbook(tmp_path, first_step=1, tensorboard=False) as log:
        log.write({"step": 1, "loss": 0.1 + 0.2, "router_load": [1.5, float("nan"), 2.0]})
        # On disk before anything is closed: another process reads it.
        (line,) = lines(tmp_path)
        log.write({"step": 2, "loss": np.float32(1.5), "x": np.arange(3), "inf": -np.inf})
    assert line.endswith(b"\n")
    assert json.loads(line) == {
        "step": 1,
        "loss": 0.30000000000000004,
        "router_load": [1.5, None, 2.0],
    }
    assert read(tmp_path)[1] == {"step": 2, "loss": 1.5, "x": [0, 1, 2], "inf": None}


@pytest.mark.parametrize("first_step", [1, 4, 8])
def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path, first_step):
    write_steps(tmp_path, range(1, 8))
    before = lines(tmp_path)
    write_steps(tmp_path, range(first_step, 10), first_step=first_step)
    records = read(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 10))
    assert lines(tmp_path)[: first_step - 1] == before[: first_step - 1]
    assert {r["writer"] for r in records if r["step"] >= first_step} == {first_step}


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_last_line_is_dropped_and_a_whole_one_is_kept(tmp_path, cut):
    write_steps(tmp_path, [1, 2, 3])
    *kept, last = lines(tmp_path)
    assert len(last) > 30
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(kept) + last[:-cut])
    # Without its end of line alone the record is whole: a step is lost only where it must be.
    whole = 3 if cut == 1 else 2
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3][:whole]
    write_steps(tmp_path, [whole + 1, whole + 2])
    assert [record["step"] for record in read(tmp_path)] == list(range(1, whole + 3))
    assert all(json.loads(line) for line in lines(tmp_path))


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b"\0" * 4096, b"\xff", b"[" * 100_000])
def test_any_torn_end_is_dropped(tmp_path, torn):
    write_steps(tmp_path, [1, 2, 3])
    spoil(tmp_path, torn)
    assert len(read(tmp_path)) == 3
    write_steps(tmp_path, [4])
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "bad", [b"garbage\n", b"\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": true}\n', b"\xff\n"]
)
def test_a_bad_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path, bad):
    write_steps(tmp_path, [1, 2])
    spoil(tmp_path, bad + b'{"step": 3}\n')
    data = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 3 is not a JSON object"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 3"):
        Logbook(tmp_path, first_step=4, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == data


def test_damage_after_the_step_that_is_resumed_is_dropped_with_the_rest(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    spoil(tmp_path, b"garbage\n")
    write_steps(tmp_path, [3, 4])
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("step", [2, 1])
def test_a_step_twice_on_disk_is_named(tmp_path, step):
    write_steps(tmp_path, [1, 2])
    spoil(tmp_path, b'{"step": %d}\n' % step)
    with pytest.raises(ValueError, match=f"line 3 is of step {step} and follows step 2"):
        read(tmp_path)


@pytest.mark.parametrize("record", [{"step": 3}, {"step": 2}, {"loss": 1.0}, {"step": "5"}])
def test_a_record_out_of_order_is_refused(tmp_path, record):
    write_steps(tmp_path, [1, 2, 3])
    with Logbook(tmp_path, first_step=4, tensorboard=False) as log:
        with pytest.raises(ValueError, match="after step 3"):
            log.write(record)
        log.write({"step": 4})
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3, 4]


def test_a_second_process_on_the_same_folder_is_found_out(tmp_path):
    with Logbook(tmp_path, first_step=1, tensorboard=False) as log:
        log.write({"step": 1})
        spoil(tmp_path, b'{"step": 2}\n')
        with pytest.raises(ValueError, match="another process"):
            log.write({"step": 2})


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_raises_and_loses_no_line(tmp_path, tensorboard):
    record = {"loss": 1.0, "router_load": [1.0] * 50}
    log = Logbook(tmp_path, first_step=1, tensorboard=tensorboard)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = 0
    try:
        # A limit on the size of files fails in the middle of a write, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(OSError, match=r"metrics\.jsonl|tensorboard") as caught:  # noqa: PT012
            for step in range(1, 1000):
                log.write({"step": step, **record})
                done = step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 5 < done < 30
    assert caught.value.filename.startswith(str(tmp_path))
    # There is room again: what follows is appended to whole lines, not to half of one.
    last = len(read(tmp_path))
    assert last in (done, done + 1)
    log.write({"step": last + 1, **record})
    log.close()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == list(range(1, last + 2))


WRITER = """
import sys
from pathlib import Path
from mmx.training.logbook import Logbook
first = int(sys.argv[2])
with Logbook(Path(sys.argv[1]), first_step=first, tensorboard=False) as log:
    print("ready", flush=True)
    for step in range(first, first + 10**7):
        log.write({"step": step, "loss": 1.0 / step, "load": [step * 0.1] * 40})
"""


def test_kills_leave_one_object_a_step(tmp_path):
    chance = random.Random(0)
    first = 1
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            size = (tmp_path / "metrics.jsonl").stat().st_size
            goal = size + chance.randrange(1, 400_000)
            while (tmp_path / "metrics.jsonl").stat().st_size < goal:
                pass
            process.send_signal(signal.SIGKILL)
        steps = [record["step"] for record in read(tmp_path)]
        assert steps == list(range(1, len(steps) + 1))
        assert steps[-1] > first
        first = chance.randrange(1, steps[-1] + 2)  # the last checkpoint is some steps back


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file"):
        read(tmp_path)


def test_closing_twice_and_the_descriptor(tmp_path):
    log = Logbook(tmp_path, first_step=1)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    log.close()
    log.close()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before - 2  # the lines and the events


# ---------------------------------------------------------------- mirrors


def events(file):
    """Events of a file of TensorBoard: length, its CRC, data, its CRC."""
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_has_the_numbers_and_hides_what_is_repeated(tmp_path):
    config = {"source_names": ["code", "prose"]}
    for first in (1, 3):
        with Logbook(tmp_path, first_step=first, run_config=config) as log:
            for step in range(first, first + 4):
                log.write(
                    {
                        "step": step,
                        "loss": step / 4,
                        "grad_norm": None,
                        "router_load": [1.0, None, step],
                        "loss_by_source": [30.0, 5.0],
                        "tokens_by_source": [10, 0],
                    }
                )
    first, second = sorted(
        (tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns
    )
    version, start, *steps = events(second)
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == event_pb2.SessionLog.START
    assert start.step == 3
    assert [event.step for event in steps] == [3, 4, 5, 6]
    assert [event.step for event in events(first)][2:] == [1, 2, 3, 4]
    values = {value.tag: value.simple_value for value in steps[1].summary.value}
    assert values == {
        "loss": 1.0,
        "router_load/0": 1.0,
        "router_load/2": 4.0,
        "loss_by_source/code": 3.0,  # a mean over its targets; prose had none
        "tokens_by_source/code": 10.0,
        "tokens_by_source/prose": 0.0,
    }


def test_without_tensorboard_there_is_no_folder(tmp_path):
    write_steps(tmp_path, [1])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


class FakeWandb(types.ModuleType):
    class errors:
        class Error(Exception):
            pass

    def __init__(self, failure=None):
        super().__init__("wandb")
        self.failure, self.calls, self.logged, self.finished = failure, [], [], 0

    def init(self, **options):
        if self.failure:
            raise self.errors.Error(self.failure)
        self.calls.append(options)
        return self

    def log(self, values, *, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write_steps(tmp_path, [1, 2], wandb="project", run_config={"seed": 3})
    write_steps(tmp_path, [2, 3], wandb="project", run_config={"seed": 3})
    assert [step for step, _ in fake.logged] == [1, 2, 2, 3]
    assert fake.logged[1][1] == {"loss": 5.0, "writer": 1.0}
    assert fake.calls[0] == fake.calls[1]
    assert fake.calls[0]["config"] == {"seed": 3}
    assert fake.finished == 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "install wandb or leave --wandb out"),
        (types.ModuleType("wandb"), "install wandb or leave --wandb out"),
        (FakeWandb("no API key"), "wandb: no API key; run `wandb login`"),
    ],
    ids=["missing", "a folder of that name", "not logged in"],
)
def test_wandb_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match=message) as caught:
        Logbook(tmp_path, first_step=1, wandb="project")
    assert "\n" not in str(caught.value)


def test_the_logbook_imports_without_jax():
    code = "import sys, mmx.training.logbook, mmx.training.plotting; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
