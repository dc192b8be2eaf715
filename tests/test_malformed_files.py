"""2,000 malformed checkpoints: each is refused in one line, at once, in little memory.

Mutated bytes may leave a header valid. Then a strict parser here, which shares nothing with mmx,
and the safetensors library must find the same tensors.
"""

import json
import math
import os
import random
import re
import socket
import struct
import time

import checkpoints
import pytest
import safetensors
from checkpoints import INDEX
from malformed import CASES, SHARD_1, SHARD_2, SMALL

import mmx
from mmx.cli import main
from mmx.convert.checkpoint import SafetensorsFolder, read_json
from mmx.convert.safetensors_file import Limits, read_header

SECONDS = 2
HEADERS, INDICES, CONFIGS = 1600, 300, 200  # mutated; with the cases by hand more than 2,000
REMEDY = re.compile(
    r"\b(download|convert|put|correct|check|remove|must|wanted|known are|is this)\b"
)
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "BF16": 16} | {
    f"{kind}{bits}": bits for kind in "IUF" for bits in (8, 16, 32, 64) if (kind, bits) != ("F", 8)
} | {f"F8_{kind}": 8 for kind in ("E5M2", "E4M3", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def warm():
    """What a process does once is not counted as the time of the first case."""
    mmx.load(checkpoints.GOLDEN / checkpoints.RELEASED)


def refused(call, folder, *named):
    """A ValueError of one line that names the folder, in time.

    The time of this process, as others may run beside it; whoever waits for a pipe waits for ever.
    """
    start = time.process_time()
    with pytest.raises(ValueError) as caught:
        call()
    seconds = time.process_time() - start
    said = str(caught.value)
    assert seconds < SECONDS, f"{seconds} s: {said}"
    assert said.isprintable(), ascii(said)
    assert len(said) < 2000
    assert str(folder) in said
    assert all(name in said for name in named), said
    assert REMEDY.search(said.replace(str(folder), "")), said


# ---------------------------------------------------------------- by hand


def command_refuses(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmx: error: ")
    assert err.count("\n") == 1


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name, tmp_path, capsys):
    spoil, named = CASES[name]
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    there = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "there")
    spoil(folder)
    refused(lambda: mmx.load(folder), folder, *named)
    command_refuses(capsys, "generate", folder, "--tokens", "1,2")
    # Nothing is made, and what would be replaced is as it was.
    before, kept = set(tmp_path.iterdir()), contents(there)
    command_refuses(capsys, "convert", folder, tmp_path / "out", "--to", "orbax")
    command_refuses(capsys, "convert", folder, there, "--to", "hf", "--overwrite")
    assert set(tmp_path.iterdir()) == before
    assert contents(there) == kept


def test_the_limit_of_a_header_is_the_callers_to_raise(tmp_path, capsys):
    """A header of 9 MiB, all but a little of it white space, which the format allows."""
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    file = folder / SHARD_2
    header, data = checkpoints.split_file(file.read_bytes())
    text = json.dumps(header).encode().ljust(9 << 20)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    refused(lambda: mmx.load(folder), folder, SHARD_2, "at most 8,388,608", "--max-header")
    out, other = tmp_path / "out", checkpoints.GOLDEN / checkpoints.RELEASED
    for command in (["inspect", folder], ["verify", other, folder],
                    ["convert", folder, out, "--to", "orbax"]):  # fmt: skip
        command_refuses(capsys, *command)
        command_refuses(capsys, *command, "--max-header", "9000000")
        command_refuses(capsys, *command, "--max-header", "wide")
        assert not out.exists()
        assert main([*map(str, command), "--max-header", "9MiB"]) == 0


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD_2])
def test_a_socket_is_no_file(name, tmp_path, monkeypatch):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    (folder / name).unlink()
    monkeypatch.chdir(folder)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        refused(lambda: mmx.load(folder), folder, name, "a socket")


def test_a_device_is_not_opened(tmp_path):
    (tmp_path / "model").symlink_to("/dev/zero")
    refused(lambda: read_header(tmp_path / "model"), tmp_path, "a device")


