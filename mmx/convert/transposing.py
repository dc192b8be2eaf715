"""Copies of transposed arrays at the speed of memory rather than of cache misses.

numpy copies the transpose of a matrix of 2-byte items at 0.2 GB/s where a plain copy does 4: every
item it reads lies in another cache line. Here a block of rows is first woven into items of 8 bytes
(4 rows of 2 bytes) in the cache; the transpose then moves 8 bytes at a time. numpy releases the
interpreter's lock in both steps, so threads help.
"""

import itertools

import numpy as np

_WORD = np.dtype(np.uint64)
_ROWS, _COLUMNS = 512, 1024  # of a block: 1 MB of 2-byte items, which stays in the cache
_STRIP = 64  # rows at a time where no weaving is possible


def to_contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order: itself if it is, else a copy.

    Fast where one axis other than the last steps from item to item, as in transposed matrices and
    in what `reshape` makes of them by splitting axes; other arrays are copied by numpy.
    """
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy(out, array)
    return out


def copy(out: np.ndarray, array: np.ndarray) -> None:
    """Copy an array into another of its shape and dtype that is in C order.

    Raises:
      ValueError: another shape or dtype, or `out` is not in C order.
    """
    if out.shape != array.shape or out.dtype != array.dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} {out.shape}; it must be {array.dtype} {array.shape} in C order"
        )
    item = array.dtype.itemsize
    source = array.view(f"u{item}") if item in (1, 2, 4, 8) else array
    target = out.view(source.dtype)
    shape, strides = _merged(array.shape, array.strides)
    source = np.lib.stride_tricks.as_strided(source, shape, strides, writeable=False)
    target = target.reshape(shape)
    unit = next((axis for axis, stride in enumerate(strides) if stride == item), None)
    last = len(shape) - 1
    if unit is None or unit == last:
        np.copyto(target, source)
        return
    others = [
        range(n) if axis not in (unit, last) else [slice(None)] for axis, n in enumerate(shape)
    ]
    for index in itertools.product(*others):
        _transpose(target[index], source[index].T)


def _merged(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same items in the same order with as few axes as possible."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(size for size, _ in merged), tuple(stride for _, stride in merged)


def _transpose(out: np.ndarray, rows: np.ndarray) -> None:
    """out[m, n] = rows[n, m]; both have contiguous last axes."""
    n, m = rows.shape
    together = _WORD.itemsize // rows.dtype.itemsize  # rows woven into one word
    if together < 2 or n % together or out.strides[0] % _WORD.itemsize:
        for i in range(0, n, _STRIP):
            out[:, i : i + _STRIP] = rows[i : i + _STRIP].T
        return
    words = out.view(_WORD)
    woven = np.empty((min(_ROWS, n) // together, min(_COLUMNS, m), together), rows.dtype)
    for j in range(0, m, _COLUMNS):
        columns = slice(j, min(j + _COLUMNS, m))
        for i in range(0, n, _ROWS):
            end = min(i + _ROWS, n)
            block = woven[: (end - i) // together, : columns.stop - j]
            for k in range(together):
                block[:, :, k] = rows[i + k : end : together, columns]
            words[columns, i // together : end // together] = block.view(_WORD)[:, :, 0].T
