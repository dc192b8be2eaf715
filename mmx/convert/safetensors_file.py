"""One file in the safetensors format, read strictly and within bounds.

A file is 8 bytes with the length of the header, the header (JSON: name -> dtype, shape and byte
range), and the data, which the ranges cover without gaps. Nothing is mapped into memory: a part
of a tensor is read by `pread` into a fresh array. `safetensors_writer` writes such files.
"""

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmx.convert.bounded import (
    JsonError,
    open_plain,
    parse_at,
    parse_member,
    printable,
    read_exactly,
    skip_space,
    walk_object,
)

# Every dtype of the format and its bits an item.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
# Those that can be read and written: all but the ones of less than a byte.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
        "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16,
        "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

METADATA = "__metadata__"
MAX_TENSOR_NAME = 1024  # characters
MAX_DIMENSIONS = 64  # numpy's own
_ENTRY = 4096  # characters of one tensor's description: 64 dimensions need 1,400
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_RANGES = re.compile(r'"data_offsets"\s*+:\s*+\[').finditer
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of a safetensors file says of a tensor.

    Attributes:
      file: where it is.
      dtype: the format's name, a key of `DTYPE_BITS`.
      shape: its dimensions.
      begin, end: the bytes of the file that hold it, counted from the beginning of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Limits:
    """What a header may ask for before it is refused.

    Attributes:
      header_bytes: length of the header.
      tensors: number of tensors; of a folder in all its files together.
      metadata_bytes: length of `__metadata__`.
    """

    header_bytes: int = 8 << 20
    tensors: int = 100_000
    metadata_bytes: int = 1 << 20


# ---------------------------------------------------------------- reading


