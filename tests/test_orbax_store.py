"""Trees written in pieces: plain Orbax restores them bit by bit, and would write the same bytes."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1

from mmx.convert.chunks import DTYPES
from mmx.convert.orbax_store import ArrayLayout, TreeReader, TreeWriter

SHAPES = {  # name: shape, chunk, dtype
    "embed/embedding": ((64, 48), (16, 48), "bfloat16"),
    "blocks/layer_0/moe/gate_proj": ((2, 4, 24, 32), (1, 1, 24, 32), "bfloat16"),
    "blocks/layer_0/attention/qkv_proj": ((2, 24, 8, 3, 4), (1, 24, 8, 3, 4), "float32"),
    "blocks/layer_0/norm/scale": ((2, 30), (1, 7), "float32"),  # chunks that do not divide
    "final_norm/scale": ((40,), (40,), "float16"),
    "counter": ((), (), "int32"),
}
SPECS = {
    "embed/embedding": [("a", "b"), ("b", None), (("a", "b"), None)],
    "blocks/layer_0/moe/gate_proj": [(None, "a", None, "b"), (None, "a", "b"), ("b", "a")],
    "blocks/layer_0/attention/qkv_proj": [(None, "a", "b"), (None, None, ("a", "b")), ()],
    "blocks/layer_0/norm/scale": [(None, "b"), ("b",), ()],
    "final_norm/scale": [(("a", "b"),), ("a",), ()],
    "counter": [(), (), ()],
}


def items(shape, dtype, seed):
    """Random bits: NaNs, infinities and subnormal numbers among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    raw = rng.integers(0, 256, (*shape, DTYPES[dtype].itemsize), np.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


ARRAYS = {n: items(shape, dtype, i) for i, (n, (shape, _, dtype)) in enumerate(SHAPES.items())}
LAYOUTS = {n: ArrayLayout(shape, dtype, chunk) for n, (shape, chunk, dtype) in SHAPES.items()}


def write(folder, arrays=ARRAYS, layouts=LAYOUTS, *, order=None, threads=1):
    writer = TreeWriter(folder, layouts)
    pieces = [(name, index) for name in arrays for index in writer.chunks(name)]
    if order is not None:
        random.Random(order).shuffle(pieces)

    def one(piece):
        name, index = piece
        return writer.write(name, index, arrays[name][writer.region(name, index)])

    with ThreadPoolExecutor(threads) as pool:
        written = list(pool.map(one, pieces))
    return written + writer.finish()


def nest(leaves):
    tree = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flat(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in found}


def assert_equal(tree, arrays=ARRAYS):
    leaves = flat(tree)
    assert leaves.keys() == arrays.keys()
    for name, leaf in leaves.items():
        assert leaf.dtype == arrays[name].dtype, name
        assert leaf.shape == arrays[name].shape, name
        assert np.asarray(leaf).tobytes() == arrays[name].tobytes(), name


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "params"
    write(folder)
    return folder


# ---------------------------------------------------------------- plain Orbax reads it


def test_every_interface_of_orbax_restores_it_without_a_target(written):
    assert_equal(ocp.StandardCheckpointer().restore(written))
    assert_equal(ocp.PyTreeCheckpointer().restore(written))
    assert_equal(v1.load(written))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("grid", [(4, 2), (2, 4), (8, 1), (1, 1)])
def test_restored_onto_meshes(written, grid, number):
    devices = np.array(jax.devices()[: grid[0] * grid[1]]).reshape(grid)
    mesh = Mesh(devices, ("a", "b"))
    target = {}
    for name, array in ARRAYS.items():
        spec = SPECS[name][number]
        axes = [
            () if axis is None else axis if isinstance(axis, tuple) else (axis,) for axis in spec
        ]
        divides = all(
            size % np.prod([mesh.shape[a] for a in axis], dtype=int) == 0
            for size, axis in zip(array.shape, axes, strict=False)
        )
        spec = PartitionSpec(*spec) if divides else PartitionSpec()
        target[name] = jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=NamedSharding(mesh, spec)
        )
    assert len(devices.ravel()) == grid[0] * grid[1]
    for restore in (ocp.StandardCheckpointer().restore, v1.load):
        restored = restore(written, nest(target))
        assert_equal(restored)
        for name, leaf in flat(restored).items():
            assert leaf.sharding == target[name].sharding


