"""Writes to pages: in place, whatever their number, and the same alone as beside others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import small_config

from mmx.inference.decoding import decode
from mmx.inference.pool import PoolShape, init_pool
from mmx.inference.rows import empty_rows
from mmx.model import abstract_params
from sharding import paged


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_needs_no_room_for_the_pages(rows):
    """Else the compiler copies all keys and values at every step."""
    config = small_config("ls")
    shape = PoolShape(rows, 20_000, 16, jnp.dtype(jnp.float32))
    pool = jax.eval_shape(lambda: init_pool(config, shape))
    state = jax.eval_shape(lambda: empty_rows(config, rows, 16))
    params = abstract_params(config, dtype=jnp.float32)
    program = decode.lower(params, pool, state, config=config, steps=2).compile()
    stats = program.memory_analysis()
    assert stats is not None
    assert stats.temp_size_in_bytes < pool.key_pages.size * 4 / 50


@pytest.mark.parametrize("position", [-1, 0, 9])
def test_a_row_alone_writes_what_it_writes_beside_padding(position):
    rng = np.random.default_rng(0)
    new = rng.standard_normal((3, 1, 1, 2, 8)).astype(np.float32)
    pages = rng.standard_normal((2, 2, 5, 4, 2, 8)).astype(np.float32)
    table, positions = np.array([[4, 1, 3]], np.int32), np.array([[position]], np.int32)
    write = jax.jit(paged.write_and_attend)

    def beside(x, other):
        return np.concatenate([x, np.full_like(x, other)])

    two = (*(beside(x, 7) for x in new), *pages, beside(table, 0), beside(positions, -1))
    alone = write(*new, *pages, table, positions, np.int32(1))
    wanted = write(*two, np.int32(1))
    np.testing.assert_array_equal(alone[0], wanted[0][:1])
    for ours, theirs, old in zip(alone[1:], wanted[1:], pages, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (np.asarray(ours) != old).any() == (position >= 0)
