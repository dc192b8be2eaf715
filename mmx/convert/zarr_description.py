"""How zarr describes an array, checked: shape, dtype, chunks and codecs, of versions 2 and 3.

The files are `.zarray` and `zarr.json`. Only what Orbax writes is taken: chunks of one size, little
endian, uncompressed or zstd, in version 3 within shards.
"""

from dataclasses import dataclass
from typing import Any

from mmx.convert.chunks import DTYPES, ArrayLayout

_MAX_DIMENSIONS = 32  # tensorstore's
_MAX_SIZE = 1 << 60  # of a dimension; keeps products of two within what tensorstore can count
# zarr 2 has no word for the dtypes of ml_dtypes; tensorstore uses their names.
_ZARR2_DTYPES = {(d.str if d.isbuiltin == 1 else name): name for name, d in DTYPES.items()}
_SLACK = 1 << 16


@dataclass(frozen=True, slots=True)
class Description:
    """An array as it is stored.

    Attributes:
      layout: shape, dtype and the chunk that is one file.
      raw: whether a chunk's file is its items and nothing else.
      overhead: bytes that a file may have beyond its items when it is not.
      prefix, separator: of the name of a chunk's file.
    """

    layout: ArrayLayout
    raw: bool
    overhead: int
    prefix: str
    separator: str

    def chunk_file(self, index: tuple[int, ...]) -> str:
        """The path of a chunk in the folder of the array."""
        if self.prefix:
            return self.separator.join((self.prefix, *map(str, index)))
        return self.separator.join(map(str, index)) or "0"


def zarr2_dtype(name: str) -> str:
    """What version 2 calls a dtype of `DTYPES`."""
    return next(theirs for theirs, ours in _ZARR2_DTYPES.items() if ours == name)


def describe_zarr2(fields: Any) -> Description:
    """Check the content of a `.zarray`.

    Raises:
      ValueError: what is wrong; the message names no file.
    """
    _check(isinstance(fields, dict), "not a JSON object")
    _choice(fields, "zarr_format", (2,))
    _choice(fields, "filters", (None,))
    _choice(fields, "order", ("C",))
    separator = _choice(fields, "dimension_separator", (".", "/"), default=".")
    dtype = _ZARR2_DTYPES[_choice(fields, "dtype", tuple(_ZARR2_DTYPES))]
    shape = _sizes(fields.get("shape"), "shape")
    chunk = _sizes(fields.get("chunks"), "chunks", like=shape)
    compressor = fields.get("compressor")
    if compressor is not None:
        _check(isinstance(compressor, dict), "compressor is no object")
        _choice(compressor, "id", ("zstd",))
    return Description(ArrayLayout(shape, dtype, chunk), compressor is None, _SLACK, "", separator)


def describe_zarr3(fields: Any) -> Description:
    """Check the content of a `zarr.json`.

    Raises:
      ValueError: what is wrong; the message names no file.
    """
    _check(isinstance(fields, dict), "not a JSON object")
    _choice(fields, "zarr_format", (3,))
    _choice(fields, "node_type", ("array",))
    _check(not fields.get("storage_transformers"), "storage_transformers are not supported")
    dtype = _choice(fields, "data_type", tuple(DTYPES))
    shape = _sizes(fields.get("shape"), "shape")
    grid = _part(fields, "chunk_grid", ("regular",))
    chunk = _sizes(grid.get("chunk_shape"), "chunk_shape", like=shape)
    keys = _part(fields, "chunk_key_encoding", ("default",))
    separator = _choice(keys, "separator", (".", "/"), default="/")
    layout = ArrayLayout(shape, dtype, chunk)
    inner = _codecs(fields.get("codecs"), shape, chunk, sharded=False)
    shards = 1
    for size, step in zip(chunk, inner, strict=True):
        shards *= size // step
    # The index has 16 bytes a chunk of the shard; a shard of one item a chunk is no use to anyone.
    _check(shards <= 1 << 24, f"codecs: a shard of {shards:,} chunks is not supported")
    return Description(layout, False, _SLACK + 80 * shards, "c", separator)


def _codecs(
    codecs: Any, shape: tuple[int, ...], chunk: tuple[int, ...], *, sharded: bool
) -> tuple[int, ...]:
    """Check a list of codecs; the shape of the chunks within a shard, or of the chunk."""
    _check(isinstance(codecs, list) and 1 <= len(codecs) <= 8, "codecs is no list of 1 to 8")
    inner = chunk
    known = (
        ("bytes", "zstd", "crc32c") if sharded else ("bytes", "zstd", "crc32c", "sharding_indexed")
    )
    for codec in codecs:
        _check(isinstance(codec, dict), "codecs: an object is wanted")
        name = _choice(codec, "name", known)
        given = codec.get("configuration", {})
        _check(isinstance(given, dict), "codecs: configuration is no object")
        if name == "bytes":
            _choice(given, "endian", ("little", None), default=None)
        elif name == "sharding_indexed":
            inner = _sizes(given.get("chunk_shape"), "codecs: chunk_shape", like=chunk)
            whole = all(size % step == 0 for size, step in zip(chunk, inner, strict=True))
            _check(whole, f"codecs: chunk_shape {inner} does not divide {chunk}")
            _codecs(given.get("codecs"), shape, inner, sharded=True)
            _codecs(given.get("index_codecs"), shape, inner, sharded=True)
    return inner


def _part(fields: dict[str, Any], key: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of a part that has a name."""
    part = fields.get(key)
    _check(isinstance(part, dict), f"{key} is no object")
    assert isinstance(part, dict)
    _choice(part, "name", names)
    configuration = part.get("configuration", {})
    _check(isinstance(configuration, dict), f"{key}: configuration is no object")
    return configuration


def _choice(fields: dict[str, Any], key: str, known: tuple[Any, ...], default: Any = None) -> Any:
    value = fields.get(key, default)
    # 2.0 == 2 and True == 1, but neither is what a writer of this format writes.
    if not any(type(value) is type(one) and value == one for one in known):
        shown = ascii(value)[:60]
        raise ValueError(f"{key} is {shown}; supported is {', '.join(map(str, known))}")
    return value


def _sizes(value: Any, key: str, like: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """A list of sizes of at least 1, as many as there are in `like`."""
    good = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    if not good or not all(type(size) is int and 1 <= size <= _MAX_SIZE for size in value):
        raise ValueError(f"{key} is {ascii(value)[:60]}; a list of sizes from 1 on is wanted")
    if like is not None and len(value) != len(like):
        raise ValueError(f"{key} has {len(value)} dimensions and the shape {len(like)}")
    return tuple(value)


def _check(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)
