"""Malformed checkpoints made by hand, and the words that their refusals must contain.

`CASES` spoil a copy of a golden checkpoint of three shards in place. `BOMBS` write the largest
files that are read at all; a parser that believes them needs gigabytes or minutes.
"""

import json
import os
import struct

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_1, SHARD_2 = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
CASES = {}
BOMBS = {}


def file_of(header, data=b"", length=None):
    """A file with this header: a text, bytes, or an object that becomes JSON."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype="F32", shape=(), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# Little data under many forms, so that a changed digit often gives another valid header.
SMALL = file_of(
    {
        "__metadata__": {"format": "pt"},
        "a": tensor("F32", (2, 3), (0, 24)),
        "b.weight": tensor("BF16", (4,), (24, 32)),
        "s": tensor("I64", (), (32, 40)),
        "e": tensor("F8_E4M3", (0, 5), (40, 40)),
        "u": tensor("U8", (11, 1), (40, 51)),
        "h": tensor("F16", (1, 1, 1), (51, 53)),
    },
    bytes(range(53)),
)

# ---------------------------------------------------------------- headers

F32 = tensor()
TEXT = json.dumps(F32)
HEADERS = {
    "no header": (b"", b"", "an object is wanted"),
    "a list": ("[]", b"", "an object is wanted"),
    "two objects": ("{}{}", b"", "more text"),
    "nul after the header": ("{}\0\0", b"", "more text"),
    "space before the header": (" {}", b"", "an object is wanted"),
    "a byte order mark": ("\ufeff{}", b"", "an object is wanted"),
    "utf-16": ("{}".encode("utf-16-le"), b"", "is wanted"),
    "not utf-8": (b'{"\xff":1}', b"", "UTF-8"),
    "a surrogate": (b'{"\xed\xa0\x80":1}', b"", "UTF-8"),
    "no quotes": ("{a:1}", b"", "a string is wanted"),
    "a comma too many": (f'{{"a":{TEXT},}}', bytes(4), "a string is wanted"),
    "no comma": (f'{{"a":{TEXT}"b":{TEXT}}}', bytes(4), "a comma or a brace"),
    "no colon": ('{"a" 1}', b"", "a colon is wanted"),
    "cut": (f'{{"a":{TEXT}', bytes(4), "a comma or a brace"),
    "cut in a name": ('{"abc', b"", "Unterminated string"),
    "name with a line break": ('{"a\nb":1}', b"", "control character"),
    "name with an escaped line break": (f'{{"a\\nb":{TEXT}}}', bytes(4), "no name of a tensor"),
    "name with a lone surrogate": (f'{{"\\ud800":{TEXT}}}', bytes(4), "no name of a tensor"),
    "name that turns the line": (f'{{"\u202e":{TEXT}}}', bytes(4), "no name of a tensor"),
    "name of nothing": (f'{{"":{TEXT}}}', bytes(4), "no name of a tensor"),
    "name of a million characters": (f'{{"{"x" * 10**6}":{TEXT}}}', bytes(4), "no name"),
    "the same name twice": (f'{{"a":{TEXT},"a":{TEXT}}}', bytes(4), "a is there twice"),
    "the same name in escapes": (f'{{"a":{TEXT},"\\u0061":{TEXT}}}', bytes(4), "a is there twice"),
    "the same field twice": (f'{{"a":{TEXT[:-1]},"dtype":"F32"}}}}', bytes(4), "dtype is there"),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b"", "__metadata__ is there twice"),
    "a name twice in the metadata": ('{"__metadata__":{"a":"","a":""}}', b"", "a is there twice"),
    "metadata with a number": ({"__metadata__": {"a": 1}}, b"", "must map names to texts"),
    "metadata with an object": ({"__metadata__": {"a": {}}}, b"", "must map names to texts"),
    "metadata of null": ({"__metadata__": None}, b"", "must map names to texts"),
    "metadata cut": ('{"__metadata__":{"a', b"", "Unterminated"),
    "metadata of a megabyte": ({"__metadata__": {"a": "x" * (1 << 20)}}, b"", "1,048,576 bytes"),
    "deep metadata": ('{"__metadata__":' + '{"a":' * 10**5, b"", "nested too deep"),
    "deep lists": ('{"a":' + "[" * 10**6, b"", "a"),
    "deep objects": ('{"a":' * 10**6, b"", "no description"),
    "deep shape": ('{"a":{"dtype":"F32","shape":' + "[" * 4000 + "}", b"", "nested too deep"),
    "a tensor of null": ({"a": None}, b"", "must have a dtype"),
    "a tensor of null before another": ({"a": None, "b": F32}, bytes(4), "must have a dtype"),
    "a tensor of text": ({"a": "}"}, b"", "a: "),
    "a tensor of a list": ({"a": [F32]}, bytes(4), "a: "),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 4]}}, bytes(4), "must have a dtype"),
    "one field more": ({"a": F32 | {"x": 1}}, bytes(4), "nothing else"),
    "object within": ({"a": F32 | {"shape": {}}}, bytes(4), "a: "),
    "a number of 5,000 digits": (TEXT.replace("4", "4" * 5000).join(['{"a":', "}"]), b"", "a: "),
    "a number of 3,000 digits": (TEXT.replace("4", "4" * 3000).join(['{"a":', "}"]), b"", "range"),
    "an offset that goes back": ({"a": tensor(offsets=(4, 0))}, bytes(4), "the byte range [4, 0]"),
    "empty and too large": ({"a": tensor(shape=(0, 1 << 62, 4), offsets=(0, 0))}, b"", "too large"),
    "100,001 tensors": (
        "{" + ",".join(f'"{i:x}":{json.dumps(tensor(shape=(0,), offsets=(0, 0)))}'.replace(" ", "")
                       for i in range(100_001)) + "}", b"", "more than 100,000 tensors"),
}  # fmt: skip
HEADERS |= {
    f"dtype {dtype!r}": ({"a": tensor(dtype)}, bytes(4), "a: unknown dtype")
    for dtype in ("f32", "F128", "", "float32", "I4", "F32\n", None, 32, ["F32"], True)
}
HEADERS |= {
    f"shape {shape}": (TEXT.replace("[]", shape).join(['{"a":', "}"]), bytes(4), "a: ")
    for shape in ("[NaN]", "[Infinity]", "[-Infinity]", "[-1]", "[1.0]", "[1e0]", "[true]",
                  "[null]", '["1"]', "[[1]]", "1", "null", '"1"', "[2]", "[0]", "[-1,-1]",
                  "[9223372036854775808]", "[4294967296,4294967296]", "[18446744073709551615]",
                  "[2,9223372036854775807]", "[0,4611686018427387904,4]",
                  "[" + "1," * 64 + "1]", "[" + "1," * 2000 + "1]")
}  # fmt: skip
HEADERS |= {
    f"offsets {offsets}": (TEXT.replace("[0, 4]", offsets).join(['{"a":', "}"]), bytes(4), "a: ")
    for offsets in ("[4,0]", "[-4,0]", "[0,-4]", "[0]", "[0,4,8]", "[]", "[0.0,4]", "[false,4]",
                    "[0,4.0]", "null", "[NaN,4]", "[1,5]", "[4,8]", "[0,3]", "[0,5]", '["0","4"]',
                    "[9223372036854775804,9223372036854775808]", "[18446744073709551612,0]",
                    "[18446744073709551616,18446744073709551620]")
}  # fmt: skip
PAIRS = {
    "overlap": ((0, 4), (0, 4), 4, "overlap"),
    "overlap by a byte": ((0, 4), (3, 7), 7, "overlap"),
    "gap": ((0, 4), (5, 9), 9, "follow a gap"),
    "gap before": ((4, 8), (8, 12), 12, "follow a gap"),
    "the end uncovered": ((0, 4), (4, 8), 9, "1 bytes follow the last"),
    "past the end": ((0, 4), (4, 8), 7, "b: its bytes end at"),
}
HEADERS |= {
    name: ({"a": tensor(offsets=a), "b": tensor(offsets=b)}, bytes(size), said)
    for name, (a, b, size, said) in PAIRS.items()
}
HEADERS["an empty tensor within another"] = (
    {"a": F32, "b": tensor(shape=(0,), offsets=(2, 2))}, bytes(4), "overlap")  # fmt: skip


def _shard(content, *named):
    def spoil(folder):
        (folder / SHARD_2).write_bytes(content)

    return spoil, (SHARD_2, *named)


for _name, (_header, _data, _said) in HEADERS.items():
    CASES[f"header: {_name}"] = _shard(file_of(_header, _data), _said)
for _length in (0, 1, 7, 9, 2**23 + 1, 2**31, 2**40, 2**63, 2**64 - 8, 2**64 - 1):
    CASES[f"header of {_length} bytes"] = _shard(file_of("{}", bytes(64), _length), "download")


def _sparse(folder):
    """The header is as long as it says, and nothing of it takes room on the disk."""
    (folder / SHARD_2).write_bytes(struct.pack("<Q", 2**40))
    os.truncate(folder / SHARD_2, 2**40 + 8)


CASES["header of a terabyte that is there"] = (_sparse, (SHARD_2, "at most 8,388,608"))

# ---------------------------------------------------------------- files that are none


def _case(title, *named):
    def register(spoil):
        CASES[title] = (spoil, named)
        return spoil

    return register


for _file in ("config.json", INDEX, SHARD_2):

    @_case(f"{_file} is a pipe", _file, "a pipe")
    def _pipe(folder, name=_file):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    @_case(f"{_file} links to a pipe within", _file, "a pipe")
    def _pipe_within(folder, name=_file):
        (folder / name).unlink()
        os.mkfifo(folder / "pipe")
        (folder / name).symlink_to("pipe")

    @_case(f"{_file} is a folder", _file, "a folder")
    def _folder(folder, name=_file):
        (folder / name).unlink()
        (folder / name).mkdir()

    @_case(f"{_file} links to a device", _file, "link")
    def _device(folder, name=_file):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    @_case(f"{_file} links to itself", _file, "itself")
    def _itself(folder, name=_file):
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    @_case(f"{_file} in a circle of links", _file, "itself")
    def _circle(folder, name=_file):
        (folder / name).unlink()
        (folder / name).symlink_to("b")
        (folder / "b").symlink_to("c")
        (folder / "c").symlink_to(name)

    @_case(f"{_file} links to nothing", _file)
    def _nothing(folder, name=_file):
        (folder / name).unlink()
        (folder / name).symlink_to("nothing")

    @_case(f"{_file} links out through a link", _file, "link")
    def _out(folder, name=_file):
        (folder / name).rename(folder.parent / "outside")
        (folder / "between").symlink_to("../outside")
        (folder / name).symlink_to("between")


@_case("the only file links to itself", SINGLE, "itself")
def _single(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / SINGLE).symlink_to(SINGLE)


# ---------------------------------------------------------------- index and config


def _index(content, *named):
    def spoil(folder):
        (folder / INDEX).write_text(content)

    return spoil, (INDEX, *named)


CASES |= {
    "index with a name twice": _index('{"weight_map":{"a":"b","a":"b"}}', "a is there twice"),
    "index with two weight maps": _index('{"weight_map":{},"weight_map":{}}', "is there twice"),
    "index with a name twice in the rest": _index('{"m":{"a":1,"a":1}}', "a is there twice"),
    "index and more": _index('{"weight_map":{"a":"b"}} x', "more text"),
    "index with 5,000 files": _index(
        json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(5000)}}), "4,096 files"
    ),
    "index with 100,001 names": _index(
        json.dumps({"weight_map": {str(i): "a" for i in range(100_001)}}), "100,000 tensors"
    ),
    "index with 101 members": _index(json.dumps({str(i): 0 for i in range(101)}), "100 members"),
    "index with 2 MB beside the map": _index(json.dumps({"m": "x" * (2 << 20)}), "1,048,576 bytes"),
}


@_case("index of 10 GB", INDEX, "at most 16,777,216")
def _large_index(folder):
    os.truncate(folder / INDEX, 10**10)


@_case("config of 10 GB", "config.json", "at most 1,048,576")
def _large_config(folder):
    os.truncate(folder / "config.json", 10**10)


@_case("config with a name twice", "config.json", "vocab_size is there twice")
def _twice(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"vocab_size": 64, ', 1))


for _type in ("llama", "mixtral", None, 7, ["minimax"], "minimax\n", "x" * 10**5):

    @_case(f"config of another model {str(_type)[:20]!r}", "config.json", "unknown model_type")
    def _other(folder, value=_type):
        fields = json.loads((folder / "config.json").read_text()) | {"model_type": value}
        (folder / "config.json").write_text(json.dumps(fields))


# ---------------------------------------------------------------- the largest

_ASTRAL = "\U0001f600"  # one of these makes every character of a text take four bytes
_FULL, _MAP = (8 << 20) - 64, (16 << 20) - 64  # bytes that a header and an index may have
_NESTED = "[[[[]]]],"


def _many(number):
    entry = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return "{" + ",".join(entry % i for i in range(number)) + "}"


def _filled(start, piece, size):
    return start + piece * ((size - len(start.encode())) // len(piece))


def _mapped(member, number):
    """An index whose weight map has so many members."""
    members = "".join("," + member.format(i) for i in range(number))
    return f'{{"weight_map":{{"{_ASTRAL}":"a"{members}}}}}'


def _bomb(name, make, *named, file=SINGLE):
    def write(folder):
        content = make()
        raw = file_of(content) if file == SINGLE else content.encode()
        (folder / file).write_bytes(raw)

    BOMBS[name] = (write, named)


_bomb("10^6 empty tensors", lambda: _many(10**6), SINGLE, "at most 8,388,608")
_bomb("10^6 empty tensors, limit raised", lambda: _many(10**6), SINGLE, "100,000 tensors")
_bomb("as many as the header holds", lambda: _many(140_000), SINGLE, "100,000 tensors")
_bomb("lists in lists", lambda: _filled('{"a":[', _NESTED, _FULL), SINGLE, "a: ")
_bomb("shape", lambda: _filled('{"a":{"shape":[', _NESTED, _FULL), SINGLE, "a: ")
_bomb("metadata", lambda: _filled('{"__metadata__":[', _NESTED, _FULL), SINGLE, "1,048,576 bytes")
_bomb("a name", lambda: _filled('{"' + _ASTRAL, "x", _FULL) + '":1}', SINGLE, "no name")
_bomb("escapes", lambda: _filled('{"' + _ASTRAL, "\\u0001", _FULL) + '":1}', SINGLE, "no name")
_bomb("numbers", lambda: _filled('{"a' + _ASTRAL + '":[', "1.5,", _FULL), SINGLE, "no description")
_bomb("white space", lambda: "{" + " " * _FULL, SINGLE, "a string is wanted")
_bomb("short texts in the metadata", lambda: (
    f'{{"__metadata__":{{"{_ASTRAL}":""' + "".join(f',"{i}":""' for i in range(90_000))
    + "}}" + " " * (7 << 20) + "x"), SINGLE, "more text")  # fmt: skip
_bomb("index: lists", lambda: _filled('{"weight_map":{"a":[', _NESTED, _MAP), "weight_map",
      file=INDEX)  # fmt: skip
_bomb("index: lists beside the map", lambda: _filled('{"m":[', _NESTED, _MAP), "1,048,576 bytes",
      file=INDEX)  # fmt: skip
_bomb("index: names", lambda: _mapped('"{}":"a"', 10**6), INDEX, "100,000 tensors", file=INDEX)
_bomb("index: files", lambda: _mapped('"{0}":"{0:0150}"', 90_000), "4,096 files", file=INDEX)
_bomb("index: long names", lambda: _mapped('"{:0150}":"a"', 90_000), "a: shard is missing",
      file=INDEX)  # fmt: skip
_bomb("config: lists", lambda: _filled('{"a":[', _NESTED, 1 << 20), "not valid JSON",
      file="config.json")  # fmt: skip
_bomb("config: objects", lambda: '{"a":' * 200_000, "nested too deep", file="config.json")
