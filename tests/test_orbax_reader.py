"""Trees that Orbax wrote are read bit by bit; hostile ones are refused in one line."""

import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cpu_clock import cpu_seconds
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx.convert.orbax_reader import Limits
from mmx.convert.orbax_store import ArrayLayout, TreeReader, TreeWriter

FORMATS = [
    dict(use_ocdbt=ocdbt, use_zarr3=zarr3, **more)
    for ocdbt in (True, False)
    for zarr3 in (False, True)
    for more in ({}, dict(use_compression=False))
]


def tree_of_jax(sharded=True):
    rng = np.random.default_rng(0)
    raw = {
        "a": {"w": rng.integers(0, 1 << 16, (32, 48), np.uint16).view(jnp.bfloat16)},
        "b": {"layer_0": {"g": rng.random((16, 3, 8), np.float32)}},
        "n": np.array(7, np.int32),
        "z": np.zeros((64,), np.float32),  # Orbax may leave such out
    }
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    specs = {"w": ("x", "y"), "g": ("y",), "n": (), "z": ("x",)}

    def place(path, leaf):
        if not sharded:
            return leaf
        spec = PartitionSpec(*specs[path[-1].key])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return raw, jax.tree_util.tree_map_with_path(place, raw)


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in found}


@pytest.mark.parametrize("sharded", [True, False], ids=["jax", "numpy"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(f"{v}" for v in form.values()))
def test_trees_that_orbax_wrote(tmp_path, form, sharded):
    raw, tree = tree_of_jax(sharded)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**form)) as checkpointer:
        checkpointer.save(tmp_path / "tree", args=ocp.args.PyTreeSave(tree))
    reader = TreeReader(tmp_path / "tree")
    wanted = leaves(raw)
    assert list(reader.arrays) == sorted(wanted)
    if sharded:
        assert reader.arrays["a/w"].chunk == (8, 24)  # several chunks
    for name, array in wanted.items():
        layout = reader.arrays[name]
        assert (layout.shape, layout.dtype) == (array.shape, array.dtype.name)
        assert reader.read(name).tobytes() == array.tobytes()
    for region in ((3,), (slice(5, 29),), (slice(7, 9), slice(23, 25)), (31, 47), (slice(4, 4),)):
        part = reader.read("a/w", region)
        assert part.shape == raw["a"]["w"][region].shape
        assert part.tobytes() == raw["a"]["w"][region].tobytes()


def test_regions_of_our_own_trees(tmp_path):
    """Every kind of region, with chunks small and large, whole and cut off."""
    rng = np.random.default_rng(0)
    shape = (6, 50, 70)
    array = rng.integers(0, 1 << 16, shape, np.uint16).view(jnp.bfloat16)
    for chunk in (shape, (1, 50, 70), (1, 20, 70), (2, 50, 32), (4, 7, 9)):
        folder = tmp_path / "x".join(map(str, chunk))
        writer = TreeWriter(folder, {"x": ArrayLayout(shape, "bfloat16", chunk)})
        for index in writer.chunks("x"):
            writer.write("x", index, array[writer.region("x", index)])
        writer.finish()
        reader = TreeReader(folder)
        for _ in range(60):
            region = []
            for size in shape[: rng.integers(0, 4)]:
                start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
                whole = rng.random() < 0.3
                one = rng.random() < 0.3
                region.append(
                    slice(None) if whole else min(start, size - 1) if one else slice(start, stop)
                )
            part = reader.read("x", tuple(region))
            assert part.flags.c_contiguous
            assert part.tobytes() == array[tuple(region)].tobytes()
            assert part.shape == array[tuple(region)].shape


@pytest.mark.parametrize(
    "region", [(6,), (-1,), (slice(0, 7),), (slice(3, 2),), (slice(0, 4, 2),), (0, 0, 0)]
)
def test_regions_that_are_not_there(ours, region):
    with pytest.raises(ValueError, match=r"x has shape \(6, 4\); the region"):
        TreeReader(ours).read("x", region)


MEMORY = """
import pathlib, sys
from mmx.convert.orbax_store import TreeReader
def status(key):
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key)) >> 10
reader = TreeReader(pathlib.Path(sys.argv[1]))
for region in ((slice(0, 1),), (slice(None), slice(5, 9)), (5,), (slice(None), slice(9, 1 << 20))):
    reader.read('x', (0, slice(0, 9)))
    before = status('VmRSS')
    open('/proc/self/clear_refs', 'w').write('5')  # begin the high-water mark anew
    part = reader.read('x', region)
    print(part.nbytes >> 20, status('VmHWM') - before)
    del part
"""


