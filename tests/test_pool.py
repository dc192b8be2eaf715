"""Rows taken out of a pool and put back: bit for bit, nothing else touched, nothing moved twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import small_config

from mmx.inference import pool as pools
from mmx.inference.pool import PoolShape, init_pool, put_back, take_out

CONFIG = small_config("lls")


def random_pool(dtype):
    rng = np.random.default_rng(0)
    empty = init_pool(CONFIG, PoolShape(3, 40, 4, jnp.dtype(dtype)))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), empty)


def same(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize("number", [1, pools.MOVED, 2 * pools.MOVED + 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_a_row_comes_back_bit_for_bit_and_its_state_moves_once(number, dtype, monkeypatch):
    moved, programs = [], vars(pools).copy()
    for name in ("_read_state", "_write_state", "_read_pages", "_write_pages"):

        def counted(*arguments, name=name):
            moved.append(name)
            return programs[name](*arguments)

        monkeypatch.setattr(pools, name, counted)
    pool = random_pool(dtype)
    pages = np.random.default_rng(1).permutation(40).tolist()
    old, new = pages[:number], pages[20 : 20 + number]
    memory = take_out(pool, 1, old)
    same(memory.lightning_state, pool.lightning_states[:, 1])
    same(memory.keys, pool.key_pages[:, np.asarray(old)])
    same(memory.values, pool.value_pages[:, np.asarray(old)])
    wanted = dataclasses.replace(
        pool,
        lightning_states=pool.lightning_states.at[:, 2].set(pool.lightning_states[:, 1]),
        key_pages=pool.key_pages.at[:, np.asarray(new)].set(pool.key_pages[:, np.asarray(old)]),
        value_pages=pool.value_pages.at[:, np.asarray(new)].set(
            pool.value_pages[:, np.asarray(old)]
        ),
    )
    jax.tree.map(same, put_back(pool, memory, 2, new), wanted)
    groups = -(-number // pools.MOVED)
    assert moved == ["_read_state", *["_read_pages"] * groups, "_write_state",
                     *["_write_pages"] * groups]  # fmt: skip


def test_a_state_without_pages():
    pool = random_pool("float32")
    memory = take_out(pool, 0, [])
    assert memory.keys.shape[1] == 0
    same(put_back(pool, memory, 1, []).lightning_states[:, 1], memory.lightning_state)
