"""Meshes of the eight CPU devices, rows that are packed every way, and what a program sends."""

import re
from collections import Counter

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

LENGTH = 64
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


def mesh(**axes: int) -> Mesh:
    """The first devices, along these axes."""
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def _row(*runs: tuple[int, int]) -> list[int]:
    ids = [i for i, count in runs for _ in range(count)]
    assert len(ids) == LENGTH
    return ids


# Shards of 8, 16 and 32 tokens begin at multiples of 8: borders inside, at and across them.
ROWS = np.array(
    [
        _row((1, 64)),
        _row((1, 16), (2, 16), (3, 32)),
        _row((1, 5), (2, 2), (3, 33), (4, 1), (5, 23)),
        _row((0, 20), (1, 44)),  # padding before, for whole shards
        _row((3, 30), (0, 34)),
        _row(
            (1, 6), (0, 37), (1, 7), (2, 8), (1, 6)
        ),  # a sample goes on after a pause; an id again
        [i % 2 for i in range(64)],
        _row((0, 64)),
        _row((7, 15), (0, 1), (2, 7), (0, 1), (2, 7), (0, 1), (1, 1), (9, 31)),  # falling ids
        list(range(1, 65)),
    ],
    np.int32,
)
# Samples are unbroken and their numbers rise.
PACKED_ROWS = ROWS[[0, 1, 2, 3, 4, 7, 9]]


def collectives(program: str) -> Counter:
    """(kind, dtype and shape of each result, whether in a loop) of a compiled program's text."""
    found, computation = Counter(), ""
    loops = set(re.findall(r"body=%?([\w.\-]+)", program))
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = head[1]
        if operation := re.search(rf"= (\S.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", operation[1])
            for dtype, shape in shapes:
                sizes = tuple(int(size) for size in shape.split(",") if size)
                found[operation[2], dtype, sizes, computation in loops] += 1
    return found


def total_bytes(sent: Counter) -> int:
    """Sum over the instructions, those in loops counted once."""
    return sum(BYTES[dtype] * int(np.prod(s)) * n for (_, dtype, s, _), n in sent.items())