@pytest.mark.parametrize("writer", ["ours", "orbax"])
def test_memory_is_the_region_and_few_chunks(tmp_path, writer, monkeypatch):
    """A few numbers out of each of 16 chunks of 16 MiB do not bring all of them into memory."""
    folder, chunk = tmp_path / "tree", (1, 4 << 20)
    many = np.random.default_rng(0).random((16, 4 << 20), np.float32)  # 256 MiB
    if writer == "ours":
        tree = TreeWriter(folder, {"x": ArrayLayout(many.shape, "float32", chunk)})
        for index in tree.chunks("x"):
            tree.write("x", index, many[tree.region("x", index)])
        tree.finish()
    else:
        rows = ocp.SaveArgs(chunk_byte_size=16 << 20, shard_axes=(0,))
        save = ocp.args.PyTreeSave({"x": many}, {"x": rows})
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=save)
    assert TreeReader(folder).arrays["x"].chunk == chunk
    # What is freed goes back to the system at once: what the allocator keeps of the boxes before
    # differs from run to run by 80 MiB.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Our chunks are read in place; of others, 64 MiB are held at once, and as they were stored.
    extra = 8 if writer == "ours" else 128
    for line in done.stdout.splitlines():
        part, grown = map(int, line.split())
        assert grown <= part + extra, done.stdout


# ---------------------------------------------------------------- hostile trees


@pytest.fixture
def ours(tmp_path):
    folder = tmp_path / "ours"
    layouts = {
        "x": ArrayLayout((6, 4), "float32", (2, 4)),
        "a/y": ArrayLayout((5,), "bfloat16", (5,)),
    }
    writer = TreeWriter(folder, layouts)
    for name, layout in layouts.items():
        for index in writer.chunks(name):
            part = [s.stop - s.start for s in writer.region(name, index)]
            writer.write(name, index, np.ones(part, layout.numpy_dtype))
    writer.finish()
    return folder


def edited(folder, file, change):
    path = folder / file
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(change(fields) or fields))


def entry(fields, key="('x',)"):
    return fields["tree_metadata"][key]


def array(**change):
    return "x/.zarray", lambda fields: fields.update(change)


def tree(change):
    return "_METADATA", change


def key(name, kind=2):
    return tree(lambda f: entry(f)["key_metadata"].__setitem__(0, {"key": name, "key_type": kind}))


EDITS = {
    "negative shape": array(shape=[-6, 4]),
    "zero shape": array(shape=[0, 4]),
    "huge shape": array(shape=[1 << 62, 4]),
    "overflowing shape": array(shape=[1 << 59, 1 << 59]),
    "fraction": array(shape=[6.0, 4]),
    "true": array(shape=[True, 4]),
    "NaN": array(shape=[float("nan"), 4]),
    "text": array(shape="64"),
    "no shape": array(shape=None),
    "33 dimensions": array(shape=[1] * 33, chunks=[1] * 33),
    "huge chunk": array(chunks=[1 << 60, 4]),
    "5 GiB chunk": array(chunks=[1 << 20, 1280]),
    "zero chunk": array(chunks=[0, 4]),
    "negative chunk": array(chunks=[2, -4]),
    "chunk of 1 dimension": array(chunks=[2]),
    "no chunks": array(chunks=None),
    "unknown dtype": array(dtype="<f3"),
    "structure": array(dtype=[["a", "<f4"]]),
    "big endian": array(dtype=">f4"),
    "object": array(dtype="|O"),
    "complex": array(dtype="<c8"),
    "blosc": array(compressor={"id": "blosc"}),
    "compressor of text": array(compressor="zstd"),
    "filters": array(filters=[{"id": "delta"}]),
    "Fortran": array(order="F"),
    "zarr 4": array(zarr_format=4),
    "zarr 2.0": array(zarr_format=2.0),
    "separator": array(dimension_separator="/../"),
    "array is a list": ("x/.zarray", lambda fields: [fields]),
    "up": key(".."),
    "slash": key("/etc/passwd"),
    "slash inside": key("a/y"),
    "NUL": key("x\0"),
    "line feed": key("x\n"),
    "dot": key("x.y"),
    "backslash": key("..\\x"),
    "empty": key(""),
    "number": key(5),
    "kind": key("x", 3),
    "long": key("x" * 2000),
    "longer than files can be called": key("x" * 300),
    "not there": key("nowhere"),
    "another array's": tree(lambda f: f["tree_metadata"].__setitem__("('z',)", entry(f))),
    "array in an array": tree(
        lambda f: f["tree_metadata"].__setitem__(
            "z", {**entry(f), "key_metadata": [{"key": k, "key_type": 2} for k in ("x", "z")]}
        )
    ),
    "no keys": tree(lambda f: entry(f).__setitem__("key_metadata", [])),
    "keys of text": tree(lambda f: entry(f).__setitem__("key_metadata", "x")),
    "no value": tree(lambda f: entry(f).pop("value_metadata") and None),
    "a string's value": tree(lambda f: entry(f)["value_metadata"].update(value_type="string")),
    "entry of text": tree(lambda f: f["tree_metadata"].update(x="y")),
    "tree of a list": tree(lambda f: f.update(tree_metadata=[1])),
    "no arrays": tree(lambda f: f.update(tree_metadata={})),
    "no tree": tree(lambda f: f.pop("tree_metadata") and None),
    "long entry": tree(lambda f: entry(f)["value_metadata"].update(write_shape=[1] * 99999)),
    "flag of text": tree(lambda f: f.update(use_zarr3="no")),
    "flag of a number": tree(lambda f: f.update(use_ocdbt=1)),
    "said to be zarr 3": tree(lambda f: f.update(use_zarr3=True)),
    "said to be OCDBT": tree(lambda f: f.update(use_ocdbt=True)),
}


