"""Orbax trees of anyone, read in pieces: described without reading data, checked before it is read.

Orbax trusts what it finds. Here every path, shape, dtype, chunk and codec is checked within bounds
before tensorstore is given an array, no link is followed, and a chunk that is missing is an error
(Orbax restores zeros). The description of a tree comes from `zarr_description`.
"""

import functools
import itertools
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from mmx.convert.bounded import (
    JsonError,
    open_plain,
    parse,
    parse_member,
    parse_string,
    printable,
    read_exactly,
    read_text,
    skip_space,
    walk_object,
)
from mmx.convert.chunks import ArrayLayout
from mmx.convert.zarr_description import Description, describe_zarr2, describe_zarr3

TREE = "_METADATA"
_MANIFEST = "manifest.ocdbt"
_REMEDY = "it is damaged or no Orbax checkpoint: write it again"
_MISSING = "no such file; a whole Orbax checkpoint is wanted"
_ENTRY = 1 << 16  # bytes of the description of one array in the tree
_MEMBER = 1 << 20  # bytes of any other member, as of a user's own notes
_KINDS = (1, 2)  # keys of lists and of dicts, as Orbax numbers them
_AT_ONCE = 64 << 20  # bytes of chunks, unless one is larger
_RAW_AT_ONCE = 1 << 20  # the same of raw chunks; larger ones need no tensorstore
_MAX_PATH = 1024  # characters of the path to an array


@dataclass(frozen=True)
class Limits:
    """What is refused before tensorstore is called.

    Attributes:
      metadata_bytes: of the description of the tree.
      description_bytes: of the description of one array.
      arrays: in the tree.
      array_bytes: of one array.
      chunk_bytes: of one chunk in memory; chunks are read whole.
      files: files and folders in the folder.
    """

    metadata_bytes: int = 64 << 20
    description_bytes: int = 1 << 16
    arrays: int = 100_000
    array_bytes: int = 16 << 40
    chunk_bytes: int = 4 << 30
    files: int = 4_000_000


