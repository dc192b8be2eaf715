"""`mmx convert` as tests run it, and small checkpoints to run it on."""

import hashlib
import warnings

import checkpoints
import numpy as np

import mmx
from mmx import integrity
from mmx.cli import main

GOLDEN = checkpoints.GOLDEN
CASES = [*checkpoints.GOLDEN_NAMES, checkpoints.VISION]
TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


def convert(source, destination, *options, verify="full"):
    """Run the command; it must succeed."""
    assert main(["convert", str(source), str(destination), "--verify", verify, *options]) == 0
    assert not destination.with_name(destination.name + ".converting").exists()
    integrity.verify(destination)
    return destination


def refused(capsys, source, destination, *options):
    """Run the command; it must fail with one line, which is returned."""
    capsys.readouterr()
    assert main(["convert", str(source), str(destination), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("mmx: error: ")
    assert "Traceback" not in err
    return line


def digests(tensors):
    return {
        name: (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in tensors.items()
    }


def without_tables(found):
    return {name: value for name, value in found.items() if not name.endswith(TABLES)}


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mmx.load(folder, **options)


def form_of(name):
    return "hf" if name.startswith("text") else "hf-released"


def small(folder, layout="separate", dtype=np.float32, **changes):
    """A random checkpoint of the released schema, in shards, with a few files to carry."""
    fields = checkpoints.released_fields(**changes)
    tensors = checkpoints.random_tensors(checkpoints.shapes(fields), dtype)
    if layout == "fused":
        tensors = checkpoints.fuse(tensors)
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in range(1, 4)]
    checkpoints.write_folder(folder, fields, tensors, shards)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_minimax_text_01.py").write_text("raise SystemExit")
    return folder