def fault(folder, read=True, limits=None):
    """The message, one line that names a file, with which a tree is refused; None if it is not."""
    try:
        reader = TreeReader(folder, limits)
        for name in reader.arrays if read else ():
            reader.read(name)
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert message.isprintable()
    assert len(message) < 1200
    assert str(folder) in message
    return message


def refused(folder, read=True, limits=None):
    """The message of the refusal, which took little time and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = cpu_seconds()
    message = fault(folder, read, limits)
    assert message is not None
    assert cpu_seconds() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
    return message


# Where the fault is noticed in another file than the one that was edited.
NOTICED = {
    "longer than files can be called": ".zarray",
    "not there": "nowhere/.zarray",
    "said to be zarr 3": "a.y/zarr.json",
    "said to be OCDBT": "manifest.ocdbt",
}


@pytest.mark.parametrize("case", EDITS)
def test_descriptions_that_lie(ours, case):
    file, change = EDITS[case]
    edited(ours, file, change)
    assert NOTICED.get(case, file) in refused(ours)


@pytest.mark.parametrize("file", ["_METADATA", "x/.zarray"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"{}{}", b'{"a":1,"a":2}', b"[" * 100_000,
     b'{"tree_metadata":' + b"[" * 100_000, b'{"shape":' + b"9" * 10_000 + b"}",
     b'{"tree_metadata":{"x":{},"x":{}}}', b"{" + b" " * (2 << 20) + b"}"],
)  # fmt: skip
def test_garbage(ours, file, content):
    (ours / file).write_bytes(content)
    assert file in refused(ours)


@pytest.mark.parametrize("file", ["_METADATA", "x/.zarray", "x/1.0", "a.y/0"])
@pytest.mark.parametrize(
    "kind", ["gone", "folder", "pipe", "link", "link out", "short", "long", "sparse"]
)
def test_files_that_are_not_what_they_should_be(ours, tmp_path, file, kind):
    path = ours / file
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (ours / "elsewhere").write_bytes(content)
        path.symlink_to(ours / "elsewhere")
    elif kind == "link out":
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    elif kind != "gone":
        path.write_bytes(content[:-1] if kind == "short" else content + b"x")
        if kind == "sparse":
            os.truncate(path, 1 << 40)
    refused(ours)


@pytest.mark.parametrize("loop", ["x/self", "self"])
def test_links_between_folders(ours, loop):
    (ours / loop).symlink_to(ours)
    assert "link" in refused(ours, read=False)


def test_limits(ours):
    for limits, message in (
        (Limits(metadata_bytes=10), "at most 10 are read"),
        (Limits(description_bytes=10), "at most 10 are read"),
        (Limits(arrays=1), "more than 1 arrays"),
        (Limits(array_bytes=95), "the array has 96 bytes, more than 95"),
        (Limits(chunk_bytes=31), "a chunk has 32 bytes, more than 31"),
        (Limits(files=5), "more than 5 files"),
    ):
        assert message in refused(ours, read=False, limits=limits)
    exact = Limits(arrays=2, array_bytes=96, chunk_bytes=32)
    assert len(TreeReader(ours, exact).arrays) == 2


def test_a_chunk_that_is_missing_is_not_zeros(ours):
    (ours / "x/1.0").unlink()
    reader = TreeReader(ours)
    assert (reader.read("x", (slice(0, 2),)) == 1).all()
    assert "1.0" in refused(ours)
    # Where Orbax says that it left out zeros, they are zeros.
    edited(ours, "_METADATA", lambda f: f.update(store_array_data_equal_to_fill_value=False))
    assert TreeReader(ours).read("x").sum() == 16


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_damaged_trees_of_orbax(tmp_path, ocdbt, zarr3):
    """Any file cut, emptied or filled with noise: refused in one line, or read as before."""
    raw, tree = tree_of_jax()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "good", args=ocp.args.PyTreeSave(tree))
    files = [
        p.relative_to(tmp_path / "good") for p in (tmp_path / "good").rglob("*") if p.is_file()
    ]
    rng = np.random.default_rng(0)
    refusals = 0
    for file in sorted(files)[:: max(1, len(files) // 12)]:
        for kind in range(3):
            folder = tmp_path / "bad"
            shutil.copytree(tmp_path / "good", folder)
            content = (folder / file).read_bytes()
            bad = (content[: len(content) // 2], b"", rng.bytes(len(content)))[kind]
            (folder / file).write_bytes(bad)
            if fault(folder) is not None:
                refusals += 1
            else:
                reader = TreeReader(folder)
                for name, array in leaves(raw).items():
                    assert reader.read(name).tobytes() == array.tobytes(), file
            shutil.rmtree(folder)
    assert refusals >= 6
