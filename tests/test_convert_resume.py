"""A conversion that is killed, or runs out of disk, goes on as if nothing had been."""

import contextlib
import errno
import json
import os
import random
import signal
import time

import checkpoints
import pytest
from conversions import convert, refused, small

from mmx import integrity
from mmx.cli import main
from mmx.convert.workplace import JOURNAL, Workplace

TO = ["hf-released", "orbax"]
LAYERS = 8
FILES = 20  # at least, that a conversion writes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    kinds = [i % 2 for i in range(LAYERS)]
    return small(
        tmp_path_factory.mktemp("source") / "it",
        hidden_size=64, intermediate_size=128, num_local_experts=8, vocab_size=512,
        num_hidden_layers=LAYERS, attn_type_list=kinds,
    )  # fmt: skip


@pytest.fixture(scope="module")
def references(source, tmp_path_factory):
    """The trees of conversions that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    return {to: tree(convert(source, folder / to, *options(to))) for to in TO}


def options(to):
    return ["--to", to, "--shard-size", "300KB", "--workers", "2"]


def tree(folder):
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def arguments(source, destination, to, *more):
    return ["convert", str(source), str(destination), "--verify", "none", *options(to), *more]


def unfinished(folder):
    return folder.with_name(folder.name + ".converting")


def journaled(work):
    """The files that the journal of an unfinished conversion names, by whole lines.

    The journal goes before the folder is renamed; then the manifest says that every file is done.
    """
    try:
        content = (work / JOURNAL).read_bytes()
    except FileNotFoundError:
        whole = (work / integrity.MANIFEST).exists()
        return [path.name for path in work.glob("*.safetensors")] if whole else []
    return [json.loads(line)["file"] for line in content.split(b"\n")[1:-1]]


def stamps(work, names):
    return {name: (work / name).stat().st_mtime_ns for name in names}


def kill(processes, command, work, files, delay):
    """Run a child and kill it so many seconds after so many files; whether it was at it.

    Files and not seconds alone: on a busy machine, too, the kill comes inside.
    """
    child = processes.Process(target=in_child, args=(command,))
    child.start()
    while not work.exists() or len(journaled(work)) < files:
        if not child.is_alive():
            break
        time.sleep(0.001)
    time.sleep(delay)
    running = child.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return running


def in_child(command):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    os._exit(main(command))


@pytest.mark.parametrize("trials", [4, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("to", TO)
def test_killed_at_random(to, trials, processes, source, references, tmp_path):
    draw = random.Random(to)
    begun = time.monotonic()
    convert(source, tmp_path / "timed", *options(to), verify="none")
    took = time.monotonic() - begun
    inside, resumed = 0, 0
    for trial in range(trials):
        out = tmp_path / str(trial)
        command = arguments(source, out, to)
        moment = draw.randrange(FILES), draw.uniform(0, 2 * took / FILES)
        inside += kill(processes, command, unfinished(out), *moment)
        if out.exists():  # it had come to its end
            assert tree(out) == references[to]
            continue
        work = unfinished(out)
        finished = journaled(work)
        before = stamps(work, finished)
        begun_files = {p.name for p in work.glob("*.safetensors")} - set(finished)
        assert len(begun_files) <= 1  # at most one shard is done again
        resumed += bool(finished)
        with times_at_the_end(work) as after:
            assert main([*command, "--resume"]) == 0
        assert {name: after.get(name) for name in before} == before
        assert tree(out) == references[to]
    assert inside >= trials * 3 // 4  # else the kills were not where they should be
    assert resumed >= trials // 2


@contextlib.contextmanager
def times_at_the_end(work):
    """Times of the files of an unfinished conversion, just before they get their final name."""
    real, found = Workplace.publish, {}

    def publish(self):
        files = [path for path in work.rglob("*") if path.is_file()]
        found.update({p.relative_to(work).as_posix(): p.stat().st_mtime_ns for p in files})
        real(self)

    Workplace.publish = publish
    try:
        yield found
    finally:
        Workplace.publish = real


def dying(command, name, count):
    """Run the command, and die at the so-manieth call of a function of `os`."""
    real, calls = getattr(os, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] > count:
            os._exit(77)
        return real(*args, **kwargs)

    setattr(os, name, counted)
    in_child(command)


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize(
    "call", [pytest.param("fsync", marks=pytest.mark.slow), "rename", "replace", "unlink"]
)
def test_killed_at_every_step(to, call, processes, source, references, tmp_path):
    """Before each call that makes something durable, or visible; every few of them for Orbax."""
    died, count = 0, 0
    while True:
        out = tmp_path / str(count)
        command = arguments(source, out, to)
        child = processes.Process(target=dying, args=(command, call, count))
        child.start()
        child.join()
        if child.exitcode == 0:
            assert tree(out) == references[to]
            break
        assert child.exitcode == 77
        assert not out.exists() or tree(out) == references[to]
        died += 1
        if not out.exists():
            assert main([*command, "--resume"]) == 0
        assert tree(out) == references[to]
        count += 1 if count < 3 else max(1, len(references[to]) // 4)
    assert died >= (3 if call == "fsync" else 0)


# ---------------------------------------------------------------- without a kill


def interrupt(monkeypatch, source, out, to, error, after=4):
    """Run the command with a disk that fails after so many files."""
    real, calls = Workplace.record, [0]

    def record(self, file, entry):
        calls[0] += 1
        if calls[0] > after:
            raise error
        real(self, file, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "record", record)
        return main(arguments(source, out, to))


@pytest.mark.parametrize("to", TO)
def test_a_full_disk(to, source, references, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert interrupt(monkeypatch, source, out, to, full) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("mmx: error: ")
    assert "the disk is full; make room" in last
    assert "--resume" in last
    assert not out.exists()
    assert len(journaled(unfinished(out))) == 4
    assert main([*arguments(source, out, to), "--resume"]) == 0
    assert tree(out) == references[to]


def test_no_room_is_said_beforehand(source, tmp_path, monkeypatch, capsys):
    import shutil

    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    line = refused(capsys, source, tmp_path / "out", *options("orbax"))
    assert "1.0 kB are free" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", TO)
def test_an_unfinished_conversion_is_not_touched_unasked(
    to, source, references, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    interrupt(monkeypatch, source, out, to, OSError(errno.EIO, "Input/output error"))
    assert "cannot be written (Input/output error)" in capsys.readouterr().err
    before = tree(unfinished(out))
    line = refused(capsys, source, out, *options(to))
    assert "unfinished" in line
    assert "--resume" in line
    assert tree(unfinished(out)) == before
    line = refused(capsys, source, out, *options(to), "--dtype", "bf16", "--resume")
    assert "options dtype: now 'bf16', then 'as-is'" in line
    assert tree(unfinished(out)) == before
    # Beginning again leaves nothing of the first attempt.
    (unfinished(out) / "junk").write_text("")
    assert main([*arguments(source, out, to), "--overwrite"]) == 0
    assert tree(out) == references[to]


def test_a_changed_source_is_not_mixed_in(tmp_path, monkeypatch, capsys):
    source = small(tmp_path / "it")
    out = tmp_path / "out"
    interrupt(monkeypatch, source, out, "orbax", OSError(errno.EIO, "Input/output error"))
    name = "model-00002-of-00003.safetensors"
    checkpoints.edit_tensors(source, name, lambda tensors: None)
    os.utime(source / name, ns=(1, 1))
    line = refused(capsys, source, out, *options("orbax"), "--resume")
    assert f"source {name}: now" in line


def test_resuming_what_is_whole_or_has_not_begun(source, references, tmp_path, capsys):
    out = tmp_path / "out"
    command = [*arguments(source, out, "orbax"), "--resume"]
    assert main(command) == 0
    assert tree(out) == references["orbax"]
    capsys.readouterr()
    assert main(command) == 0
    assert "is whole already" in capsys.readouterr().out
    line = refused(capsys, source, out, *options("hf-released"), "--resume")
    assert "not empty" in line


@pytest.mark.parametrize("lost", [1, 10, 100])
def test_a_torn_journal(lost, source, references, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(monkeypatch, source, out, "orbax", OSError(errno.EIO, "Input/output error"))
    journal = unfinished(out) / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-lost])
    assert main([*arguments(source, out, "orbax"), "--resume"]) == 0
    assert tree(out) == references["orbax"]


def test_a_file_that_has_gone_since_is_made_again(source, references, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(monkeypatch, source, out, "orbax", OSError(errno.EIO, "Input/output error"))
    names = journaled(unfinished(out))
    (unfinished(out) / names[0]).unlink()
    content = (unfinished(out) / names[1]).read_bytes()
    (unfinished(out) / names[1]).write_bytes(content[:-1])
    assert main([*arguments(source, out, "orbax"), "--resume"]) == 0
    assert tree(out) == references["orbax"]


def test_two_at_once(source, tmp_path, capsys):
    out = tmp_path / "out"
    with Workplace(out, {"of": "another"}, resume=False, overwrite=False):
        for more in ("--resume", "--overwrite"):
            line = refused(capsys, source, out, *options("orbax"), more)
            assert "another process is converting to it" in line


def test_half_a_conversion_is_not_mistaken_for_a_whole_one(source, tmp_path, monkeypatch, capsys):
    import mmx

    for to in TO:
        out = tmp_path / to
        interrupt(monkeypatch, source, out, to, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(ValueError, match="unfinished conversion"):
            mmx.load(unfinished(out))
        assert main(["inspect", str(unfinished(out))]) == 2
        assert "unfinished conversion" in capsys.readouterr().err
        with pytest.raises(integrity.DamagedCheckpoint):
            integrity.verify(unfinished(out))


def test_a_replaced_output_stays_until_the_new_one_is_whole(source, tmp_path, monkeypatch):
    out = convert(source, tmp_path / "out", *options("orbax"))
    before = tree(out)
    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "finish", lambda self: (_ for _ in ()).throw(ValueError("no")))
        assert main([*arguments(source, out, "hf-released"), "--overwrite"]) == 2
    assert tree(out) == before
    assert main([*arguments(source, out, "hf-released"), "--overwrite", "--resume"]) == 0
    assert (out / checkpoints.INDEX).exists()
    assert not list(tmp_path.glob("out.*"))


def test_a_wrong_byte_is_found_before_the_output_has_its_name(
    source, tmp_path, monkeypatch, capsys
):
    from mmx.convert.mapping import Entry

    real = Entry.to_param

    def wrong(self, part, shape=None):
        """Heads in the wrong order, in one matrix of all."""
        made = real(self, part, shape)
        return made[:, ::-1] if self.path.endswith("layer_1/attention/k_proj") else made

    monkeypatch.setattr(Entry, "to_param", wrong)
    line = refused(capsys, source, tmp_path / "out", *options("orbax"), "--verify", "full")
    assert "blocks/layer_1/attention/k_proj" in line
    assert "differs" in line
    assert not (tmp_path / "out").exists()
