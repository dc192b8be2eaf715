"""Orbax trees written in pieces: what `orbax.checkpoint` saves of a tree of numpy arrays.

    params/
        _METADATA                    the tree: a key path for each array
        _CHECKPOINT_METADATA         which handler reads it
        commit_success.txt           what Orbax leaves in a tree that is complete
        blocks.layer_0.moe.gate_proj/.zarray       shape, dtype and chunk of one array (zarr 2)
        blocks.layer_0.moe.gate_proj/0.3.0.0       one chunk: its items in C order, nothing else

Orbax itself holds whole arrays in memory; here a chunk is written at a time, in any order, by any
number of threads. The bytes depend on the arrays alone, not on time, machine or order. The arrays
are marked as numpy's, so that Orbax restores them where no sharding is given, too.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmx.convert.chunks import DTYPES, ArrayLayout, choose_chunk
from mmx.convert.orbax_reader import TreeReader, file_name
from mmx.convert.transposing import to_contiguous
from mmx.convert.zarr_description import zarr2_dtype
from mmx.integrity import sync

__all__ = ["ArrayLayout", "ChunkFile", "TreeReader", "TreeWriter", "choose_chunk", "to_contiguous"]

_HANDLER = (
    "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"  # as it says
)
_COMMITTED = "Checkpoint commit was successful"
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+")
_MAX_NAME = 240  # bytes; a folder is called like it
_RESERVED = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "array_metadatas", "d")
_PIECE = 4 << 20  # bytes that are hashed and written while they are in the cache


@dataclass(frozen=True, slots=True)
class ChunkFile:
    """A file that was written: its path in the folder with '/', bytes, and SHA-256 in hex."""

    file: str
    size: int
    sha256: str


class TreeWriter:
    """An Orbax tree under way. It is one, for any reader, once `finish` has returned.

    Chunks that another process has written before it was killed may stay; what matters is that all
    are there in the end.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, ArrayLayout]):
        """Make the folders; nothing else is written.

        Args:
          folder: of the tree; may exist.
          arrays: by the path in the tree, joined by '/', as 'blocks/layer_0/moe/gate_proj'.

        Raises:
          ValueError: a name that cannot be one, an empty array, an unknown dtype, or a chunk that
            does not fit the shape.
          OSError: the folders cannot be made.
        """
        self.folder = Path(folder)
        self.arrays = dict(arrays)
        _check_names(self.arrays)
        for name, layout in self.arrays.items():
            _check_layout(name, layout)
        for name in self.arrays:
            (self.folder / file_name(name)).mkdir(parents=True, exist_ok=True)

    def chunks(self, name: str) -> Iterator[tuple[int, ...]]:
        """The index of every chunk of an array, in C order."""
        return self.arrays[name].chunks()

    def region(self, name: str, index: tuple[int, ...]) -> tuple[slice, ...]:
        """The part of the array that a chunk holds."""
        return self.arrays[name].region(index)

    def file(self, name: str, index: tuple[int, ...]) -> str:
        """The path of a chunk in the folder, with '/'."""
        return f"{file_name(name)}/{'.'.join(map(str, index)) or '0'}"

    def write(self, name: str, index: tuple[int, ...], data: np.ndarray) -> ChunkFile:
        """Write a chunk and force it to disk; until then there is no file of its name.

        Args:
          name, index: of the chunk.
          data: the part of the array that `region` says, in any memory order.

        Raises:
          ValueError: another shape or dtype.
          OSError: it cannot be written; nothing is left of it.
        """
        layout = self.arrays[name]
        shape = tuple(part.stop - part.start for part in layout.region(index))
        if data.shape != shape or data.dtype != DTYPES[layout.dtype]:
            raise ValueError(
                f"chunk {index} of {name} is {data.dtype} {data.shape}; "
                f"it must be {layout.dtype} {shape}"
            )
        if shape != layout.chunk:  # at the end of a dimension: filled up with zeros
            whole = np.zeros(layout.chunk, data.dtype)
            whole[tuple(map(slice, shape))] = data
            data = whole
        return self._write(self.file(name, index), to_contiguous(data))

    def finish(self) -> list[ChunkFile]:
        """Write what makes the folder a checkpoint, after a look that every chunk is there.

        Returns:
          The files written here; together with the chunks they are all of the folder.

        Raises:
          ValueError: a chunk is missing or of another size.
          OSError: a file cannot be written.
        """
        for name, layout in self.arrays.items():
            for index in layout.chunks():
                path = self.folder / self.file(name, index)
                size = path.stat().st_size if path.is_file() else -1
                if size != layout.chunk_nbytes:
                    seen = "is missing" if size < 0 else f"has {size} bytes"
                    raise ValueError(
                        f"{path}: {seen}; {layout.chunk_nbytes} were to be written: convert again"
                    )
        documents = {
            f"{file_name(name)}/.zarray": _zarray(layout) for name, layout in self.arrays.items()
        }
        documents["_CHECKPOINT_METADATA"] = _encode(
            {
                "item_handlers": _HANDLER,
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": 0,
                "commit_timestamp_nsecs": 0,
                "custom_metadata": {},
            }
        )
        documents["_METADATA"] = _encode(_tree_metadata(self.arrays))
        documents["commit_success.txt"] = _COMMITTED.encode()
        files = [
            self._write(file, np.frombuffer(content, np.uint8))
            for file, content in documents.items()
        ]
        sync(self.folder.parent)
        return files

    def _write(self, file: str, data: np.ndarray) -> ChunkFile:
        """Write contiguous items under a temporary name, force them to disk, rename."""
        path = self.folder / file
        temporary = path.with_name(path.name + ".tmp")
        content = memoryview(data.reshape(-1).view(np.uint8))
        digest = hashlib.sha256()
        try:
            with temporary.open("wb", buffering=0) as out:
                for begin in range(0, len(content), _PIECE):
                    piece = content[begin : begin + _PIECE]
                    digest.update(piece)
                    while piece:
                        piece = piece[out.write(piece) :]
                os.fsync(out.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)
        return ChunkFile(file, len(content), digest.hexdigest())