def read_header(
    file: Path, limits: Limits | None = None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and its metadata.

    Stricter than the format: no name twice, no name that cannot be printed, no unknown field.

    Raises:
      ValueError: not a plain file, or anything at all is wrong with the header; nothing of the data
        is read.
    """
    limits = limits or Limits()
    handle = open_plain(file, missing="shard is missing; download it again")
    try:
        size = os.fstat(handle).st_size
        text, data = _header_text(handle, file, size, limits)
        return _parse_header(text, file, data, size, limits)
    except JsonError as error:
        raise _damaged(file, str(error)) from None
    except UnicodeDecodeError:
        raise _damaged(file, "its header is not UTF-8") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); check the file") from None
    finally:
        os.close(handle)


def valid_name(name: str) -> bool:
    """Whether we take a tensor of this name: it can be printed, and is not too long."""
    return name.isprintable() and 0 < len(name) <= MAX_TENSOR_NAME


def read_part(info: TensorInfo, part: tuple[int | slice, ...] = ()) -> np.ndarray:
    """A tensor, or the part of it that leading indices and slices select, in a fresh array.

    Args:
      info: from `read_header`.
      part: integers and slices of step 1, as numpy takes them.

    Raises:
      ValueError: the file is shorter than it was, or cannot be read; a dtype of less than a byte.
      IndexError: an integer out of range, or more of them than dimensions.
    """
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise ValueError(
            f"{info.file}: dtype {info.dtype} cannot be read; dequantize the checkpoint first"
        )
    ranges = [_range(item, size) for item, size in zip(part, info.shape, strict=False)]
    if len(part) > len(info.shape):
        raise IndexError(f"{len(part)} indices for a tensor of shape {info.shape}")
    kept = [end - begin for begin, end in ranges]
    shape = tuple(n for n, item in zip(kept, part, strict=True) if isinstance(item, slice)) + tuple(
        info.shape[len(part) :]
    )
    array = np.empty(shape, dtype)
    if array.size == 0:
        return array
    # A view of bytes; numpy's own dtypes and those of ml_dtypes alike.
    buffer = memoryview(array.reshape(-1).view(np.uint8))
    handle = open_plain(info.file, missing="is no longer there; download it again")
    try:
        done = 0
        for begin, length in _runs(ranges, info.shape, dtype.itemsize):
            piece = buffer[done : done + length]
            if read_exactly(handle, piece, info.begin + begin) != length:
                raise _damaged(info.file, "it has become shorter since its header was read")
            done += length
    except OSError as error:
        raise ValueError(
            f"{info.file}: cannot be read ({error.strerror}); check the disk"
        ) from None
    finally:
        os.close(handle)
    return array


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file}: not a whole safetensors file ({reason}); download it again")


def _header_text(handle: int, file: Path, size: int, limits: Limits) -> tuple[str, int]:
    """The header, and where the data begins."""
    prefix = bytearray(LENGTH.size)
    if read_exactly(handle, memoryview(prefix), 0) != len(prefix):
        raise _damaged(file, f"it has {size} bytes")
    (length,) = LENGTH.unpack(prefix)
    data = LENGTH.size + length
    if data > size:
        raise _damaged(file, f"a header of {length:,} bytes in a file of {size:,}")
    if length > limits.header_bytes:
        raise ValueError(
            f"{file}: its header has {length:,} bytes, and at most {limits.header_bytes:,} are "
            "read; download it again, or let mmx convert read more with --max-header"
        )
    header = bytearray(length)
    if read_exactly(handle, memoryview(header), LENGTH.size) != length:
        raise _damaged(file, "it became shorter while it was read")
    return header.decode("utf-8"), data


def _parse_header(
    text: str, file: Path, data: int, size: int, limits: Limits
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}

    def member(name: str, position: int) -> int:
        if name == METADATA:
            found, end = parse_member(text, position, most=limits.metadata_bytes, what=name)
            if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
                raise JsonError(f"{METADATA} must map names to texts")
            metadata.update(found)
            return end
        if len(tensors) == limits.tensors:
            raise JsonError(f"more than {limits.tensors:,} tensors")
        if not valid_name(name):
            raise JsonError(f"{printable(name)!r} is no name of a tensor")
        end = text.find("}", position, position + _ENTRY) + 1
        try:
            if end == 0:
                raise JsonError("it has no description")
            fields, length = parse_at(text[position:end], 0)
            tensors[name] = _tensor(fields, file, data, size)
        except JsonError as error:
            raise JsonError(f"{printable(name)}: {error}") from None
        return position + length

    # A valid header has one of these a tensor, and none else: where it says so at the first glance,
    # too many are refused before any is parsed.
    if sum(1 for _ in _RANGES(text)) > limits.tensors:
        raise JsonError(f"more than {limits.tensors:,} tensors")
    # Beside the tensors the metadata, and the first tensor too many, of which `member` complains.
    end = walk_object(text, 0, member, most=limits.tensors + 2, what="names")
    if skip_space(text, end) != len(text):
        raise JsonError("more text after the header's end")
    return _in_order(tensors, data, size), metadata


def _tensor(fields: Any, file: Path, data: int, size: int) -> TensorInfo:
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise JsonError("it must have a dtype, a shape and data_offsets, nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise JsonError(f"unknown dtype {printable(str(dtype))}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise JsonError(f"the shape {printable(str(shape))}")
    if not _is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise JsonError(f"the byte range {printable(str(offsets))}")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for dimension in shape:
        # Zeros count as one: numpy refuses an empty array whose other dimensions overflow.
        bits *= max(dimension, 1)
        if bits >> 63:
            raise JsonError(f"the shape {printable(str(shape))} is too large")
    if 0 in shape:
        bits = 0
    if 8 * (end - begin) != bits:
        raise JsonError(f"{end - begin:,} bytes for the shape {shape} of {dtype}")
    if data + end > size:
        raise JsonError(f"its bytes end at {data + end:,} in a file of {size:,}")
    return TensorInfo(file, dtype, tuple(shape), data + begin, data + end)


def _is_sizes(value: Any) -> bool:
    # bool is an int to Python; neither it nor a float is a size.
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110 - a generator would take half as long as the rest of the header
        if type(n) is not int or not 0 <= n < 1 << 63:
            return False
    return True


def _in_order(tensors: dict[str, TensorInfo], data: int, size: int) -> dict[str, TensorInfo]:
    """The tensors in the order of their bytes, which must cover the data without gaps."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = data
    for name, info in ordered.items():
        if info.begin != position:
            kind = "overlap those of another tensor" if info.begin < position else "follow a gap"
            raise JsonError(f"{printable(name)}: its bytes {kind}")
        position = info.end
    if position != size:
        raise JsonError(f"{size - position:,} bytes follow the last tensor")
    return ordered


def _range(item: int | slice, size: int) -> tuple[int, int]:
    if isinstance(item, slice):
        begin, end, step = item.indices(size)
        if step != 1:
            raise ValueError(f"a slice has step {step}; only 1 is supported")
        return begin, max(begin, end)
    if not -size <= item < size:
        raise IndexError(f"index {item} is out of range for a dimension of {size}")
    return item % size, item % size + 1


def _runs(
    ranges: list[tuple[int, int]], shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[int, int]]:
    """Offset and length, in bytes, of the contiguous runs that a part consists of, in order."""
    # Dimensions that are taken whole at the end of the part belong to the run.
    outer = len(ranges)
    while outer and ranges[outer - 1] == (0, shape[outer - 1]):
        outer -= 1
    if not outer:
        yield 0, math.prod(shape) * itemsize
        return
    inner = math.prod(shape[outer:]) * itemsize
    begin, end = ranges[outer - 1]
    strides = [math.prod(shape[i + 1 : outer]) * inner for i in range(outer - 1)]
    starts = [begin * inner]
    for (first, last), stride in reversed(list(zip(ranges, strides, strict=False))):
        starts = [n * stride + start for n in range(first, last) for start in starts]
    for start in starts:
        yield start, (end - begin) * inner
