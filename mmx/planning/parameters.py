"""Every parameter of a plan: its shape, the mesh axes over which it is split, bytes a device."""

from collections.abc import Sequence
from typing import Any

from rich.filesize import decimal

from mmx.planning.programs import Request, build
from sharding.rules import Row, names


def parameter_rows(ask: Request) -> list[Row]:
    """The parameters as the program holds them: in training fp32, in inference the weights' dtype.

    Raises:
      ValueError: sizes that the mesh cannot share evenly.
    """
    return [
        Row(entry.name, entry.shape, entry.sharding.spec, entry.device_bytes)
        for entry in build(ask).entries
        if entry.category == "parameters"
    ]


def parameter_lines(rows: Sequence[Row]) -> list[str]:
    """A table with a total, a parameter a line however narrow the screen is."""
    cells = [("parameter", "shape", "split over", "a device")]
    for row in rows:
        split = ", ".join(" x ".join(axes) or "-" for axes in _split(row))
        shape = ", ".join(map(str, row.shape))
        cells.append((row.name, shape, split, decimal(row.bytes_per_device)))
    cells.append(("all", "", "", decimal(sum(row.bytes_per_device for row in rows))))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for *words, size in cells:
        left = (word.ljust(width) for word, width in zip(words, widths, strict=False))
        lines.append("  ".join((*left, size.rjust(widths[-1]))))
    return lines


def parameters_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain values; `spec` has the mesh axes of each dimension."""
    return [
        {
            "name": row.name,
            "shape": list(row.shape),
            "spec": _split(row),
            "bytes_per_device": row.bytes_per_device,
        }
        for row in rows
    ]


def _split(row: Row) -> list[list[str]]:
    entries = (*row.spec, *(None,) * (len(row.shape) - len(row.spec)))
    return [list(names(entry)) for entry in entries]
