"""Our reader and writer of safetensors files against the safetensors library, numpy and hashlib."""

import errno
import hashlib
import itertools
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from checkpoints import shard_digest
from malformed import file_of
from safetensors.numpy import load_file, save, save_file

from mmx.convert import bounded, safetensors_writer
from mmx.convert.safetensors_file import DTYPE_BITS, DTYPES, Limits, read_header, read_part
from mmx.convert.safetensors_writer import ShardWriter, aligned_order

BF16 = np.dtype(ml_dtypes.bfloat16)
NAMES = {np.dtype(kind): name for name, kind in {
    "BOOL": bool, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "BF16": BF16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16,
    "F32": np.float32, "F64": np.float64, "C64": np.complex64,
}.items()}  # fmt: skip


def some_tensors():
    """Every dtype that the library writes from numpy, a scalar, empty ones, and odd sizes."""
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (), (0,), (4, 0, 2), (7,), (2, 3, 5), (1,), (1, 1, 9)]
    tensors = {}
    for i, (dtype, shape) in enumerate(itertools.product(NAMES, shapes)):
        raw = rng.integers(0, 2 if dtype.kind == "b" else 256, (*shape, dtype.itemsize), np.uint8)
        name = f'model.{i}.π"\\' if i % 3 else f"model.{i}.weight"
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def described(tensors):
    return {name: (NAMES[array.dtype], array.shape) for name, array in tensors.items()}


def write(path, tensors, **options):
    with ShardWriter(path, described(tensors), **options) as writer:
        for array in tensors.values():
            writer.write(array)
        return writer.close()


def same_bits(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


# ---------------------------------------------------------------- writing


def test_the_library_reads_what_we_write(tmp_path):
    tensors = {name: some_tensors()[name] for name in aligned_order(described(some_tensors()))}
    file = tmp_path / "it.safetensors"
    write(file, tensors, metadata={"format": "pt", "ü": "\n"})
    read = load_file(file)
    assert set(read) == set(tensors)
    for name, array in tensors.items():
        same_bits(read[name], array)
    with safetensors.safe_open(file, "numpy") as handle:
        assert handle.metadata() == {"format": "pt", "ü": "\n"}
        kinds = {name: handle.get_slice(name).get_dtype() for name in tensors}
    assert kinds == {name: NAMES[array.dtype] for name, array in tensors.items()}


def test_in_its_order_the_file_is_the_librarys_to_the_byte(tmp_path):
    tensors = some_tensors()
    want = save(tensors, {"format": "pt"})
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(want)
    order = list(read_header(theirs)[0])
    assert order != list(tensors)
    write(tmp_path / "ours.safetensors", {name: tensors[name] for name in order})
    assert (tmp_path / "ours.safetensors").read_bytes() == want


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_a_file_without_tensors(tmp_path, metadata):
    write(tmp_path / "it", {}, metadata=metadata)
    assert (tmp_path / "it").read_bytes() == save({}, metadata or None)
    assert read_header(tmp_path / "it") == ({}, metadata)


@pytest.mark.parametrize("threads_from", [1, 1 << 20])
def test_pieces_of_any_size_give_the_same_file_and_digests(tmp_path, monkeypatch, threads_from):
    monkeypatch.setattr(safetensors_writer, "_IN_THREADS", threads_from)
    tensors = {name: some_tensors()[name] for name in aligned_order(described(some_tensors()))}
    write(tmp_path / "whole", tensors)
    content = (tmp_path / "whole").read_bytes()
    data = np.frombuffer(b"".join(a.tobytes() for a in tensors.values()), np.uint8)
    rng = np.random.default_rng(1)
    for trial in range(20):
        cuts = sorted(rng.integers(0, len(data), 3 * trial).tolist())
        with ShardWriter(tmp_path / "it", described(tensors)) as writer:
            for begin, end in itertools.pairwise([0, *cuts, len(data)]):
                piece = data[begin:end].copy()
                writer.write(piece)
                piece[:] = 255  # the buffer is ours again
            done = writer.close()
        assert (tmp_path / "it").read_bytes() == content
        assert done.size == len(content)
        assert done.sha256 == shard_digest(content, done.tensors)
        wanted = {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in tensors.items()}
        assert done.tensors == wanted


def test_large_pieces_and_views_that_are_not_contiguous(tmp_path):
    rng = np.random.default_rng(2)
    array = rng.integers(0, 1 << 16, (1500, 1000), np.uint16).view(BF16)
    tensors = {"a": array.T, "b": array[::2], "c": array}
    file = tmp_path / "it"
    with ShardWriter(file, described(tensors)) as writer:
        writer.write(tensors["a"][:100])
        writer.write(tensors["a"][100:])
        for name in ("b", "c"):
            writer.write(tensors[name])
        done = writer.close()
    assert done.sha256 == shard_digest(file.read_bytes(), done.tensors)
    header, _ = read_header(file)
    for name, want in tensors.items():
        same_bits(read_part(header[name]), np.ascontiguousarray(want))
        assert done.tensors[name] == hashlib.sha256(np.ascontiguousarray(want)).hexdigest()


def test_an_older_file_is_overwritten_and_a_link_is_not_followed(tmp_path, monkeypatch):
    file = tmp_path / "it"
    file.write_bytes(bytes(10_000))
    forced = []
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append(os.fstat(handle).st_size))
    assert [write(file, {"a": np.ones(3, np.float32)}).size] == forced
    same_bits(load_file(file)["a"], np.ones(3, np.float32))
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="symbolic links"):
        ShardWriter(tmp_path / "link", {})


