"""How large an engine is: the numbers it is asked for, checked, and those that follow from them."""

from dataclasses import dataclass

import jax.numpy as jnp

from mmx.config import ModelConfig
from mmx.inference.decoding import PADDED
from mmx.inference.pool import PoolShape
from sharding import Partition

_ROOM = 4096  # tokens a row that pages are for unless told
# K/V narrower than activations; fp8 has no scale, and is rounded to nearest within +-448.
NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn))


@dataclass(frozen=True)
class Sizes:
    """Of an `Engine`, whose arguments these are; what is None there is a number here.

    Attributes:
      row_pages: pages a row can have.
      max_seq_len: longest sequence there is room for, prompt and output.
      page_devices: devices that share the pages.
    """

    rows: int
    pages: int
    page_size: int
    row_pages: int
    max_seq_len: int
    chunk: int
    decode_steps: int
    snapshots: int
    kv_dtype: jnp.dtype
    page_devices: int

    @property
    def pool(self) -> PoolShape:
        return PoolShape(self.rows, self.pages, self.page_size, self.kv_dtype)


def sizes_of(
    config: ModelConfig,
    activations: jnp.dtype,
    *,
    rows: int = 8,
    pages: int | None = None,
    max_seq_len: int | None = None,
    page_size: int = 256,
    chunk: int = 2048,
    decode_steps: int = 4,
    kv_dtype: jnp.dtype | str | None = None,
    snapshots: int = 8,
    partition: Partition | None = None,
) -> Sizes:
    """The sizes of an engine with these arguments.

    Raises:
      ValueError: numbers that do not fit, another dtype, rules that split rows or their tokens.
    """
    asked = dict(rows=rows, pages=pages, page_size=page_size, decode_steps=decode_steps)
    for name, value in {**asked, "max_seq_len": max_seq_len}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if snapshots < 0:
        raise ValueError(f"snapshots is {snapshots}; it must be 0 or more")
    if chunk < PADDED[-1] or chunk & (chunk - 1):
        raise ValueError(f"chunk is {chunk}; it must be a power of two of at least {PADDED[-1]}")
    dtype = jnp.dtype(kv_dtype or activations)
    if dtype not in (activations, *NARROW):
        wanted = ", ".join(dict.fromkeys(str(x) for x in (activations, *NARROW)))
        raise ValueError(f"kv_dtype is {dtype}; it must be one of {wanted}")
    devices = 1
    if partition is not None:
        devices = partition.devices_of("pages")
        if partition.splits("batch", "seq"):
            raise ValueError(
                f"rules {partition.rules.name!r} split the rows of an engine or their tokens; take "
                "sharding.rules.SERVING on a mesh with data=1 and fsdp=1"
            )
    longest = min(max_seq_len or config.max_seq_len, config.max_seq_len)
    row_pages = -(-longest // page_size)
    if pages is None:
        pages = max(row_pages, -(-rows * _ROOM // page_size))
    pages = -(-pages // devices) * devices
    return Sizes(
        rows=rows,
        pages=pages,
        page_size=page_size,
        row_pages=row_pages,
        max_seq_len=min(longest, pages * page_size),
        chunk=chunk,
        decode_steps=decode_steps,
        snapshots=snapshots,
        kv_dtype=dtype,
        page_devices=devices,
    )