def test_every_dtype(tmp_path):
    arrays = {f"x/{name}": items((5, 6), name, 7) for name in DTYPES}
    layouts = {n: ArrayLayout(a.shape, a.dtype.name, (2, 6)) for n, a in arrays.items()}
    write(tmp_path, arrays, layouts)
    assert_equal(ocp.StandardCheckpointer().restore(tmp_path), arrays)
    reader = TreeReader(tmp_path)
    assert reader.arrays == layouts
    assert_equal(nest({name: reader.read(name) for name in arrays}), arrays)


def test_orbax_writes_the_same_bytes(tmp_path):
    """Where whole arrays are one chunk; a new Orbax that writes another form shows here."""
    whole = {n: ArrayLayout(a.shape, a.dtype.name, a.shape) for n, a in ARRAYS.items()}
    write(tmp_path / "ours", layouts=whole)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "theirs", args=ocp.args.PyTreeSave(nest(ARRAYS)))
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for document in (ours, theirs):  # the only ones with a time or a path in them
        assert document.pop("commit_success.txt").startswith(b"Checkpoint commit was successful")
        fields = json.loads(document["_CHECKPOINT_METADATA"])
        document["_CHECKPOINT_METADATA"] = {
            key: value for key, value in fields.items() if not key.endswith("_timestamp_nsecs")
        }
    assert ours == theirs


# ---------------------------------------------------------------- bytes


def test_bytes_depend_on_the_arrays_alone(tmp_path, written):
    names = list(LAYOUTS)
    for number, threads in enumerate((1, 4)):
        folder = tmp_path / str(number) / "other name"
        mixed = {name: LAYOUTS[name] for name in random.Random(number).sample(names, len(names))}
        write(folder, layouts=mixed, order=number, threads=threads)
        assert files(folder) == files(written)


def test_a_chunk_is_its_items_and_zeros(written):
    name = "blocks/layer_0/norm/scale"
    folder = written / "blocks.layer_0.norm.scale"
    for row, column in np.ndindex(2, 5):
        part = ARRAYS[name][row, column * 7 : column * 7 + 7].tobytes()
        content = (folder / f"{row}.{column}").read_bytes()
        assert content == part.ljust(28, b"\0")
    assert (written / "counter/0").read_bytes() == ARRAYS["counter"].tobytes()


def test_what_was_written_is_told(tmp_path):
    told = write(tmp_path)
    there = files(tmp_path)
    assert {entry.file for entry in told} == there.keys()
    assert len(told) == len(there)
    for entry in told:
        content = there[entry.file]
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_memory_order_of_the_data_does_not_matter(tmp_path):
    array = items((700, 300), "bfloat16", 3)
    for number, data in enumerate((array, np.asfortranarray(array), array[::-1][::-1])):
        writer = TreeWriter(
            tmp_path / str(number), {"x": ArrayLayout(array.shape, "bfloat16", array.shape)}
        )
        writer.write("x", (0, 0), data)
        assert (tmp_path / str(number) / "x/0.0").read_bytes() == array.tobytes()


# ---------------------------------------------------------------- interruptions


