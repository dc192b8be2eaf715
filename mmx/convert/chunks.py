"""Arrays cut into chunks: how large a chunk is, and which part of the array it holds.

A chunk is a box of one size; the boxes at the end of a dimension that does not divide reach past
the array. Indices count chunks, dimension by dimension, in C order.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# The dtypes that both formats, Orbax's trees and safetensors, can hold.
DTYPES: dict[str, np.dtype] = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
        np.float16, ml_dtypes.bfloat16, np.float32, np.float64,
        ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
    )
}  # fmt: skip
_WASTE = 4  # times the smallest number of cuts that we make so that all chunks are alike


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """An array and the chunks it is stored in.

    Attributes:
      shape: of the array; () for a number.
      dtype: numpy's name of it, a key of `DTYPES`.
      chunk: shape of a chunk, one size a dimension.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one chunk."""
        return math.prod(self.chunk) * self.numpy_dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of chunks along each dimension."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True))

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """The index of every chunk, in C order."""
        return itertools.product(*map(range, self.grid))

    def region(self, index: tuple[int, ...]) -> tuple[slice, ...]:
        """The part of the array that a chunk holds.

        Raises:
          ValueError: there is no such chunk.
        """
        grid = self.grid
        if len(index) != len(grid) or any(not 0 <= i < n for i, n in zip(index, grid, strict=True)):
            raise ValueError(f"there is no chunk {index}; there are {grid}")
        return tuple(
            slice(i * step, min((i + 1) * step, size))
            for i, step, size in zip(index, self.chunk, self.shape, strict=True)
        )

    def touched(self, region: tuple[slice, ...]) -> tuple[range, ...]:
        """The indices of the chunks that hold a part of a region that is not empty."""
        return tuple(
            range(part.start // step, (part.stop - 1) // step + 1)
            for part, step in zip(region, self.chunk, strict=True)
        )


def choose_chunk(
    shape: tuple[int, ...],
    itemsize: int,
    *,
    stacked: int,
    max_bytes: int,
    divide: tuple[int, ...] = (),
    cut: int | None = None,
) -> tuple[int, ...]:
    """A chunk of at most `max_bytes`, one matrix of a stack or a whole number of parts of it.

    Args:
      shape: of the array, all sizes at least 1.
      itemsize: bytes an item.
      stacked: leading dimensions (superblock, expert) along which each index is a chunk of its own.
      max_bytes: limit of a chunk.
      divide: devices along each leading dimension; the shard of each is whole chunks.
      cut: the dimension that is cut first when a matrix is too large; None for the largest. Where
        the source is the transposed array, cutting its first dimension reads one range of bytes.

    Returns:
      The shape of the chunk. All chunks are alike except where that would take more than
      4 times the cuts needed, as of a prime number of rows; then the last is smaller.

    Raises:
      ValueError: an array without items; a size that does not divide by its devices; a limit below
        one item; more dimensions in `divide`, or another in `cut`, than there are.
    """
    _check_choice(shape, itemsize, stacked, max_bytes, divide, cut)
    devices = divide + (1,) * (len(shape) - len(divide))
    chunk = [
        1 if dim < stacked else _share(shape, dim, number) for dim, number in enumerate(devices)
    ]
    order = sorted(range(stacked, len(shape)), key=lambda dim: -chunk[dim])
    if cut is not None:
        order.remove(cut)
        order.insert(0, cut)
    for dim in order:
        needed = -(-math.prod(chunk) * itemsize // max_bytes)
        if needed <= 1:
            break
        chunk[dim] = _cut(chunk[dim], needed, even=devices[dim] > 1)
    return tuple(chunk)


def _check_choice(
    shape: tuple[int, ...],
    itemsize: int,
    stacked: int,
    max_bytes: int,
    divide: tuple[int, ...],
    cut: int | None,
) -> None:
    if any(size < 1 for size in shape):
        raise ValueError(f"an array of shape {shape} has no items; Orbax stores no empty arrays")
    if max_bytes < itemsize:
        raise ValueError(f"max_bytes is {max_bytes}; one item has {itemsize} bytes: raise it")
    if not 0 <= stacked <= len(shape):
        raise ValueError(f"stacked is {stacked}; the array has {len(shape)} dimensions")
    if len(divide) > len(shape):
        raise ValueError(f"divide is {divide}; the array has shape {shape}")
    if cut is not None and not stacked <= cut < len(shape):
        raise ValueError(f"cut is {cut}; it must be in [{stacked}, {len(shape)})")
    for dim, number in enumerate(divide):
        _share(shape, dim, number)


def _share(shape: tuple[int, ...], dim: int, devices: int) -> int:
    """The size of a device's part of a dimension."""
    size = shape[dim]
    if devices >= 1 and size % devices == 0:
        return size // devices
    nearest = min(_divisors(size), key=lambda number: (abs(number - devices), number))
    raise ValueError(
        f"dimension {dim} of {shape} does not divide by {devices} devices; the nearest number "
        f"that {size} divides by is {nearest}"
    )


def _divisors(size: int) -> list[int]:
    low = [number for number in range(1, math.isqrt(size) + 1) if size % number == 0]
    return sorted({*low, *(size // number for number in low)})


def _cut(size: int, needed: int, *, even: bool) -> int:
    """The size of one of at least `needed` parts; 1 if there cannot be so many."""
    if needed >= size:
        return 1
    parts = min(number for number in _divisors(size) if number >= needed)
    if even or parts <= _WASTE * needed:
        return size // parts
    return size // needed  # rounded down, so that a part is within the limit