def test_a_file_is_whole_only_with_all_bytes(tmp_path):
    spec = {"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "empty": ("F32", (0,))}
    with ShardWriter(tmp_path / "it", spec) as writer:
        writer.write(np.zeros(6, np.float32))
        writer.write(np.zeros(3, BF16))
        with pytest.raises(ValueError, match=r"it: 2 bytes are missing, from b on"):
            writer.close()
        with pytest.raises(ValueError, match="is closed"):
            writer.write(np.zeros(1, BF16))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_header(tmp_path / "it")
    writer = ShardWriter(tmp_path / "it", spec)
    with writer, pytest.raises(ValueError, match=r"it: 2 bytes more than its tensors have"):
        writer.write(np.zeros(34, np.uint8))


@pytest.mark.parametrize("dtype", ["float16", "int16", "float32", ">f4", "int8", "float64"])
def test_values_of_another_dtype_are_refused(tmp_path, dtype):
    """Also those of equal size, or of other byte order: what counts is what a reader would see."""
    want = BF16 if dtype != ">f4" else np.dtype("<f4")
    writer = ShardWriter(tmp_path / "it", {"a": (NAMES[want], (8,))})
    with writer, pytest.raises(ValueError, match=rf"it: a is {want}, and .* was given; cast it"):
        writer.write(np.zeros(8, dtype))


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "said"),
    [
        ("a", "F4", (8,), "a has dtype F4; use one of BOOL"),
        ("a", "float32", (8,), "a has dtype float32"),
        ("a\n", "F32", (8,), r"'a\\n'"),
        ("", "F32", (8,), "cannot hold a tensor"),
        ("x" * 2000, "F32", (8,), "cannot hold a tensor xxx"),
        ("__metadata__", "F32", (8,), "cannot hold a tensor __metadata__"),
        ("a", "F32", (-1,), r"a of shape \(-1,\)"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, name, dtype, shape, said):
    with pytest.raises(ValueError, match=said) as caught:
        ShardWriter(tmp_path / "it", {name: (dtype, shape)})
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_header_beyond_the_readers_limit_is_not_written(tmp_path):
    many = {f"{i:06}": ("F32", (0,)) for i in range(100_001)}
    with pytest.raises(ValueError, match="for 100,001 tensors is more than is read"):
        ShardWriter(tmp_path / "it", many)
    long = {f"{i:0900}": ("F32", (0,)) for i in range(9_000)}
    with pytest.raises(ValueError, match="for 9,000 tensors is more than is read"):
        ShardWriter(tmp_path / "it", long)
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_is_aligned_or_refused(tmp_path):
    spec = {"a": ("BF16", (3,)), "b": ("F32", (1,)), "c": ("U8", (1,)), "d": ("BF16", (2,))}
    with pytest.raises(ValueError, match="b would not be aligned"):
        ShardWriter(tmp_path / "it", spec)
    order = aligned_order(spec)
    assert order == ["b", "a", "d", "c"]
    with ShardWriter(tmp_path / "it", {name: spec[name] for name in order}) as writer:
        writer.write(np.zeros(15, np.uint8))
        writer.close()
    for info in read_header(tmp_path / "it")[0].values():
        assert info.begin % DTYPES[info.dtype].itemsize == 0


def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space") as caught:
        ShardWriter(Path("/dev/full"), {"a": ("F32", (8,))})
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_in_the_middle(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path / "it", {"a": ("U8", (4 << 20,))})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with writer, pytest.raises(OSError, match="No space"):
        writer.write(np.zeros(2 << 20, np.uint8))


# ---------------------------------------------------------------- reading


def test_we_read_what_the_library_writes(tmp_path):
    tensors = some_tensors()
    file = tmp_path / "it.safetensors"
    save_file(tensors, file, {"format": "np", "é": "x"})
    header, metadata = read_header(file)
    assert metadata == {"format": "np", "é": "x"}
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == described(tensors)
    content = file.read_bytes()
    for name, info in header.items():
        assert content[info.begin : info.end] == tensors[name].tobytes()
        assert info.nbytes == tensors[name].nbytes
        assert info.file == file
        same_bits(read_part(info), tensors[name])
    begins = [info.begin for info in header.values()]
    assert begins == sorted(begins)


def test_all_dtypes_of_the_format_are_known(tmp_path):
    """By their sizes; the library's own message lists them."""
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(file_of('{"a":{"dtype":"?","shape":[],"data_offsets":[0,0]}}'))
    listed = str(caught.value).split("expected one of")[1].split("at line")[0]
    assert {name.strip(" `") for name in listed.split(",")} == set(DTYPE_BITS)
    for dtype, bits in DTYPE_BITS.items():
        content = file_of(
            f'{{"a":{{"dtype":"{dtype}","shape":[2,4],"data_offsets":[0,{bits}]}}}}', bytes(bits)
        )
        assert safetensors.deserialize(content)[0][1]["shape"] == [2, 4]
        (tmp_path / "it").write_bytes(content)
        info = read_header(tmp_path / "it")[0]["a"]
        assert (info.dtype, info.shape, info.nbytes) == (dtype, (2, 4), bits)
        if bits % 8:
            with pytest.raises(ValueError, match=f"it: dtype {dtype} .* dequantize"):
                read_part(info)
        else:
            assert read_part(info).dtype.itemsize == bits // 8


PARTS = [
    0,
    -1,
    2,
    slice(None),
    slice(1, 3),
    slice(0, 0),
    slice(-2, None),
    slice(2, 1),
    slice(0, 99),
]


@pytest.mark.parametrize("indices", range(4))
def test_a_part_is_what_numpy_gives(tmp_path, indices):
    array = np.arange(3 * 4 * 5, dtype=np.uint16).view(BF16).reshape(3, 4, 5)
    write(tmp_path / "it", {"before": np.zeros(3, BF16), "a": array})
    info = read_header(tmp_path / "it")[0]["a"]
    for part in itertools.product(PARTS, repeat=indices):
        got = read_part(info, part)
        same_bits(got, array[part].copy() if part else array)
        assert got.flags.writeable
        assert got.flags.c_contiguous


def test_a_part_that_is_none(tmp_path):
    write(tmp_path / "it", {"a": np.zeros((3, 4), np.float32), "b": np.array(1.0, np.float32)})
    header, _ = read_header(tmp_path / "it")
    for part in [(3,), (-4,), (0, 4), (0, 0, 0)]:
        with pytest.raises(IndexError):
            read_part(header["a"], part)
    with pytest.raises(IndexError):
        read_part(header["b"], (0,))
    for step in (2, -1):
        with pytest.raises(ValueError, match=f"step {step}"):
            read_part(header["a"], (slice(None, None, step),))


def test_only_the_part_is_read_and_nothing_else_allocated(tmp_path, monkeypatch):
    array = np.ones((64, 256, 512), np.float32)
    write(tmp_path / "it", {"a": array})
    info = read_header(tmp_path / "it")[0]["a"]
    read = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
    tracemalloc.start()
    try:
        part = read_part(info, (5, slice(128, 256)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(read) == part.nbytes == 128 * 512 * 4
    assert peak < part.nbytes + 20_000


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    put, real = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda f, piece: put(f, piece[:99]))
    monkeypatch.setattr(os, "preadv", lambda f, buffers, at: real(f, [buffers[0][:7]], at))
    write(tmp_path / "it", {"a": array})
    same_bits(load_file(tmp_path / "it")["a"], array)
    info = read_header(tmp_path / "it")[0]["a"]
    same_bits(read_part(info), array)
    same_bits(read_part(info, (slice(2, 5), slice(3, 50))), array[2:5, 3:50].copy())


def test_a_file_that_changes_after_its_header_was_read(tmp_path):
    file = tmp_path / "it"
    write(file, {"a": np.ones(1000, np.float32), "b": np.ones(1000, np.float32)})
    header, _ = read_header(file)
    os.truncate(file, header["b"].end - 1)
    same_bits(read_part(header["a"]), np.ones(1000, np.float32))
    with pytest.raises(ValueError, match=r"it: .*become shorter.*download"):
        read_part(header["b"])
    file.unlink()
    with pytest.raises(ValueError, match=r"it: is no longer there; download"):
        read_part(header["a"])
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"it: is a pipe"):
        read_part(header["a"])


def test_a_disk_that_fails(tmp_path, monkeypatch):
    write(tmp_path / "it", {"a": np.ones(10, np.float32)})
    info = read_header(tmp_path / "it")[0]["a"]

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ValueError, match=r"it: cannot be read \(Input/output error\); check"):
        read_part(info)
    with pytest.raises(ValueError, match=r"it: cannot be read \(Input/output error\); check"):
        read_header(tmp_path / "it")