class TreeReader:
    """The arrays of an Orbax tree: `arrays`, by the path in the tree joined by '/'.

    Takes trees as Orbax writes them (OCDBT or not, zarr 2 or 3) and those of `TreeWriter`. Opening
    reads no data. May be used by several threads.

    Raises:
      ValueError: one line that names the file: something is missing, damaged, a link, or beyond the
        limits.
    """

    def __init__(self, folder: Path, limits: Limits | None = None):
        self.folder = Path(folder).resolve()
        self._limits = limits or Limits()
        _check_files(self.folder, self._limits.files)
        tree = _read_tree(self.folder / TREE, self._limits)
        self._tree = tree
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        if tree.ocdbt and not (self.folder / _MANIFEST).is_file():
            raise ValueError(f"{self.folder / _MANIFEST}: {_MISSING}")
        self._descriptions = {name: self._describe(name) for name in sorted(tree.names)}
        self.arrays: dict[str, ArrayLayout] = {
            name: description.layout for name, description in self._descriptions.items()
        }

    def read(self, name: str, region: tuple[int | slice, ...] = ()) -> np.ndarray:
        """A part of an array; memory for the part, and one chunk or 64 MiB of chunks at a time.

        Args:
          name: one of `arrays`.
          region: an index or a slice (of step 1) for each leading dimension, within the array.

        Returns:
          A new array in C order.

        Raises:
          ValueError: a chunk is missing or damaged; a region that is not within the array.
        """
        layout = self.arrays[name]
        slices = _slices(name, layout, region)
        shape = tuple(part.stop - part.start for part in slices)
        out = np.empty(shape, layout.numpy_dtype)
        if out.size:
            self._check_chunks(name, slices)
            raw = self._descriptions[name].raw and not self._tree.ocdbt
            try:
                store = self._open(name)
                if tuple(store.shape) != layout.shape or store.dtype.numpy_dtype != out.dtype:
                    raise ValueError("its description has changed")
                for box in _boxes(layout, slices, _RAW_AT_ONCE if raw else _AT_ONCE):
                    place = (
                        slice(part.start - whole.start, part.stop - whole.start)
                        for part, whole in zip(box, slices, strict=True)
                    )
                    part = out[(*place, ...)]  # a view, of a number too
                    if not (raw and self._read_plainly(name, box, part)):
                        ts.array(part, write=True).write(store[box]).result()
            except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
                raise self._fault(name, error) from None
        dropped = tuple(axis for axis, part in enumerate(region) if not isinstance(part, slice))
        return out.squeeze(axis=dropped)

    def _read_plainly(self, name: str, box: tuple[slice, ...], out: np.ndarray) -> bool:
        """Read what is one range of bytes of one raw file; whether it is. Twice as fast."""
        found = self._descriptions[name]
        index = found.layout.touched(box)
        span = _span(found.layout, box)
        path = self.folder / file_name(name) / found.chunk_file(tuple(part[0] for part in index))
        if span is None or not out.flags.c_contiguous or not path.exists():
            return False
        handle = open_plain(path)
        try:
            content = memoryview(out.reshape(-1).view(np.uint8))
            if read_exactly(handle, content, span) != len(content):
                raise ValueError(f"{path.name} is cut short")
        finally:
            os.close(handle)
        return True

    def _open(self, name: str) -> Any:
        spec = {
            "driver": "zarr3" if self._tree.zarr3 else "zarr",
            "kvstore": self._kvstore(f"{file_name(name)}/"),
            "fill_missing_data_reads": self._tree.sparse,
        }
        return ts.open(spec, open=True, read=True, context=self._context).result()

    def _kvstore(self, path: str = "") -> dict[str, Any]:
        if not self._tree.ocdbt:
            return {"driver": "file", "path": f"{self.folder}/{path}"}
        base = {"driver": "file", "path": f"{self.folder}/"}
        return {"driver": "ocdbt", "base": base, "path": path}

    @functools.cached_property
    def _ocdbt(self) -> Any:
        return ts.KvStore.open(self._kvstore(), context=self._context).result()

    def _describe(self, name: str) -> Description:
        """The description of an array, within the limits."""
        document = f"{file_name(name)}/{'zarr.json' if self._tree.zarr3 else '.zarray'}"
        path = self.folder / document
        most = self._limits.description_bytes
        if self._tree.ocdbt:
            text = self._read_value(name, document, most)
        else:
            text = read_text(path, most=most, missing=_MISSING)
        try:
            fields = parse(text)
            found = describe_zarr3(fields) if self._tree.zarr3 else describe_zarr2(fields)
        except JsonError as error:
            raise ValueError(f"{path}: not valid JSON ({error}); {_REMEDY}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {_REMEDY}") from None
        for what, size, limit in (
            ("the array", found.layout.nbytes, self._limits.array_bytes),
            ("a chunk", found.layout.chunk_nbytes, self._limits.chunk_bytes),
        ):
            if size > limit:
                raise ValueError(
                    f"{path}: {what} has {size:,} bytes, more than {limit:,}; {_REMEDY}"
                )
        return found

    def _read_value(self, name: str, key: str, most: int) -> str:
        """A small document out of an OCDBT store."""
        try:
            found = self._ocdbt.read(key).result()
            if found.state != "value":
                raise ValueError(f"{key} is missing")
            if len(found.value) > most:
                raise ValueError(f"{key} has more than {most:,} bytes")
            return found.value.decode()
        except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
            raise self._fault(name, error) from None

    def _check_chunks(self, name: str, slices: tuple[slice, ...]) -> None:
        """Sizes of the files that tensorstore is about to read whole."""
        if self._tree.ocdbt:
            return
        found = self._descriptions[name]
        folder = self.folder / file_name(name)
        most = found.layout.chunk_nbytes
        # What does not compress grows a little; the shards of zarr 3 have an index.
        most += 0 if found.raw else most // 8 + found.overhead
        for index in itertools.product(*found.layout.touched(slices)):
            path = folder / found.chunk_file(index)
            try:
                state = path.lstat()
            except FileNotFoundError:
                continue  # tensorstore says whether that is an error
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
            if not stat.S_ISREG(state.st_mode):
                raise ValueError(f"{path}: not a plain file; {_REMEDY}")
            if state.st_size > most or (found.raw and state.st_size != most):
                raise ValueError(f"{path}: has {state.st_size:,} bytes, not {most:,}; {_REMEDY}")

    def _fault(self, name: str, error: Exception) -> ValueError:
        said = " ".join(str(error).split()).replace(f"{self.folder}/", "")
        what = printable(said[:200])
        return ValueError(f"{self.folder}: {printable(name)} cannot be read ({what}); {_REMEDY}")


@dataclass(frozen=True)
class _Tree:
    """What `_METADATA` says: the arrays' names, the format, and whether zeros may be left out."""

    names: frozenset[str]
    ocdbt: bool
    zarr3: bool
    sparse: bool


def file_name(name: str) -> str:
    """What the files of an array are called: its path with '.' between the parts."""
    return name.replace("/", ".")


