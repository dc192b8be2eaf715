"""One parameter out of a checkpoint: whole, or on each device of a mesh its share and no more.

A share is a box of the parameter. Of the checkpoint that part is read which fills it, a piece at a
time, so that the host holds a share and a piece, never a parameter that is split.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.convert.mapping import Entry
from mmx.convert.source import Source
from mmx.convert.transposing import to_contiguous
from mmx.nn.layers import ParamSpec
from mmx.nn.quantized import Int8, quantized
from sharding import Partition

_ALIGNMENT = 64  # bytes; XLA takes a host buffer over without a copy when it is aligned
# fp16 has no room for the activations of these models.
_HELD = {np.dtype(np.float16): np.dtype(np.float32)}

Box = tuple[slice, ...]  # with start and stop, one a dimension


@dataclass(frozen=True)
class Leaf:
    """A parameter as it is to be held.

    Attributes:
      name: its path.
      spec: its description.
      dtype: None is int8, with scales beside it.
      source, group: the checkpoint, and its entries that make up the parameter.
    """

    name: str
    spec: ParamSpec
    dtype: np.dtype | None
    source: Source
    group: list[Entry]

    def of_scale[T](self, sizes: tuple[T, ...], one: T) -> tuple[T, ...]:
        """A tuple with an entry a dimension, as it is for the scales of int8."""
        return tuple(one if axis in self.spec.inputs else x for axis, x in enumerate(sizes))


def stored_dtype(source: Source, group: list[Entry]) -> np.dtype:
    """What one array of all these is held in: of several stored dtypes the wider."""
    kinds = [_HELD.get(source.dtype(entry), source.dtype(entry)) for entry in group]
    return np.dtype(jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, kinds)))


def read_leaf(leaf: Leaf, partition: Partition | None) -> jax.Array | Int8:
    """The parameter, on the default device or spread over a mesh by its logical axes.

    Raises:
      ValueError: a size that the devices cannot share evenly; see `sharding.rules.spec`.
    """
    shape, axes = leaf.spec.shape, leaf.spec.axes
    if partition is None:
        whole = tuple(slice(0, size) for size in shape)
        return _joined([jnp.asarray(buffer) for buffer in read_share(leaf, whole)])
    shapes = [shape]
    shardings = [partition.sharding(axes, shape, name=leaf.name)]
    if leaf.dtype is None:
        shapes.append(leaf.of_scale(shape, 1))
        of_scale = leaf.of_scale(axes, None)
        shardings.append(partition.sharding(of_scale, shapes[1], name=leaf.name))
    # Of a mesh over several processes, each reads what its own devices hold.
    holders: dict[Box, list[Any]] = {}
    for device, index in shardings[0].addressable_devices_indices_map(shape).items():
        assert index is not None
        share = tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape, strict=True))
        holders.setdefault(share, []).append(device)
    held: list[list[jax.Array]] = [[] for _ in shapes]
    for share, devices in holders.items():
        for arrays, buffer in zip(held, read_share(leaf, share), strict=True):
            arrays += [jax.device_put(buffer, device) for device in devices]
        jax.block_until_ready(held)  # and the host lets go of it
    return _joined(
        [
            jax.make_array_from_single_device_arrays(*parts)
            for parts in zip(shapes, shardings, held, strict=True)
        ]
    )


def read_share(leaf: Leaf, share: Box) -> list[np.ndarray]:
    """A box of the parameter; of int8 the values and the scales of their channels."""
    shape = tuple(part.stop - part.start for part in share)
    if leaf.dtype is None:
        scales = _aligned(leaf.of_scale(shape, 1), np.dtype(np.float32))
        buffers = [_aligned(shape, np.dtype(np.int8)), scales]
    else:
        buffers = [_aligned(shape, leaf.dtype)]
    for entry in leaf.group:
        lead = len(entry.index)
        place = tuple(i - part.start for i, part in zip(entry.index, share, strict=False))
        if not all(0 <= i < n for i, n in zip(place, shape, strict=False)):
            continue
        wanted = share[lead:]
        first = wanted[entry.cut].start
        for rows in leaf.source.pieces(entry):
            region = _overlap(entry, rows, wanted)
            if region is None:
                continue
            cut = slice(region[entry.cut].start - first, region[entry.cut].stop - first)
            where = (*place, *(slice(None),) * entry.cut, cut)
            for buffer, part in zip(buffers, _read_region(leaf, entry, region), strict=True):
                buffer[where] = part
    return buffers


def _overlap(entry: Entry, rows: slice, wanted: Box) -> Box | None:
    """The wanted part of what these rows of the entry's matrix fill; None where there is none."""
    given, asked = entry.region(rows)[entry.cut], wanted[entry.cut]
    cut = slice(max(given.start, asked.start), min(given.stop, asked.stop))
    if cut.start >= cut.stop:
        return None
    return (*wanted[: entry.cut], cut, *wanted[entry.cut + 1 :])


def _read_region(leaf: Leaf, entry: Entry, region: Box) -> list[np.ndarray]:
    """What fills a region of an entry."""
    # Of a matrix rows and columns can be cut out; a scale is of all columns.
    able = (entry.cut,) if leaf.dtype is None else (0, entry.cut)
    box = tuple(
        part if axis in able or not entry.transpose else slice(0, size)
        for axis, (part, size) in enumerate(zip(region, entry.shape, strict=True))
    )
    inside = tuple(
        slice(None) if there == part else part for there, part in zip(box, region, strict=True)
    )
    shape = tuple(part.stop - part.start for part in box)
    read = leaf.source.read(entry, entry.box(box))
    if leaf.dtype is not None:
        return [entry.to_param(read, shape)[inside].astype(leaf.dtype, copy=False)]
    # A stored row is an output channel with all its inputs, so a piece stands for itself.
    piece = quantized(read, (1,))
    lead = len(leaf.spec.shape) - len(shape)
    one = tuple(axis + lead in leaf.spec.inputs for axis in range(len(shape)))
    of_scale = tuple(1 if is_input else n for n, is_input in zip(shape, one, strict=True))
    of_inside = tuple(
        slice(None) if is_input else part for part, is_input in zip(inside, one, strict=True)
    )
    return [
        to_contiguous(entry.to_param(piece.values, shape))[inside],
        to_contiguous(entry.to_param(piece.scale, of_scale))[of_inside],
    ]


def _joined(arrays: list[jax.Array]) -> jax.Array | Int8:
    return arrays[0] if len(arrays) == 1 else Int8(*arrays)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
