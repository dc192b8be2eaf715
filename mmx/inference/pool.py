"""The memory of an engine: lightning states by row, keys and values in pages that rows take.

A row is a place in the batch of the decode program. Its lightning state lies at its number, fp32
and of one size whatever the length; its keys and values are in pages of `page_size` tokens, so a
sequence grows without a copy and without another program.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmx.config import ModelConfig
from mmx.inference.cache import kv_bytes_per_token, state_bytes
from sharding import Partition, constrain
from sharding.paged import PAGES

MOVED = 8  # pages copied between device and host at a time: one program for any number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The arrays; which row has which pages is the engine's to know.

    Attributes:
      lightning_states: of the lightning layers in order, R rows.
      key_pages, value_pages: of the softmax layers in order, P pages of S tokens.
    """

    lightning_states: Float[Array, "Ll R H K V"]
    key_pages: Float[Array, "Ls P S G K"]
    value_pages: Float[Array, "Ls P S G K"]

    @property
    def pages(self) -> tuple[Array, Array]:
        """Of keys and of values."""
        return self.key_pages, self.value_pages

    @property
    def page_size(self) -> int:
        return self.key_pages.shape[2]

    @property
    def num_pages(self) -> int:
        return self.key_pages.shape[1]


@dataclass(frozen=True)
class PoolShape:
    """Rows, pages of `page_size` tokens, and the dtype of keys and values."""

    rows: int
    pages: int
    page_size: int
    dtype: jnp.dtype


POOL = Pool(  # logical axes
    lightning_states=(None, None, "heads", None, None),  # pyright: ignore[reportArgumentType]
    key_pages=PAGES,  # pyright: ignore[reportArgumentType]
    value_pages=PAGES,  # pyright: ignore[reportArgumentType]
)


def init_pool(config: ModelConfig, shape: PoolShape, partition: Partition | None = None) -> Pool:
    """An empty pool, on the default device or spread over those of a partition."""
    softmax = config.layer_kinds.count("softmax")
    kv_shape = (softmax, shape.pages, shape.page_size, config.num_kv_heads, config.head_dim)
    return Pool(
        lightning_states=empty_states(config, shape.rows, partition),
        key_pages=_zeros(kv_shape, shape.dtype, PAGES, partition),
        value_pages=_zeros(kv_shape, shape.dtype, PAGES, partition),
    )


def spread(pool: Pool, partition: Partition | None) -> Pool:
    """Inside a program: the pool where it is kept between programs."""
    return jax.tree.map(lambda x, axes: constrain(x, *axes, partition=partition), pool, POOL)


def pool_bytes(config: ModelConfig, shape: PoolShape) -> int:
    """Bytes of such a pool."""
    a_token = kv_bytes_per_token(config, jnp.dtype(shape.dtype).itemsize)
    return shape.rows * state_bytes(config) + shape.pages * shape.page_size * a_token


@dataclass(frozen=True)
class RowMemory:
    """What a pool holds for one row, on the host.

    Attributes:
      lightning_state: of the lightning layers in order.
      keys, values: n pages of each softmax layer, in the order of the tokens.
    """

    lightning_state: Float[np.ndarray, "Ll H K V"]
    keys: Float[np.ndarray, "Ls n S G K"]
    values: Float[np.ndarray, "Ls n S G K"]


def take_out(pool: Pool, row: int, pages: list[int]) -> RowMemory:
    """A copy of the state of a row and of these pages."""
    state = np.asarray(_read_state(pool, np.int32(row)))
    layers, _, *rest = pool.key_pages.shape
    keys, values = (np.empty((layers, len(pages), *rest), x.dtype) for x in pool.pages)
    for begin in range(0, len(pages), MOVED):
        some = pages[begin : begin + MOVED]
        parts = jax.device_get(_read_pages(pool, _filled(some, 0)))
        for whole, part in zip((keys, values), parts, strict=True):
            whole[:, begin : begin + MOVED] = part[:, : len(some)]
    return RowMemory(state, keys, values)


def put_back(pool: Pool, memory: RowMemory, row: int, pages: list[int]) -> Pool:
    """The pool, which is donated, with that memory in a row and in as many pages, bit for bit."""
    pool = _write_state(pool, memory.lightning_state, np.int32(row))
    for begin in range(0, len(pages), MOVED):
        some = pages[begin : begin + MOVED]
        more = ((0, 0), (0, MOVED - len(some)), *((0, 0),) * 3)
        parts = (x[:, begin : begin + MOVED] for x in (memory.keys, memory.values))
        parts = tuple(np.pad(part, more) for part in parts)
        pool = _write_pages(pool, parts, _filled(some, pool.num_pages))  # the rest: nowhere
    return pool


def _filled(pages: list[int], filling: int) -> np.ndarray:
    return np.asarray(pages + [filling] * (MOVED - len(pages)), np.int32)


@jax.jit
def _read_state(pool: Pool, row) -> Array:
    return pool.lightning_states[:, row]


@jax.jit
def _read_pages(pool: Pool, pages) -> tuple[Array, ...]:
    return tuple(jnp.take(x, pages, axis=1) for x in pool.pages)


@functools.partial(jax.jit, donate_argnames="pool")
def _write_state(pool: Pool, state, row) -> Pool:
    states = pool.lightning_states.at[:, row].set(state)
    return dataclasses.replace(pool, lightning_states=states)


@functools.partial(jax.jit, donate_argnames="pool")
def _write_pages(pool: Pool, parts, pages) -> Pool:
    keys, values = (
        whole.at[:, pages].set(part, mode="drop")
        for whole, part in zip(pool.pages, parts, strict=True)
    )
    return dataclasses.replace(pool, key_pages=keys, value_pages=values)


def empty_states(
    config: ModelConfig, slots: int, partition: Partition | None = None
) -> Float[Array, "Ll slots H K V"]:
    """Room for the lightning states of so many rows or prefixes."""
    lightning = config.layer_kinds.count("lightning")
    heads, dim = config.num_heads, config.head_dim
    axes = (None, None, "heads", None, None)
    return _zeros((lightning, slots, heads, dim, dim), jnp.dtype(jnp.float32), axes, partition)


def _zeros(shape, dtype, axes, partition: Partition | None) -> Array:
    where = None if partition is None else partition.sharding(axes, shape, name="a pool")
    return jnp.zeros(shape, dtype, device=where)


@functools.partial(jax.jit, donate_argnames="states")
def keep_state(states: Array, pool: Pool, row, slot) -> Array:
    """The states with that of a row of the pool in a slot."""
    return states.at[:, slot].set(pool.lightning_states[:, row])


@functools.partial(jax.jit, donate_argnames="pool")
def begin_with_state(pool: Pool, states: Array, row, slot) -> Pool:
    """The pool with the state of a slot in a row."""
    new = pool.lightning_states.at[:, row].set(states[:, slot])
    return dataclasses.replace(pool, lightning_states=new)