@pytest.mark.timeout(20)
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look at the file and its opening."""
    plain = os.stat(__file__)
    os.mkfifo(tmp_path / "it")
    monkeypatch.setattr(os, "stat", lambda *args, **options: plain)
    before = os.listdir("/proc/self/fd")
    refused(lambda: read_header(tmp_path / "it"), tmp_path, "a pipe")
    assert os.listdir("/proc/self/fd") == before


def test_the_limit_of_tensors_is_that_of_the_whole_folder():
    folder = checkpoints.GOLDEN / checkpoints.RELEASED
    total = len(checkpoints.read_folder(folder))
    assert len(SafetensorsFolder(folder, Limits(tensors=total)).tensors) == total
    refused(lambda: SafetensorsFolder(folder, Limits(tensors=total - 1)), folder, "more than")


def test_tensors_that_the_index_does_not_name_count_too(tmp_path):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    one_each = {file: name for name, file in index.items()}
    mapped = {name: file for file, name in one_each.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": mapped}))
    assert len(SafetensorsFolder(folder, Limits(tensors=len(index))).tensors) == len(index)
    few = Limits(tensors=len(index) - 1)
    refused(lambda: SafetensorsFolder(folder, few), folder, f"more than {len(index) - 1} tensors")


def test_what_looks_odd_and_is_allowed(tmp_path):
    """White space, order, escapes and empty tensors are no reason to refuse."""
    entry = ' {\n"data_offsets" :[ 0,\t4] , "shape":[ ],"\\u0064type": "F32" } '
    header = f'{{"b}}{{":{entry}\r\n,"a":{{"dtype":"F4","shape":[0,7],"data_offsets":[0,0]}}}}  \n'
    file = tmp_path / "it"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    tensors, metadata = read_header(file)
    assert [(n, t.dtype, t.shape, t.nbytes) for n, t in tensors.items()] == [
        ("a", "F4", (0, 7), 0), ("b}{", "F32", (), 4),
    ]  # fmt: skip
    assert metadata == {}


def test_links_within_the_folder_and_to_the_cache_are_followed(tmp_path):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "snapshots" / "it")
    (tmp_path / "blobs").mkdir()
    (folder / SHARD_1).rename(tmp_path / "blobs" / "hash")
    (folder / SHARD_1).symlink_to("../../blobs/hash")
    (folder / SHARD_2).rename(folder / "renamed")
    (folder / SHARD_2).symlink_to("renamed")
    opened = SafetensorsFolder(folder)
    want = checkpoints.read_folder(checkpoints.GOLDEN / checkpoints.RELEASED)
    assert set(opened.tensors) == set(want)
    for name, array in want.items():
        assert opened.read(name).tobytes() == array.tobytes()


# ---------------------------------------------------------------- at random


def no_twins(pairs):
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def strict(content):
    """Names, dtypes, shapes and byte ranges in the order of the bytes; None when not valid."""
    try:
        return strictly(content)
    except (AssertionError, ValueError, RecursionError):
        return None


def is_size(value):
    return type(value) is int and 0 <= value < 2**63


def strictly(content):
    assert len(content) >= 8
    (length,) = struct.unpack("<Q", content[:8])
    assert length <= len(content) - 8
    text = content[8 : 8 + length].decode("utf-8")
    assert text.startswith("{")
    header = json.loads(text, object_pairs_hook=no_twins)
    metadata = header.pop("__metadata__", {})
    assert type(metadata) is dict
    assert all(type(value) is str for value in metadata.values())
    found = []
    for name, info in header.items():
        assert name
        assert name.isprintable()
        assert type(info) is dict
        assert sorted(info) == ["data_offsets", "dtype", "shape"]
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        assert type(dtype) is str
        assert dtype in BITS
        assert type(shape) is type(offsets) is list
        assert len(offsets) == 2
        assert all(is_size(n) for n in shape + offsets)
        assert math.prod(n for n in shape if n) < 2**58
        assert math.prod(shape) * BITS[dtype] == 8 * (offsets[1] - offsets[0])
        found.append((name, dtype, tuple(shape), offsets[0], offsets[1]))
    found.sort(key=lambda tensor: tensor[3:])
    assert [tensor[3] for tensor in found] == [0, *(tensor[4] for tensor in found)][: len(found)]
    assert max([0, *(tensor[4] for tensor in found)]) == len(content) - 8 - length
    return [(*rest, 8 + length + begin, 8 + length + end) for *rest, begin, end in found]


TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e3", b"0.0", b"true", b"null",
          b"NaN", b"Infinity", b"99999999999999999999", b"F32", b"BF16", b"F8_E4M3", b"F7", b"\\",
          b"\\u0000", b"\n", b" ", b"\0", b"\xff", b"\xc3\xa9", b'"a":1,', b"[[[[", b"2", b"4",
          b'"__metadata__":{},', b'"dtype":"F32",', b"\\ud800", b"9" * 5000]  # fmt: skip


def mutate(content, end, rng):
    """Change up to three places before `end`, or the file's length."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, kind = rng.randrange(end), rng.randrange(7)
        other = rng.randrange(end)
        if kind == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place] = rng.choice(b'0123456789"{}[],:ABF \\')
        elif kind == 2:  # the length stays: something else is lost
            token = rng.choice(TOKENS)
            content[place : place + len(token)] = token
        elif kind == 3:
            content[place:place] = rng.choice(TOKENS)
        elif kind == 4:
            del content[place : place + rng.choice((1, 1, 2, 8, 60))]
        elif kind == 5:
            size = rng.choice((1, 2, 10))
            content[place : place + size], content[other : other + size] = (
                content[other : other + size], content[place : place + size],
            )  # fmt: skip
        elif rng.random() < 0.5:
            del content[rng.randrange(len(content)) :]
        else:
            content += bytes(rng.choice((1, 8, 4096)))
        end = min(end, len(content))
        if not end:
            break
    return bytes(content)