KILLED = """
import os, pathlib, sys
import numpy as np
from mmx.convert.orbax_store import ArrayLayout, TreeWriter
folder, moment = sys.argv[1:]
layout = ArrayLayout((64, 48), "bfloat16", (16, 48))
writer = TreeWriter(pathlib.Path(folder), {"embed/embedding": layout})
data = np.zeros((16, 48), layout.numpy_dtype)
writer.write("embed/embedding", (0, 0), data)
setattr(os if moment == "fsync" else pathlib.Path, moment, lambda *_: os.kill(os.getpid(), 9))
writer.write("embed/embedding", (1, 0), data)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_no_chunk_under_its_name(tmp_path, written, moment):
    folder = tmp_path / "params"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], check=False)
    assert done.returncode == -9
    left = files(folder)
    assert set(left) == {"embed.embedding/0.0", "embed.embedding/1.0.tmp"}
    with pytest.raises(ValueError, match=r"1\.0: is missing; 1536 were to be written"):
        TreeWriter(folder, {"embed/embedding": LAYOUTS["embed/embedding"]}).finish()
    assert files(folder) == left
    write(folder)
    assert files(folder) == files(written)


def test_disk_full_leaves_nothing(tmp_path, monkeypatch):
    writer = TreeWriter(tmp_path, LAYOUTS)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write("counter", (), ARRAYS["counter"])
    monkeypatch.undo()
    assert files(tmp_path) == {}


def test_finish_wants_every_chunk_whole(tmp_path):
    write(tmp_path)
    (tmp_path / "embed.embedding/2.0").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"embed.embedding/2\.0: has 5 bytes; 1536 were"):
        TreeWriter(tmp_path, LAYOUTS).finish()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("x", ((0, 3), (1, 3), "float32"), "Orbax stores no empty arrays"),
        ("x", ((2, 3), (0, 3), "float32"), "has no chunk"),
        ("x", ((2, 3), (2, 4), "float32"), "has no chunk"),
        ("x", ((2, 3), (2,), "float32"), "has no chunk"),
        ("x", ((2, 3), (2, 3), "complex64"), "dtype 'complex64'; supported are bool"),
        ("", ((2,), (2,), "float32"), "cannot be the name"),
        ("a//b", ((2,), (2,), "float32"), "cannot be the name"),
        ("../b", ((2,), (2,), "float32"), "cannot be the name"),
        ("a.b", ((2,), (2,), "float32"), "cannot be the name"),
        ("a\n", ((2,), (2,), "float32"), "cannot be the name"),
        ("a" * 241, ((2,), (2,), "float32"), "cannot be the name"),
        ("_METADATA", ((2,), (2,), "float32"), "a file of Orbax"),
        ("embed", ((2,), (2,), "float32"), "is an array and a folder"),
        ("counter/x", ((2,), (2,), "float32"), "counter is an array and a folder"),
    ],
)
def test_arrays_that_cannot_be(tmp_path, name, layout, message):
    shape, chunk, dtype = layout
    with pytest.raises(ValueError, match=message) as error:
        TreeWriter(tmp_path / "params", {**LAYOUTS, name: ArrayLayout(shape, dtype, chunk)})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "params").exists()


def test_data_that_does_not_fit(tmp_path):
    writer = TreeWriter(tmp_path, LAYOUTS)
    part = ARRAYS["embed/embedding"][:16]
    for wrong in (part[:15], part.astype(np.float32), part.view(np.uint16), part.T):
        with pytest.raises(ValueError, match=r"it must be bfloat16 \(16, 48\)"):
            writer.write("embed/embedding", (0, 0), wrong)
    with pytest.raises(ValueError, match="there is no chunk"):
        writer.write("embed/embedding", (4, 0), part)
    assert part.dtype == ml_dtypes.bfloat16
    assert files(tmp_path) == {}


@pytest.mark.parametrize("key", ["../secret", "a/../../secret", "/secret", "./params/x"])
def test_tensorstore_reads_no_key_outside_its_folder(tmp_path, key):
    """An OCDBT manifest names files itself; that they lie in the folder is tensorstore's check."""
    (tmp_path / "secret").write_text("secret")
    spec = {"driver": "file", "path": f"{tmp_path}/params/"}
    with pytest.raises(ValueError, match="Invalid key"):
        ts.KvStore.open(spec).result().read(key).result()
