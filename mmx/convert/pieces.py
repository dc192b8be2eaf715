"""The bytes of a conversion, a piece at a time: read from the source, cast, and laid out anew.

A piece is a chunk of an Orbax array, or a range of bytes of a tensor in a safetensors file. It says
beforehand how much memory making it takes; making is a function for any thread.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mmx.convert import decay_tables
from mmx.convert.chunks import DTYPES
from mmx.convert.mapping import Entry
from mmx.convert.plan import Plan, Tensor
from mmx.convert.source import CARRIED, Source, row_ranges
from mmx.convert.transposing import to_contiguous


@dataclass(frozen=True)
class Piece:
    """Some bytes of the output.

    Attributes:
      nbytes: of the result.
      memory: bytes it takes at most while it is made, the result included.
      make: returns the result, contiguous.
    """

    nbytes: int
    memory: int
    make: Callable[[], np.ndarray]


# ---------------------------------------------------------------- of safetensors


def tensor_pieces(plan: Plan, tensor: Tensor) -> Iterator[Piece]:
    """The bytes of a tensor of Hugging Face's forms, in their order."""
    if tensor.kind == "table":
        yield from _table_pieces(plan.source, tensor)
    for entry in tensor.entries:
        for rows in plan.source.pieces(entry):
            yield _rows_piece(plan.source, entry, rows, tensor.stored.dtype)


def carried_pieces(source: Source, key: str) -> Iterator[Piece]:
    """The bytes of a tensor that is carried as it is, in their order."""
    stored = source.carried[key]
    parts = row_ranges(stored.shape, stored.dtype.itemsize) if stored.shape else [None]
    for part in parts:
        index = () if part is None else (part,)
        rows = 1 if part is None else part.stop - part.start
        nbytes = rows * math.prod(stored.shape[1:]) * stored.dtype.itemsize
        yield Piece(nbytes, 2 * nbytes, _reading(source, key, index))


def _reading(source: Source, key: str, index: tuple[slice, ...]) -> Callable[[], np.ndarray]:
    return lambda: to_contiguous(source.read_carried(key, index))


def _rows_piece(source: Source, entry: Entry, rows: slice, dtype: np.dtype) -> Piece:
    items = (rows.stop - rows.start) * math.prod(entry.matrix[1:])

    def make() -> np.ndarray:
        return to_contiguous(source.read(entry, (rows,)).astype(dtype, order="K", copy=False))

    return Piece(items * dtype.itemsize, _memory(source, entry, items, dtype), make)


def _memory(source: Source, entry: Entry, items: int, dtype: np.dtype) -> int:
    """Peak of reading (an Orbax chunk is there twice), casting and turning over so many items."""
    stored = source.dtype(entry)
    held = items * stored.itemsize * (2 if source.form in ("orbax", "run") else 1)
    held += source.decoded(entry)
    return held + items * dtype.itemsize * (1 if stored == dtype else 2)


def _table_pieces(source: Source, tensor: Tensor) -> Iterator[Piece]:
    heads = source.config.num_heads
    nbytes = tensor.stored.nbytes // heads
    for head in range(heads):
        yield Piece(nbytes, 5 * nbytes, _table(source, *tensor.table, head))


def _table(source: Source, layer: int, name: str, head: int) -> Callable[[], np.ndarray]:
    return lambda: decay_tables.of_head(source.config, layer, name, head)


# ---------------------------------------------------------------- of Orbax


def chunk_piece(plan: Plan, tree: str, name: str, region: tuple[slice, ...]) -> Piece:
    """The part of an Orbax array that a chunk holds."""
    dtype = DTYPES[plan.trees[tree][name].dtype]
    shape = tuple(part.stop - part.start for part in region)
    nbytes = math.prod(shape) * dtype.itemsize
    if tree == CARRIED:
        return Piece(nbytes, 2 * nbytes, _reading(plan.source, name.replace("/", "."), region))
    source = plan.source
    entries = source.by_path[name]
    depth = len(entries[0].index)
    leading, inner = region[:depth], region[depth:]
    places = list(itertools.product(*(range(part.start, part.stop) for part in leading)))
    parts = {entry.index: entry for entry in entries}

    def make() -> np.ndarray:
        if len(places) == 1:
            return _param_part(source, parts[places[0]], inner, dtype).reshape(shape)
        buffer = np.empty(shape, dtype)
        for place in places:
            here = tuple(i - part.start for i, part in zip(place, leading, strict=True))
            buffer[here] = _param_part(source, parts[place], inner, dtype)
        return buffer

    items = math.prod(shape) // len(places)
    memory = max(_memory(source, parts[place], items, dtype) for place in places)
    if columns_cut(entries[0], inner):
        memory += items * source.dtype(entries[0]).itemsize
    return Piece(nbytes, memory + (nbytes if len(places) > 1 else 0), make)


def columns_cut(entry: Entry, region: tuple[slice, ...]) -> bool:
    """Whether a region takes a part of the matrix' columns."""
    box = entry.box(region)
    return len(box) == 2 and box[1] != slice(0, entry.matrix[1])


def _param_part(
    source: Source, entry: Entry, region: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """A region of a parameter's part, contiguous, in the output's dtype."""
    shape = tuple(part.stop - part.start for part in region)
    part = source.read(entry, entry.box(region)).astype(dtype, order="K", copy=False)
    return to_contiguous(entry.to_param(part, shape))
