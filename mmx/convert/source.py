"""A checkpoint of any form, opened by its headers: what is in it, and its parts by name.

`mmx.load`, `mmx convert` and `mmx verify` all read through this. A parameter's part is asked for by
an entry of the table in `mapping` and comes as the checkpoint's matrix, [out, in], in its stored
dtype, whatever the form: safetensors of Hugging Face, an Orbax folder of ours, or a training run.
"""

import fnmatch
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mmx import integrity
from mmx.config import ModelConfig
from mmx.convert.bounded import printable
from mmx.convert.checkpoint import (
    INDEX,
    SINGLE,
    read_json,
)
from mmx.convert.chunks import choose_chunk
from mmx.convert.mapping import Entry, Layout
from mmx.convert.safetensors_file import Limits
from mmx.convert.workplace import JOURNAL

Form = Literal["hf", "hf-released", "orbax", "run"]
PARAMS, CARRIED = "params", "carried"
CHECKPOINTS = "checkpoints"  # of a run
ALLOWED = "allowed to be there"  # why a tensor is dropped that --allow-extra names
PIECE = 64 << 20  # bytes that are read or written at once


@dataclass(frozen=True)
class Stored:
    """Dtype and shape of something stored."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_ranges(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Ranges of the first dimension, of at most `PIECE` bytes where a row has no more."""
    if 0 in shape:  # one of 2^59 empty rows is as empty
        yield slice(0, shape[0])
        return
    row = math.prod(shape[1:]) * itemsize
    rows = max(PIECE // row, 1)
    for begin in range(0, shape[0], rows):
        yield slice(begin, min(begin + rows, shape[0]))


def piece_bytes(entry: Entry, itemsize: int) -> int:
    """`PIECE`, or more where one step along the axis that is cut has more bytes."""
    step = math.prod(entry.shape) // max(entry.shape[entry.cut], 1) if entry.shape else 1
    return max(PIECE, step * itemsize)


def rows_at_once(entry: Entry, itemsize: int) -> int:
    """Rows of an entry's matrix that are at most `PIECE` bytes: as our Orbax chunks are cut.

    Args:
      entry: of any layout.
      itemsize: bytes of a stored item.
    """
    most = piece_bytes(entry, itemsize)
    chunk = choose_chunk(entry.shape, itemsize, stacked=0, max_bytes=most, cut=entry.cut)
    return chunk[entry.cut] * entry.row_unit


class Arrays(Protocol):
    """Where the bytes come from; the two kinds of store behind a source."""

    def dtype(self, entry: Entry) -> np.dtype: ...
    def rows(self, entry: Entry) -> int: ...
    def decoded(self, entry: Entry) -> int: ...  # bytes that any part of it takes to be read
    def read(self, entry: Entry, box: tuple[slice, ...]) -> np.ndarray: ...
    def read_carried(self, key: str, part: tuple[int | slice, ...]) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      folder: where it is.
      form: what it is.
      config: of the text model.
      fields: its config.json; None for a run.
      layout: how its experts are stored; 'separate' where the form has no say.
      prefix: of the text model's keys (VL-01), or nothing.
      entries: of each part of each parameter, (path, index), the entry with the source's own key.
      carried: what is no parameter and goes along: vision tensors, decay tables.
      dropped: tensors that go nowhere, and why.
      missing: keys that the config wants, that are not there, and that the caller allowed to miss.
      arrays: the store.
      files: everything that is read of it, for telling whether it has changed.
    """

    folder: Path
    form: Form
    config: ModelConfig
    fields: Mapping[str, Any] | None
    layout: Layout
    prefix: str
    entries: Mapping[tuple[str, tuple[int, ...]], Entry]
    carried: Mapping[str, Stored]
    dropped: Mapping[str, str]
    missing: tuple[str, ...]
    arrays: Arrays
    files: tuple[Path, ...] = field(default=(), repr=False)

    @functools.cached_property
    def by_path(self) -> dict[str, list[Entry]]:
        """The entries of each parameter that is there."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            groups.setdefault(entry.path, []).append(entry)
        return groups

    def has(self, entry: Entry) -> bool:
        """Whether the part of a parameter that an entry of any layout means is there."""
        return (entry.path, entry.index) in self.entries

    def dtype(self, entry: Entry) -> np.dtype:
        """The stored dtype of a part of a parameter."""
        return self.arrays.dtype(self.entries[entry.path, entry.index])

    def decoded(self, entry: Entry) -> int:
        """Bytes of memory that reading any part of it takes beside the part."""
        return self.arrays.decoded(self.entries[entry.path, entry.index])

    def pieces(self, entry: Entry) -> Iterator[slice]:
        """Ranges of rows of an entry's matrix that are best read at once."""
        end, rows = entry.matrix[0], self.arrays.rows(self.entries[entry.path, entry.index])
        for begin in range(0, end, rows):
            yield slice(begin, min(begin + rows, end))

    def read(self, entry: Entry, box: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a parameter as the checkpoint's matrix, or the rows and columns `box` of it.

        Memory in proportion to what is asked for; perhaps a view of another order.
        """
        return self.arrays.read(self.entries[entry.path, entry.index], box)

    def read_carried(self, key: str, part: tuple[int | slice, ...] = ()) -> np.ndarray:
        """A tensor that is no parameter, or the part that leading indices select."""
        return self.arrays.read_carried(key, part)

    def check(self) -> None:
        """Read the checkpoint against its digests, where it has any: of a run, or of ours.

        Raises:
          DamagedCheckpoint: a file is missing or changed.
        """
        if self.form == "run":
            integrity.verify(self.files[0], under=f"{PARAMS}/")
        elif (self.folder / integrity.MANIFEST).exists():
            integrity.verify(self.folder)


def is_run(folder: Path) -> bool:
    """A folder of checkpoints of our own; whoever has both means the Hugging Face one."""
    return (folder / CHECKPOINTS).is_dir() and not (folder / "config.json").exists()


def is_orbax(folder: Path) -> bool:
    """A folder converted to Orbax: parameters as a folder, and no safetensors."""
    return (folder / PARAMS).is_dir() and not any((folder / n).exists() for n in (INDEX, SINGLE))


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is, and the model it describes.

    Raises:
      ValueError: no config.json, or one that `ModelConfig.from_hf` refuses.
    """
    fields = read_json(folder, "config.json")
    try:
        return fields, ModelConfig.from_hf(fields)
    except ValueError as error:
        reason = printable(str(error).removeprefix("config.json: "))
        raise ValueError(f"{folder / 'config.json'}: {reason}") from None


def open_source(
    folder: Path,
    *,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    read_data: bool = True,
    limits: Limits | None = None,
) -> Source:
    """Open a checkpoint of any form; headers alone are read, but for the head of a tied model.

    Args:
      folder: of the checkpoint.
      allow_missing: patterns (as of a shell) of keys that need not be there.
      allow_extra: patterns of keys that may be there for nothing.
      read_data: compare the head of a tied model, where it is stored, with the embedding.
      limits: what the headers of safetensors files may ask for.

    Raises:
      ValueError: a form that is not known, a missing or unexpected tensor, a wrong shape or dtype;
        file, key and remedy are named.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a checkpoint is a folder with a config.json")
    allowed = Allowed(tuple(allow_missing), tuple(allow_extra), read_data, limits or Limits())
    if is_run(folder):
        from mmx.convert.source_orbax import open_run

        return open_run(folder, allowed)
    if (folder / JOURNAL).exists():
        raise ValueError(
            f"{folder}: holds an unfinished conversion; go on with it with the same command and "
            "--resume"
        )
    fields, config = read_config(folder)
    if is_orbax(folder):
        from mmx.convert.source_orbax import open_orbax

        return open_orbax(folder, fields, config, allowed)
    from mmx.convert.source_hf import open_hf

    return open_hf(folder, fields, config, allowed)


@dataclass(frozen=True)
class Allowed:
    """Patterns of keys that may be missing or superfluous, and what may be read."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    read_data: bool
    limits: Limits

    def may_miss(self, key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.missing)

    def may_have(self, key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.extra)


def require_sane(folder: Path, missing: int) -> None:
    """Refuse a config that asks for any number of tensors.

    Raises:
      ValueError: more are missing than a checkpoint may have.
    """
    if missing > Limits().tensors:
        raise ValueError(
            f"{folder}: more than {Limits().tensors:,} tensors that the config wants are missing; "
            "correct config.json"
        )


def some(keys: Sequence[str]) -> str:
    """The first of these keys and how many more, with the verb; for messages."""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{printable(keys[0])}{more} {'are' if more else 'is'}"