def edit(rng):
    """Another header in the place of `SMALL`'s: well formed, and right more often than not."""
    header, data = checkpoints.split_file(SMALL)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(header.keys() - {"__metadata__"}))
        info, kind = header[name], rng.randrange(6)
        if kind == 0:
            info["dtype"] = rng.choice([*BITS, "F31", None])
        elif kind == 1:
            other = rng.choice([n for n in header if n != "__metadata__"])
            info["data_offsets"] = header[other]["data_offsets"]
        elif kind == 2 and len(info["shape"]) > 1:
            rng.shuffle(info["shape"])
        elif kind == 3:
            info["shape"] = [rng.choice((0, 1, 1, 2, 3, 4, 2**40, -1)), *info["shape"]]
        elif kind == 4:
            place = rng.choice(info["data_offsets"])
            header["new"] = {"dtype": "I16", "shape": [0, 9], "data_offsets": [place, place]}
        else:
            data += bytes(2)
            header[name + "'"] = {
                "dtype": rng.choice(["F16", "U16", "BF16"]),
                "shape": [1],
                "data_offsets": [len(data) - 2, len(data)],
            }
    names = list(header)
    rng.shuffle(names)
    return checkpoints.join_file({name: header[name] for name in names}, data)


def refit(content):
    """The length before the header made right again, so that a mutation reaches the parser."""
    end = content.rfind(b"}", 0, 2000) + 1
    return struct.pack("<Q", max(end - 8, 0)) + content[8:]


@pytest.mark.parametrize("part", range(4))
def test_mutated_headers(part, tmp_path, capsys):
    rng = random.Random(part)
    folder = tmp_path / "it"
    folder.mkdir()
    config = checkpoints.GOLDEN / checkpoints.RELEASED / "config.json"
    (folder / "config.json").write_bytes(config.read_bytes())
    header = len(SMALL) - len(checkpoints.split_file(SMALL)[1])
    assert strict(SMALL)
    taken = 0
    for number in range(HEADERS // 4):
        content = edit(rng) if number % 4 == 0 else mutate(SMALL, header, rng)
        if number % 4 == 1:
            content = refit(content)
        file = folder / f"{number}.safetensors"
        file.write_bytes(content)
        if number % 20 == part:  # the command takes longer than the reader; wrong tensors at best
            os.link(file, folder / "model.safetensors")
            command_refuses(capsys, "convert", folder, tmp_path / "out", "--to", "orbax")
            (folder / "model.safetensors").unlink()
            assert os.listdir(tmp_path) == ["it"]
        want = strict(content)
        if want is None:
            refused(lambda file=file: read_header(file), file)
            continue
        taken += 1
        start = time.process_time()
        found = read_header(file)[0]
        assert time.process_time() - start < SECONDS
        assert [(n, t.dtype, t.shape, t.begin, t.end) for n, t in found.items()] == want
        listed = safetensors.deserialize(content)
        theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in listed}
        assert theirs == {name: (t.dtype, t.shape) for name, t in found.items()}
        file.unlink()
    assert 20 < taken < HEADERS // 8  # both happen


def test_mutated_indices(tmp_path):
    rng = random.Random(10)
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    index = json.loads((folder / INDEX).read_text())
    content = json.dumps(index, indent=4).encode()  # half of it is white space
    tensors = SafetensorsFolder(folder).tensors
    there = {name: info.file.name for name, info in tensors.items()}
    taken = 0
    for _ in range(INDICES):
        mutated = mutate(content, len(content), rng)
        (folder / INDEX).write_bytes(mutated)
        try:
            index = json.loads(mutated.decode(), object_pairs_hook=no_twins)
            mapped = index["weight_map"]
            # A key that was lost does not matter here, as long as every file is still named.
            assert all(there[name] == file for name, file in mapped.items())
            assert set(mapped.values()) == set(there.values())
        except (AssertionError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            refused(lambda: SafetensorsFolder(folder), folder)
            continue
        taken += 1
        assert SafetensorsFolder(folder).tensors == tensors
    assert 2 < taken < INDICES // 2


def test_mutated_configs(tmp_path):
    rng = random.Random(20)
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    content = (folder / "config.json").read_bytes()
    taken = 0
    for _ in range(CONFIGS):
        mutated = mutate(content, len(content), rng)
        (folder / "config.json").write_bytes(mutated)
        try:
            want = json.loads(mutated.decode(), object_pairs_hook=no_twins)
            assert type(want) is dict
        except (AssertionError, ValueError, RecursionError):
            refused(lambda: read_json(folder, "config.json"), folder, "config.json")
            continue
        taken += 1
        assert repr(read_json(folder, "config.json")) == repr(want)  # a NaN differs from itself
    assert 10 < taken < CONFIGS - 10
