"""Are two checkpoints the same? Part by part, whatever their forms, in bounded memory."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmx.convert import mapping
from mmx.convert.mapping import Entry
from mmx.convert.source import Source, Stored, row_ranges


@dataclass(frozen=True)
class Difference:
    """One tensor that two checkpoints do not agree on.

    Attributes:
      key: its name in a checkpoint with separate experts.
      what: the disagreement in words.
      largest: the largest absolute difference of two elements; infinite where one is no number,
        None where there is nothing to subtract.
    """

    key: str
    what: str
    largest: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a comparison has come; yielded after each tensor."""

    bytes: int
    difference: Difference | None
    dtypes: tuple[str, str]


def differing_fields(one: Source, other: Source) -> list[str]:
    """The fields of the model's config with two values, as 'rope_theta: 10000.0 and 10000000.0'."""
    ours, theirs = vars(one.config), vars(other.config)
    return [f"{k}: {ours[k]!r} and {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]


def compare(one: Source, other: Source) -> Iterator[Progress]:
    """Read both, a piece of a tensor at a time, and compare every bit.

    Two dtypes are no difference where all values are equal. Parameters are compared whatever the
    experts' layout; tensors that are no parameters (vision model, decay tables) where both have
    them, and of the vision model also that both have them.
    """
    for entry in _union(one, other):
        sources = [source for source in (one, other) if source.has(entry)]
        if len(sources) < 2:
            where = sources[0].folder if sources else "neither"
            yield Progress(0, Difference(entry.key, f"only in {where}"), ("", ""))
            continue
        yield _compare_entry(one, other, entry)
    for key in sorted({*one.carried, *other.carried}):
        stored = [source.carried.get(key) for source in (one, other)]
        if None not in stored:
            yield _compare_carried(one, other, key)
        elif not _recomputed(key):
            where = one.folder if stored[0] is not None else other.folder
            yield Progress(0, Difference(key, f"only in {where}"), ("", ""))


def total_bytes(source: Source) -> int:
    """What `compare` reads of this side at most."""
    parts = sum(_size(entry) * source.dtype(entry).itemsize for entry in source.entries.values())
    return parts + sum(stored.nbytes for stored in source.carried.values())


def _size(entry: Entry) -> int:
    return int(np.prod(entry.matrix, dtype=np.int64))


def _recomputed(key: str) -> bool:
    """Decay tables follow from the config, and may be stored or not."""
    return mapping.BUFFERS.fullmatch(re.sub(f"^{mapping.VL_TEXT_PREFIX}", "", key)) is not None


def _union(one: Source, other: Source) -> Iterator[Entry]:
    """Every part of a parameter that either config asks for, under its separate expert's key."""
    seen = set()
    for source in (one, other):
        for entry in mapping.entries(source.config, "separate"):
            if (entry.path, entry.index) not in seen:
                seen.add((entry.path, entry.index))
                yield entry


def _compare_entry(one: Source, other: Source, entry: Entry) -> Progress:
    dtypes = one.dtype(entry).name, other.dtype(entry).name
    matrices = [s.entries[entry.path, entry.index].matrix for s in (one, other)]
    if matrices[0] != matrices[1]:
        what = f"shapes {matrices[0]} and {matrices[1]}"
        return Progress(0, Difference(entry.key, what), dtypes)
    found = _Found()
    for rows in one.pieces(entry):
        found.add(one.read(entry, (rows,)), other.read(entry, (rows,)))
    size = _size(entry) * one.dtype(entry).itemsize
    return Progress(size, found.difference(entry.key), dtypes)


def _compare_carried(one: Source, other: Source, key: str) -> Progress:
    ours, theirs = one.carried[key], other.carried[key]
    dtypes = ours.dtype.name, theirs.dtype.name
    if ours.shape != theirs.shape:
        what = f"shapes {ours.shape} and {theirs.shape}"
        return Progress(0, Difference(key, what), dtypes)
    found = _Found()
    for part in _parts(ours):
        found.add(one.read_carried(key, part), other.read_carried(key, part))
    return Progress(ours.nbytes, found.difference(key), dtypes)


def _parts(stored: Stored) -> Iterator[tuple[slice, ...]]:
    if not stored.shape:
        yield ()
        return
    for rows in row_ranges(stored.shape, stored.dtype.itemsize):
        yield (rows,)


class _Found:
    """The elements of a tensor that differ, added up over its pieces."""

    def __init__(self) -> None:
        self.count, self.total, self.largest = 0, 0, 0.0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        self.total += ours.size
        same = bits(ours) == bits(theirs) if ours.dtype == theirs.dtype else _equal(ours, theirs)
        if np.all(same):
            return
        self.count += ours.size - int(np.count_nonzero(same))
        with np.errstate(invalid="ignore", over="ignore"):
            gaps = np.abs(_wide(ours[~same]) - _wide(theirs[~same]))
        # A NaN is no number to subtract; two zeros of unequal sign differ by 0.
        largest = float(np.max(gaps))
        self.largest = max(self.largest, largest if np.isfinite(largest) else np.inf)

    def difference(self, key: str) -> Difference | None:
        if not self.count:
            return None
        what = f"{self.count:,} of {self.total:,} elements differ"
        return Difference(key, what, self.largest)


def bits(array: np.ndarray) -> np.ndarray:
    """The elements as integers, so that NaN equals itself and 0 differs from -0."""
    return array.view(f"u{array.dtype.itemsize}")


def _equal(ours: np.ndarray, theirs: np.ndarray) -> Any:
    one, other = _wide(ours), _wide(theirs)
    return (one == other) | (np.isnan(one) & np.isnan(other))


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)
