"""Damage to a checkpoint: every flipped bit, cut, missing or foreign file is found and named."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mmx import cli, integrity
from mmx.integrity import DamagedCheckpoint
from mmx.training import folders
from mmx.training.checkpoint import Checkpoints, restore_params

FLIPS = 1000
CUTS = 200


def make_state():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {str(i): jax.random.normal(key, (24, 24)) for i, key in enumerate(keys)}
    return {"params": params, "moments": jax.tree.map(jnp.square, params), "step": jnp.int32(4)}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make_state(), data={"position": step}, config={"seed": 1})
    return folder


@pytest.fixture
def run(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return tmp_path


@pytest.fixture
def step(run):
    return run / "checkpoints" / "00000020"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_found(step, path, problem=""):
    """Verifying and restoring both name the file, in one line."""
    for read in (integrity.verify, lambda folder: restore(folder.parent)):
        with pytest.raises(DamagedCheckpoint) as caught:
            read(step)
        assert str(caught.value).startswith(f"{path}: {problem}")
        assert "\n" not in str(caught.value)


def restore(folder):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(20, make_state())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# ---------------------------------------------------------------- bits


def test_every_flipped_bit_is_found(step):
    """1,000 flips over all bits of all files, one at a time; a sample through restore as well."""
    draw = random.Random(0)
    files = files_of(step)
    sizes = [path.stat().st_size for path in files]
    before = integrity.verify(step)
    assert before.bytes == sum(sizes) - (step / integrity.MANIFEST).stat().st_size
    hit = set()
    for number in range(FLIPS):
        # Half over the bytes, half over the files, so that small ones have their turn.
        (path,) = draw.choices(files, sizes if number % 2 else None)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(DamagedCheckpoint) as caught:
            integrity.verify(step)
        assert str(caught.value).startswith(f"{path}: "), (path, bit)
        if number % 25 == 0:
            assert_found(step, path)
        flip(path, bit)
        hit.add(path)
    assert hit == set(files)
    assert integrity.verify(step) == before


def test_orbax_alone_would_not_notice(step):
    """The reason for all this: without the digests a flipped bit of an array is restored."""
    import orbax.checkpoint as ocp

    def read():
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            item = ocp.args.StandardRestore({"params": make_state()["params"]})
            return checkpointer.restore(step, args=ocp.args.Composite(params=item))["params"]

    # How Orbax lays arrays out differs from run to run. A flip in its tables, or in what a decoder
    # cannot make sense of, is an error there, of any type; one in the numbers is nothing to it.
    largest = max(files_of(step / "params"), key=lambda path: path.stat().st_size)
    wrong = 0
    for eighth in range(1, 8):
        bit = eighth * largest.stat().st_size + 1
        flip(largest, bit)
        with contextlib.suppress(Exception):
            same = jax.tree.map(jnp.array_equal, read(), {"params": make_state()["params"]})
            wrong += not jax.tree.all(same)
        with pytest.raises(DamagedCheckpoint, match=re.escape(str(largest))):
            restore_params(step.parent, 20, make_state()["params"])
        flip(largest, bit)
    assert wrong


# ---------------------------------------------------------------- cuts and missing files


def test_every_cut_and_every_missing_file_is_found(step):
    draw = random.Random(1)
    files = files_of(step)
    for number in range(CUTS):
        path = files[number % len(files)]
        content = path.read_bytes()
        if number // len(files) % 2:
            path.unlink()
        else:
            path.write_bytes(content[: draw.randrange(len(content))])
        if number < 2 * len(files):
            assert_found(step, path)
        with pytest.raises(DamagedCheckpoint) as caught:
            integrity.verify(step)
        assert str(caught.value).startswith(f"{path}: ")
        # What is cut is not the latest step either; the one before it is.
        whole, faults = folders.complete(step.parent)
        assert whole == [10]
        assert str(path) in faults[20]
        path.write_bytes(content)
    assert folders.complete(step.parent) == ([10, 20], {})


def test_latest_falls_back_with_a_note(step):
    with Checkpoints(step.parent) as checkpoints:
        (step / "data.json").unlink()
        with pytest.warns(UserWarning, match=r"step 20 is not complete.*data.json: missing"):
            assert checkpoints.latest() == 10


# ---------------------------------------------------------------- what does not belong there


def test_foreign_files_and_links(step, tmp_path):
    extra = step / "params" / "d" / "extra"
    extra.write_text("x")
    assert_found(step, extra, "not part of")
    extra.unlink()

    secret = tmp_path / "secret"
    data = step / "data.json"
    data.rename(secret)
    data.symlink_to(secret)
    assert_found(step, data, "a link")
    data.unlink()
    secret.rename(data)

    os.mkfifo(step / "pipe")
    assert_found(step, step / "pipe", "a link or special file")
    (step / "pipe").unlink()

    arrays = step / "params" / "d"
    arrays.rename(tmp_path / "d")
    arrays.symlink_to(tmp_path / "d")
    assert_found(step, arrays, "a link")
    arrays.unlink()
    (tmp_path / "d").rename(arrays)
    assert restore(step.parent).data == {"position": 20}

    step.rename(tmp_path / "elsewhere")
    step.symlink_to(tmp_path / "elsewhere")
    assert_found(step, step / integrity.MANIFEST, "reached by a link")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].__setitem__("../../secret", m["files"]["data.json"]), "missing"),
        (lambda m: m["files"].__setitem__("/etc/passwd", m["files"]["data.json"]), "missing"),
        (lambda m: m.__setitem__("files", []), "not a manifest"),
        (lambda m: m.__setitem__("format", 9), "format 9; this version reads 1"),
        (lambda m: m.__setitem__("step", 10), "of step 10, not of 20"),
    ],
)
def test_a_manifest_that_lies(step, change, message):
    """Even with a digest that fits."""
    import json

    path = step / integrity.MANIFEST
    manifest = json.loads(path.read_bytes())["manifest"]
    change(manifest)
    path.write_bytes(integrity._encode(manifest))
    with pytest.raises(DamagedCheckpoint, match=message):
        integrity.verify(step)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"manifest": 3}'])
def test_a_manifest_that_is_none(step, content):
    (step / integrity.MANIFEST).write_bytes(content)
    assert_found(step, step / integrity.MANIFEST)


# ---------------------------------------------------------------- the command


def test_mmx_verify(run, step, capsys):
    assert cli.main(["verify", str(run)]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"step 10: whole, \d+ files, .*\nstep 20: whole.*\n", said.out)
    assert said.err == ""
    assert cli.main(["verify", str(step)]) == 0
    capsys.readouterr()

    largest = max(files_of(step / "params"), key=lambda path: path.stat().st_size)
    flip(largest, 77)
    assert cli.main(["verify", str(run)]) == 2
    said = capsys.readouterr()
    assert "step 10: whole" in said.out
    assert "step 20: damaged" in said.out
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"mmx: error: {largest}: its SHA-256 is ")

    (step / integrity.MANIFEST).unlink()
    assert cli.main(["verify", str(run)]) == 2
    assert f"{step / integrity.MANIFEST}: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "no such folder"), ("file", "not a folder"), ("empty", "holds no checkpoint")],
)
def test_mmx_verify_of_something_else(tmp_path, capsys, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert cli.main(["verify", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_mmx_verify_needs_no_jax():
    code = "import sys, mmx.cli.verify; print(sorted({'jax', 'orbax', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