def test_no_descriptor_is_left_open(tmp_path):
    write(tmp_path / "good", {"a": np.ones(10, np.float32)})
    info = read_header(tmp_path / "good")[0]["a"]
    (tmp_path / "bad").write_bytes(b"x" * 100)
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        read_part(info)
        with pytest.raises(IndexError):
            read_part(info, (10,))
        for name in ("bad", "none", "."):
            with pytest.raises(ValueError):
                read_header(tmp_path / name)
            with pytest.raises(ValueError):
                bounded.read_text(tmp_path / name, most=10)
        with pytest.raises(ValueError), ShardWriter(tmp_path / "it", {"a": ("F32", (1,))}) as w:
            w.close()
    assert os.listdir("/proc/self/fd") == before


def test_limits_can_be_changed(tmp_path):
    write(tmp_path / "it", {f"{i}": np.ones(1, np.uint8) for i in range(100)}, metadata={"a": "b"})
    length = int.from_bytes((tmp_path / "it").read_bytes()[:8], "little")
    exact = Limits(header_bytes=length, tensors=100, metadata_bytes=len('{"a":"b"}'))
    assert len(read_header(tmp_path / "it", exact)[0]) == 100
    for name, said in [
        ("header_bytes", f"its header has {length:,} bytes, and at most {length - 1:,} are read"),
        ("tensors", "more than 99 tensors"),
        ("metadata_bytes", "__metadata__ has more than 8 bytes"),
    ]:
        lower = Limits(**{**vars(exact), name: getattr(exact, name) - 1})
        with pytest.raises(ValueError, match=said):
            read_header(tmp_path / "it", lower)