def _check_names(names: Mapping[str, Any]) -> None:
    inner: set[str] = set()
    for name in names:
        parts = name.split("/")
        if not all(map(_COMPONENT.fullmatch, parts)) or len(name) > _MAX_NAME:
            raise ValueError(
                f"{name[:_MAX_NAME]!a} cannot be the name of an array; it must be of at most "
                f"{_MAX_NAME} letters, digits, '_' and '-', with '/' between the parts"
            )
        if name in _RESERVED:
            raise ValueError(f"{name!r} is the name of a file of Orbax; rename the array")
        inner |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    for name in sorted(inner & names.keys()):
        raise ValueError(f"{name} is an array and a folder of arrays; rename one of them")


def _check_layout(name: str, layout: ArrayLayout) -> None:
    if layout.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {layout.dtype!r}; supported are {', '.join(DTYPES)}")
    if any(size < 1 for size in layout.shape):
        raise ValueError(f"{name} has shape {layout.shape}; Orbax stores no empty arrays")
    fits = len(layout.chunk) == len(layout.shape) and all(
        1 <= step <= size for step, size in zip(layout.chunk, layout.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {layout.shape}, which has no chunk {layout.chunk}")


def _zarray(layout: ArrayLayout) -> bytes:
    """The description of an array in the words and the order of tensorstore."""
    fields = {
        "chunks": layout.chunk,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": zarr2_dtype(layout.dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": layout.shape,
        "zarr_format": 2,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _tree_metadata(arrays: Mapping[str, ArrayLayout]) -> dict[str, Any]:
    tree = {}
    for parts in sorted(tuple(name.split("/")) for name in arrays):
        tree[str(parts)] = {
            "key_metadata": [{"key": part, "key_type": 2} for part in parts],  # 2: of a dict
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode()
