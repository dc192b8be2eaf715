"""A safetensors file written as a stream: all tensors are known beforehand, their bytes come after.

The header is that of the safetensors library to the byte, for the same order of tensors; the file
is a function of names, dtypes, shapes, metadata and values alone.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mmx.convert.bounded import printable
from mmx.convert.safetensors_file import (
    DTYPE_BITS,
    DTYPES,
    LENGTH,
    METADATA,
    Limits,
    valid_name,
)
from mmx.integrity import joined

_ALIGNMENT = 8  # of the data in the file
_IN_THREADS = 1 << 20  # bytes from which on a piece is worth another thread


@dataclass(frozen=True)
class WrittenShard:
    """A finished file: bytes, SHA-256, and that of each tensor's bytes by name.

    The first is of the digests of the header and of all tensors in their order, in hexadecimal, so
    that every byte is hashed once.
    """

    size: int
    sha256: str
    tensors: dict[str, str]


def aligned_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The names, large items before small ones and otherwise as they come.

    In this order every tensor begins at a multiple of its item's size, whatever the shapes.
    """
    return sorted(tensors, key=lambda name: -DTYPE_BITS[tensors[name][0]])


class ShardWriter:
    """Writes one file; an existing one of the name is overwritten.

    The header is written at once, then `write` takes the bytes of the tensors in their order.
    Digests are computed on the way, beside the writing.

    Args:
      path: the file.
      tensors: name -> (dtype, shape), in the order of the file.
      metadata: of the header; transformers wants a format.

    Raises:
      ValueError: a name, dtype or shape that the format or our reader refuses, or an order in which
        a tensor is not aligned to its items (see `aligned_order`).
      OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self._path = path
        self._tensors = dict(tensors)
        header, self._ends = _header(
            path, self._tensors, {"format": "pt"} if metadata is None else metadata
        )
        self._data = len(header)
        self._size = self._data + (self._ends[-1] if self._ends else 0)
        self._done = 0  # bytes of data
        self._current = 0  # the tensor that the next byte belongs to
        self._names = list(self._tensors)
        self._digests = {name: hashlib.sha256() for name in self._names}
        self._header = hashlib.sha256(header).hexdigest()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(path, flags, 0o644)
        self._pool: ThreadPoolExecutor | None = None
        try:
            self._put(memoryview(header))
        except BaseException:
            self.abandon()
            raise

    def write(self, array: np.ndarray) -> None:
        """Append the next bytes: part of a tensor, a whole one, or several.

        Args:
          array: values in the dtype of the tensor they belong to, or bytes (uint8). The buffer is
            free again when this returns.

        Raises:
          ValueError: another dtype, or more bytes than the tensors have; the file is spoilt then.
          OSError: the disk is full or fails.
        """
        piece = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        position = 0
        while position < len(piece):
            self._skip_finished()
            if self._current == len(self._names):
                raise ValueError(
                    f"{self._path}: {len(piece) - position:,} bytes more than its tensors have; "
                    "give each tensor once"
                )
            name = self._names[self._current]
            wanted = DTYPES[self._tensors[name][0]]
            if array.dtype not in (wanted, np.dtype(np.uint8)):
                raise ValueError(
                    f"{self._path}: {printable(name)} is {wanted}, and {array.dtype} was given; "
                    "cast it first"
                )
            here = piece[position : position + self._ends[self._current] - self._done]
            self._append(name, here)
            position += len(here)

    def close(self) -> WrittenShard:
        """Force the file to disk, and close it.

        Raises:
          ValueError: bytes are missing.
          OSError: the disk is full or fails.
        """
        self._skip_finished()
        try:
            if self._current != len(self._names):
                name = self._names[self._current]
                missing = self._size - self._data - self._done
                raise ValueError(
                    f"{self._path}: {missing:,} bytes are missing, from {printable(name)} on; "
                    "write them first"
                )
            os.fsync(self._handle)
        finally:
            self.abandon()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        whole = joined([self._header, *digests.values()])
        return WrittenShard(self._size, whole, digests)

    def abandon(self) -> None:
        """Let go of the file, finished or not; what is there of it stays."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abandon()

    def _skip_finished(self) -> None:
        while self._current < len(self._names) and self._done == self._ends[self._current]:
            self._current += 1

    def _append(self, name: str, piece: memoryview) -> None:
        if len(piece) < _IN_THREADS:
            self._digests[name].update(piece)
            self._put(piece)
        else:
            # hashlib and write both let go of the interpreter.
            self._pool = self._pool or ThreadPoolExecutor(1)
            hashing = self._pool.submit(self._digests[name].update, piece)
            try:
                self._put(piece)
            finally:
                hashing.result()
        self._done += len(piece)

    def _put(self, piece: memoryview) -> None:
        if self._handle < 0:
            raise ValueError(f"{self._path}: is closed; open another writer")
        while piece:
            piece = piece[os.write(self._handle, piece) :]


def _header(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> tuple[bytes, list[int]]:
    """The bytes before the data, and where each tensor ends in the data."""
    fields: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    ends: list[int] = []
    position = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in DTYPES:
            raise ValueError(
                f"{path}: {printable(name)} has dtype {printable(dtype)}; use one of "
                f"{', '.join(DTYPES)}"
            )
        if not valid_name(name) or name == METADATA or any(n < 0 for n in shape):
            raise ValueError(
                f"{path}: cannot hold a tensor {printable(name)} of shape {shape}; use a name "
                "that can be printed, and sizes >= 0"
            )
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        if position % DTYPES[dtype].itemsize and end > position:
            raise ValueError(
                f"{path}: {printable(name)} would not be aligned to its items; put tensors of "
                "large items first (aligned_order)"
            )
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        ends.append(position := end)
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    limits = Limits()
    if len(text) > limits.header_bytes or len(tensors) > limits.tensors:
        raise ValueError(
            f"{path}: a header of {len(text):,} bytes for {len(tensors):,} tensors is more than "
            f"is read again; use smaller shards"
        )
    return LENGTH.pack(len(text)) + text, ends
