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
from mmx.convert import mapping
from mmx.convert.bounded import printable
from mmx.convert.checkpoint import (
    INDEX,
    SINGLE,
    SUPPORTED_DTYPES,
    SafetensorsFolder,
    read_json,
)
from mmx.convert.chunks import choose_chunk
from mmx.convert.hf_config import TRANSFORMERS_TYPE
from mmx.convert.mapping import Entry, Layout
from mmx.convert.safetensors_file import DTYPES

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
    row = max(math.prod(shape[1:]) * itemsize, 1)
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
        """Read the checkpoint against its digests, where its form promises that: of a run.

        Raises:
          DamagedCheckpoint: a file is missing or changed.
        """
        if self.form == "run":
            integrity.verify(self.files[0], under=f"{PARAMS}/")


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
) -> Source:
    """Open a checkpoint of any form; headers alone are read, but for the head of a tied model.

    Args:
      folder: of the checkpoint.
      allow_missing: patterns (as of a shell) of keys that need not be there.
      allow_extra: patterns of keys that may be there for nothing.
      read_data: compare the head of a tied model, where it is stored, with the embedding.

    Raises:
      ValueError: a form that is not known, a missing or unexpected tensor, a wrong shape or dtype;
        file, key and remedy are named.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a checkpoint is a folder with a config.json")
    allowed = Allowed(tuple(allow_missing), tuple(allow_extra), read_data)
    if is_run(folder):
        from mmx.convert.source_orbax import open_run

        return open_run(folder, allowed)
    fields, config = read_config(folder)
    if is_orbax(folder):
        from mmx.convert.source_orbax import open_orbax

        return open_orbax(folder, fields, config, allowed)
    return _open_hf(folder, fields, config, allowed)


@dataclass(frozen=True)
class Allowed:
    """Patterns of keys that may be missing or superfluous, and whether data may be read."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    read_data: bool

    def may_miss(self, key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.missing)

    def may_have(self, key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.extra)


# ---------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class _Safetensors:
    folder: SafetensorsFolder

    def dtype(self, entry: Entry) -> np.dtype:
        return DTYPES[self.folder.tensors[entry.key].dtype]

    def rows(self, entry: Entry) -> int:
        return rows_at_once(entry, self.dtype(entry).itemsize)

    def read(self, entry: Entry, box: tuple[slice, ...]) -> np.ndarray:
        return self.folder.read(entry.key, entry.locate(box))

    def read_carried(self, key: str, part: tuple[int | slice, ...]) -> np.ndarray:
        return self.folder.read(key, part)


def _open_hf(folder: Path, fields: dict[str, Any], config: ModelConfig, allowed: Allowed) -> Source:
    checkpoint = SafetensorsFolder(folder)
    names = _text_names(checkpoint)
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    layout: Layout = "fused" if fused else "separate"
    found, missing = _match(checkpoint, config, folder, names, layout, allowed)
    needed = {entry.key for entry in found.values()}
    carried: dict[str, Stored] = {}
    dropped: dict[str, str] = {}
    extra: list[str] = []
    for key in sorted(set(checkpoint.tensors) - needed):
        text = key.removeprefix(mapping.VL_TEXT_PREFIX)
        if mapping.BUFFERS.fullmatch(text) or (mapping.VL_VISION.match(key) and key not in names):
            carried[key] = _carried(checkpoint, key)
        elif _is_tied_head(checkpoint, key, config, allowed.read_data):
            dropped[key] = "the embedding again"
        elif allowed.may_have(key):
            dropped[key] = ALLOWED
        else:
            extra.append(key)
    if extra:
        raise ValueError(
            f"{checkpoint.tensors[extra[0]].file}: {some(extra)} unexpected; "
            "the config has no place for it: correct config.json or remove it"
        )
    prefixed = any(key.startswith(mapping.VL_TEXT_PREFIX) for key in needed)
    form = "hf" if fields.get("model_type") == TRANSFORMERS_TYPE else "hf-released"
    shards = sorted({info.file for info in checkpoint.tensors.values()})
    return Source(
        folder, form, config, fields, layout, mapping.VL_TEXT_PREFIX if prefixed else "", found,
        carried, dropped, tuple(missing), _Safetensors(checkpoint),
        (folder / "config.json", *shards),
    )  # fmt: skip


