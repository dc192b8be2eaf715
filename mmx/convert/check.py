"""An output compared with its source: read back through the reader of its own form, bit for bit."""

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from mmx import integrity
from mmx.convert.compare import bits
from mmx.convert.mapping import Entry
from mmx.convert.plan import Plan
from mmx.convert.source import Source, open_source, row_ranges
from mmx.convert.stream import Machine

Verify = Literal["full", "sample", "none"]
_SHARE, _LEAST = 0.01, 16  # of the pieces, and pieces at least, that a sample reads
_COPIES = 4  # of a piece at once: both sides, cast and in another order


def check_output(plan: Plan, folder: Path, how: Verify, use: Machine) -> int:
    """Compare what was written with the source; returns how many pieces were read.

    Args:
      plan: of the conversion.
      folder: where the output is.
      how: 'full' reads all bytes against the manifest and all parts against the source; 'sample'
        sizes and about 1 % of the parts; 'none' nothing.
      use: threads and memory.

    Raises:
      ValueError: something differs; it is named.
    """
    if how == "none":
        return 0
    if how == "full":
        integrity.verify(folder)
    else:
        integrity.check_files(folder)
    allowed = ("*",) if plan.source.missing else ()
    output = open_source(folder, allow_missing=allowed)
    parts = list(_parts(plan.source, output))
    if how == "sample":
        draw = random.Random(str(plan.identity()))
        parts = draw.sample(parts, min(len(parts), max(_LEAST, round(_SHARE * len(parts)))))
    cost = max((_cost(plan.source, output, part) for part in parts), default=1)
    with ThreadPoolExecutor(max(1, min(use.workers, use.budget // max(cost, 1)))) as pool:
        for _ in pool.map(lambda part: _compare(plan.source, output, part, folder), parts):
            pass
    return len(parts)


type _Part = tuple[Entry | str, slice | None]


def _parts(source: Source, output: Source) -> Iterator[_Part]:
    for entry in source.entries.values():
        for rows in source.pieces(entry):
            yield entry, rows
    for key, stored in source.carried.items():
        if key in output.carried:
            ranges = row_ranges(stored.shape, stored.dtype.itemsize) if stored.shape else [None]
            for rows in ranges:
                yield key, rows


def _cost(source: Source, output: Source, part: _Part) -> int:
    what, rows = part
    if isinstance(what, Entry):
        shape, itemsize = what.matrix, max(s.dtype(what).itemsize for s in (source, output))
    else:
        shape, itemsize = source.carried[what].shape, source.carried[what].dtype.itemsize
    count = rows.stop - rows.start if rows else 1
    return _COPIES * count * math.prod(shape[1:]) * itemsize


def _compare(source: Source, output: Source, part: _Part, folder: Path) -> None:
    what, rows = part
    index = () if rows is None else (rows,)
    if isinstance(what, Entry):
        dtype = output.dtype(what)
        wanted = source.read(what, index).astype(dtype, order="K", copy=False)
        seen, name = output.read(what, index), f"{what.path} {list(what.index)}"
    else:
        wanted, seen = source.read_carried(what, index), output.read_carried(what, index)
        name = what
    if wanted.dtype != seen.dtype or not np.array_equal(bits(wanted), bits(seen)):
        raise ValueError(
            f"{folder}: {name} differs from {source.folder}, rows {rows and rows.start} on; "
            "check memory and disk, remove the folder and convert again"
        )
