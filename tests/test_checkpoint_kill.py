"""Killed at any moment, or on a full disk: what was complete stays, what is half is no step."""

import errno
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import integrity
from mmx.training import folders
from mmx.training.checkpoint import Checkpoints, SaveFailed, restore_params

SIZE = 1 << 18
KEEP = 2


def make_state(value):
    """A state that says which save it is of, everywhere."""
    params = {"w": jnp.full((SIZE,), value, jnp.float32)}
    return {"params": params, "moment": jnp.full((SIZE // 4,), value, jnp.int32)}


def value_of(restored):
    """Which save a state is of; it must be of one alone."""
    values = {int(v) for leaf in jax.tree.leaves(restored.state) for v in np.unique(leaf)}
    values.add(restored.data["value"])
    assert len(values) == 1
    return values.pop()


def save(checkpoints, step, value, **options):
    checkpoints.save(step, make_state(value), data={"value": value}, config={}, **options)


def the_only_value(folder):
    """Restore the latest step here; every complete step must verify."""
    with Checkpoints(folder) as checkpoints:
        for step, found in folders.step_folders(folder).items():
            integrity.verify(found)
            assert step in checkpoints.steps()
        latest = checkpoints.latest()
        assert latest is not None
        return latest, value_of(checkpoints.restore(latest, make_state(0)))


# ---------------------------------------------------------------- kill -9 at random


def _train(folder, pipe):
    """Go on from the last step and save each, telling what is complete."""
    with Checkpoints(folder, keep=KEEP) as checkpoints:
        step = checkpoints.latest() or 0
        if step:
            assert value_of(checkpoints.restore(step, make_state(0))) == step
        pipe.send(("resumed", step))
        while True:
            step += 1
            pipe.send(("saving", step))
            save(checkpoints, step, step)
            checkpoints.wait()
            pipe.send(("saved", step))


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_inside_a_save(processes, tmp_path, kills):
    draw = random.Random(0)
    saved, inside, took = 0, 0, 0.2
    for _ in range(kills):
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=_train, args=(tmp_path, theirs))
        child.start()
        theirs.close()
        assert ours.poll(60)
        assert ours.recv() in (("resumed", saved), ("resumed", saved + 1))
        for _ in range(draw.randrange(1, 4)):  # saves to see before the kill
            begun = time.monotonic()
            assert ours.recv()[0] == "saving"
            kind, saved = ours.recv()
            assert kind == "saved"
            took = time.monotonic() - begun
        assert ours.recv() == ("saving", saved + 1)
        time.sleep(draw.uniform(0, took))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        messages = []
        while ours.poll():
            try:
                messages.append(ours.recv())
            except EOFError:
                break
        inside += not messages
        saved = max([saved, *(step for kind, step in messages if kind == "saved")])
        latest, value = the_only_value(tmp_path)
        # A save that was complete before it could say so counts as well.
        assert latest in (saved, saved + 1)
        assert value == latest
        saved = latest
    assert inside >= kills // 5  # else the kills were not where they should be


# ---------------------------------------------------------------- kill -9 at every point


def _save_and_die(folder, step, value, keep, point):
    """Save, and be killed just before the change of the folder that has this number."""
    left = point

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return wrapped

    for module, name in [
        (os, "rmdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "write_bytes"),
    ]:
        setattr(module, name, dying(getattr(module, name)))
    with Checkpoints(folder, keep=keep) as checkpoints:
        save(checkpoints, step, value)


@pytest.mark.parametrize(
    ("before", "step", "keep"),
    [
        # The only step is removed once the next is complete; or it is replaced.
        pytest.param([(1, 100)], 2, 1, marks=pytest.mark.slow),
        ([(1, 100)], 1, 1),
    ],
)
def test_killed_at_every_change_of_the_folder(processes, tmp_path, before, step, keep):
    source = tmp_path / "source"
    with Checkpoints(source) as checkpoints:
        for at, value in before:
            save(checkpoints, at, value)
    (old_step, old_value) = before[-1]
    seen = []
    for point in range(100):
        folder = tmp_path / str(point)
        shutil.copytree(source, folder)
        arguments = (folder, step, 200, keep, point)
        child = processes.Process(target=_save_and_die, args=arguments)
        child.start()
        child.join(60)
        seen.append(the_only_value(folder))
        assert seen[-1] in ((old_step, old_value), (step, 200))
        with Checkpoints(folder, keep=keep) as checkpoints:  # what was left is no obstacle
            save(checkpoints, 3, 300, wait=True)
        assert the_only_value(folder) == (3, 300)
        assert len(list(folder.iterdir())) == keep
        shutil.rmtree(folder)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert seen[0] == (old_step, old_value)
    assert seen[-1] == (step, 200)
    assert len(seen) > 8


# ---------------------------------------------------------------- a full disk


def _run_out_of_room(folder, limit, pipe):
    """Save under a limit of the size of files, which fails as a full disk does."""
    with Checkpoints(folder, keep=5) as checkpoints:
        save(checkpoints, 1, 1)
        save(checkpoints, 2, 2, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        # Values that do not compress, so that the array exceeds the limit on disk too; and many,
        # of which each fails for itself.
        more = {f"b{i}": jax.random.normal(jax.random.key(i), (5000,)) for i in range(60)}
        big = {"params": {"w": jax.random.normal(jax.random.key(0), (SIZE,)), **more}}
        checkpoints.save(3, big, data={"value": 3}, config={})
        try:
            checkpoints.wait()
        except SaveFailed as error:
            pipe.send(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        pipe.send(sorted(path.name for path in folder.iterdir()))
        save(checkpoints, 4, 4)  # and it goes on


@pytest.mark.parametrize("limit", [0, 100_000])
def test_no_room_for_the_arrays(processes, tmp_path, limit, capfd):
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_run_out_of_room, args=(tmp_path, limit, theirs))
    child.start()
    theirs.close()
    message, names = ours.recv(), ours.recv()
    child.join(60)
    assert child.exitcode == 0
    assert "step 3 could not be saved; steps 1, 2 are intact; make room" in message
    assert message.endswith("(File too large)")  # as the system says it
    assert "\n" not in message
    assert names == ["00000001", "00000002"]
    assert folders.complete(tmp_path) == ([1, 2, 4], {})
    assert the_only_value(tmp_path) == (4, 4)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "never retrieved" not in said


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_no_room_for_the_manifest(tmp_path, monkeypatch, call):
    """The failure comes out of whatever is called next; the run may go on."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 1, wait=True)
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    save(checkpoints, 2, 2)
    assert checkpoints._thread is not None
    checkpoints._thread.join()
    monkeypatch.setattr(os, "fsync", real)
    following = partial(save, checkpoints, 3, 3) if call == "save" else getattr(checkpoints, call)
    with pytest.raises(SaveFailed, match=r"step 2 .*steps 1 are intact.*No space left on device"):
        following()
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    save(checkpoints, 4, 4)
    checkpoints.close()
    assert folders.complete(tmp_path) == ([1, 4], {})
    here = {"w": jax.ShapeDtypeStruct((SIZE,), jnp.float32)}
    assert float(restore_params(tmp_path, 4, here)["w"].max()) == 4


def test_a_replacement_that_cannot_get_its_name(tmp_path, monkeypatch):
    """The old step is gone by then, so the new one, complete but for its name, must stay."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 100, wait=True)
    real = Path.rename

    def refusing(path, target):
        if path.name.endswith(folders.SAVING):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(SaveFailed, match="Input/output error"):
        save(checkpoints, 1, 200, wait=True)
    monkeypatch.setattr(Path, "rename", real)
    assert the_only_value(tmp_path) == (1, 200)
    save(checkpoints, 2, 300)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]