def _check_files(folder: Path, most: int) -> None:
    """Refuse links and special files anywhere in the folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; the folder of an Orbax tree is wanted")
    count, left = 0, [str(folder)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > most:
                        raise ValueError(f"{folder}: holds more than {most:,} files; {_REMEDY}")
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        shown = printable(entry.path)
                        raise ValueError(f"{shown}: a link or no plain file; put the file there")
        except OSError as error:
            raise ValueError(f"{folder}: cannot be read ({error.strerror})") from None


def _read_tree(path: Path, limits: Limits) -> _Tree:
    """Read `_METADATA`, one array after the other."""
    text = read_text(path, most=limits.metadata_bytes, missing=_MISSING)
    names: set[str] = set()
    flags: dict[str, Any] = {}

    def entry(key: str, position: int) -> int:
        fields, end = parse_member(text, position, most=_ENTRY, what=printable(key))
        name = _name(key, fields)
        if name in names:
            raise JsonError(f"{printable(name)} is there twice")
        names.add(name)
        return end

    def member(key: str, position: int) -> int:
        if key == "tree_metadata":
            return walk_object(text, position, entry, most=limits.arrays, what="arrays")
        if key == "value_metadata_tree":  # the whole tree again, as one string
            return parse_string(text, position)[1]
        flags[key], end = parse_member(text, position, most=_MEMBER, what=printable(key))
        return end

    try:
        end = walk_object(text, skip_space(text, 0), member, most=1000, what="members")
        if skip_space(text, end) != len(text):
            raise JsonError(f"more text after the end, at character {end}")
        _check_tree(names)
        return _Tree(
            frozenset(names),
            ocdbt=_flag(flags, "use_ocdbt", (path.parent / _MANIFEST).is_file()),
            zarr3=_flag(flags, "use_zarr3", False),
            sparse=not _flag(flags, "store_array_data_equal_to_fill_value", False),
        )
    except JsonError as error:
        raise ValueError(f"{path}: {printable(str(error))}; {_REMEDY}") from None


def _name(key: str, fields: Any) -> str:
    """The path to an array; `fields` is how Orbax describes it."""
    shown = printable(key)
    keys = fields.get("key_metadata") if isinstance(fields, dict) else None
    value = fields.get("value_metadata") if isinstance(fields, dict) else None
    if not isinstance(keys, list) or not keys or not isinstance(value, dict):
        raise JsonError(f"{shown} has no list of keys or no description of a value")
    parts = []
    for part in keys:
        name = part.get("key") if isinstance(part, dict) else None
        if not isinstance(name, str) or part.get("key_type") not in _KINDS:
            raise JsonError(f"{shown} has a key that is no name")
        if not name or not name.isprintable() or set(name) & set("./\\"):
            raise JsonError(f"{shown} has the key {ascii(name)[:80]}, which is no name")
        parts.append(name)
    kind = value.get("value_type")
    if kind not in ("jax.Array", "np.ndarray"):
        raise JsonError(f"{shown} is {ascii(kind)[:40]}; arrays are wanted")
    name = "/".join(parts)
    if len(name) > _MAX_PATH:
        raise JsonError(f"{shown} is too long for a name")
    return name


def _check_tree(names: set[str]) -> None:
    if not names:
        raise JsonError("the tree holds no arrays")
    for name in sorted(names):
        parts = name.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in names:
                raise JsonError(f"{'/'.join(parts[:depth])} is an array and holds {name}")


def _flag(flags: dict[str, Any], key: str, default: bool) -> bool:
    value = flags.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise JsonError(f"{key} is {ascii(value)[:40]}; true or false is wanted")
    return value


def _boxes(
    layout: ArrayLayout, slices: tuple[slice, ...], most: int
) -> Iterator[tuple[slice, ...]]:
    """The region in boxes of one chunk, or of chunks of at most `most` bytes together."""
    ranges = layout.touched(slices)
    count = math.prod(map(len, ranges))
    if count == 1 or count * layout.chunk_nbytes <= most:
        yield slices
        return
    axis = max(range(len(ranges)), key=lambda axis: len(ranges[axis]))
    middle = ranges[axis][len(ranges[axis]) // 2] * layout.chunk[axis]
    for half in (slice(slices[axis].start, middle), slice(middle, slices[axis].stop)):
        yield from _boxes(layout, (*slices[:axis], half, *slices[axis + 1 :]), most)


def _span(layout: ArrayLayout, box: tuple[slice, ...]) -> int | None:
    """Where the bytes of a box begin in its chunk, if they are one range of one chunk."""
    offset, split = 0, False
    for part, indices, step in zip(box, layout.touched(box), layout.chunk, strict=True):
        size = part.stop - part.start
        if len(indices) != 1 or (split and size != step):
            return None
        split = split or size != 1
        offset = offset * step + part.start - indices[0] * step
    return offset * layout.numpy_dtype.itemsize


def _slices(name: str, layout: ArrayLayout, region: tuple[int | slice, ...]) -> tuple[slice, ...]:
    """The region as one slice a dimension with bounds inside the array."""
    if len(region) > len(layout.shape):
        raise ValueError(
            f"{name} has shape {layout.shape}; the region has {len(region)} dimensions"
        )
    slices = []
    whole = (slice(None),) * (len(layout.shape) - len(region))
    for part, size in zip((*region, *whole), layout.shape, strict=True):
        if not isinstance(part, slice):
            part = slice(part, part + 1)
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(f"{name} has shape {layout.shape}; the region {region} is not in it")
        slices.append(slice(start, stop))
    return tuple(slices)