def _match(
    checkpoint: SafetensorsFolder,
    config: ModelConfig,
    folder: Path,
    names: Mapping[str, str],
    layout: Layout,
    allowed: Allowed,
) -> tuple[dict[tuple[str, tuple[int, ...]], Entry], list[str]]:
    """The entries of the tensors there are, and keys that are not and may miss."""
    found: dict[tuple[str, tuple[int, ...]], Entry] = {}
    missing: list[str] = []
    left_out: dict[str, None] = {}
    for entry in mapping.entries(config, layout):
        if entry.key in names:
            entry = mapping.with_key(entry, names[entry.key])
            _check(checkpoint, entry)
            found[entry.path, entry.index] = entry
        elif allowed.may_miss(entry.key):
            left_out[entry.key] = None
        else:
            missing.append(entry.key)
            if len(missing) > len(names):  # the config may ask for any number
                break
    if missing:
        raise ValueError(
            f"{folder}: {some(missing)} missing; the config wants it: download the checkpoint "
            "again, or correct config.json"
        )
    return found, list(left_out)


def _check(checkpoint: SafetensorsFolder, entry: Entry) -> None:
    info = checkpoint.tensors[entry.key]
    if info.shape != entry.key_shape:
        raise ValueError(
            f"{info.file}: {entry.key} has shape {info.shape}; the config wants {entry.key_shape}"
        )
    _check_dtype(checkpoint, entry.key)


def _check_dtype(checkpoint: SafetensorsFolder, key: str) -> None:
    info = checkpoint.tensors[key]
    if info.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{info.file}: {key} has dtype {info.dtype}; supported are "
            f"{', '.join(SUPPORTED_DTYPES)}: dequantize the checkpoint first"
        )


def _carried(checkpoint: SafetensorsFolder, key: str) -> Stored:
    info = checkpoint.tensors[key]
    # One of less than a byte an item cannot be read; mmx.load reads none of these.
    return Stored(DTYPES.get(info.dtype, np.dtype(np.void)), info.shape)


def _text_names(checkpoint: SafetensorsFolder) -> dict[str, str]:
    """Names of the text model's tensors without VL-01's prefix -> names in the checkpoint."""
    prefix = mapping.VL_TEXT_PREFIX
    if not any(key.startswith(prefix) for key in checkpoint.tensors):
        return {key: key for key in checkpoint.tensors}
    names: dict[str, str] = {}
    for key in sorted(checkpoint.tensors):
        if mapping.VL_VISION.match(key):
            continue
        short = key.removeprefix(prefix)
        if short in names:
            raise ValueError(
                f"{checkpoint.tensors[key].file}: {short} is there with and without the prefix "
                f"{prefix!r}; remove one of the two"
            )
        names[short] = key
    return names


def _is_tied_head(
    checkpoint: SafetensorsFolder, key: str, config: ModelConfig, read_data: bool
) -> bool:
    """Whether a tensor is the head of a tied model, which says the embedding again."""
    if not config.tie_embeddings or not key.endswith("lm_head.weight"):
        return False
    embedding = key.replace("lm_head.weight", "model.embed_tokens.weight")
    if embedding not in checkpoint.tensors:
        return False
    for name in (key, embedding):
        _check_dtype(checkpoint, name)
    head, table = checkpoint.tensors[key], checkpoint.tensors[embedding]
    rows = row_ranges(table.shape, DTYPES[table.dtype].itemsize)
    same = head.shape == table.shape and all(
        np.array_equal(checkpoint.read(key, (part,)), checkpoint.read(embedding, (part,)))
        for part in (rows if read_data else ())
    )
    if not same:
        raise ValueError(
            f"{head.file}: {key} differs from {embedding}, but the config says "
            "tie_word_embeddings; set it to false"
        )
    return True


def some(keys: Sequence[str]) -> str:
    """The first of these keys and how many more, with the verb; for messages."""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{printable(keys[0])}{more} {'are' if more else 'is'}"
