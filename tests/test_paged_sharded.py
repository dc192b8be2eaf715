"""Pages over devices: output and pages are those of one device, for pages dealt out in turn."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import xla
from sharding import MeshConfig, Partition, make_mesh, paged
from sharding.rules import SERVING, TENSOR

SLOTS, LAYERS, HEADS, KV_HEADS, DIM = 4, 2, 8, 4, 16
# The first and last keys of pages, of a device's turn, of blocks; padding; rows of nothing and of
# one key, which most devices see nothing of.
POSITIONS = np.array(
    [[-1, 0, 1, 3], [67, 68, 69, 70], [-1] * 4, [0, -1, -1, -1], [15, 16, 31, 32]], np.int32
)
LENGTHS = POSITIONS.max(axis=1) + 1


def partition(rules=SERVING, **sizes):
    sizes = {"fsdp": 1, **sizes}
    devices = jax.devices()[: math.prod(sizes.values())]
    return Partition(make_mesh(MeshConfig(**sizes), devices), rules)


def case(devices, dtype, queries=4):
    """Arguments; page n of a row is one of the n mod devices-th share of all."""
    rng = np.random.default_rng(0)
    share = 40 // devices
    free = [list(rng.permutation(share) + d * share) for d in range(devices)]
    table = rng.integers(-(2**31), 2**31, (len(LENGTHS), 20)).astype(np.int32)
    pages = np.full((2, LAYERS, 40, SLOTS, KV_HEADS, DIM), np.nan)
    for row, length in enumerate(LENGTHS):
        for n in range(-(-length // SLOTS)):
            table[row, n] = free[n % devices].pop()
            held = min(SLOTS, length - n * SLOTS)
            pages[:, :, table[row, n], :held] = rng.standard_normal(
                (2, LAYERS, held, KV_HEADS, DIM)
            )
    q, k, v = (
        jnp.asarray(rng.standard_normal((len(LENGTHS), 4, heads, DIM))[:, -queries:], dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    keys, values = (jnp.asarray(p, dtype) for p in pages)
    return q, k, v, keys, values, jnp.asarray(table), jnp.asarray(POSITIONS[:, -queries:])


@functools.partial(jax.jit, static_argnames=("partition", "implementation"))
def run(*arrays, partition=None, implementation=None):
    return paged.write_and_attend(
        *arrays, np.int32(1), partition=partition, implementation=implementation
    )


CASES = {
    "pages 4": dict(seq=4),
    "pages 2, heads 2": dict(seq=2, tensor=2),
    "heads 4": dict(tensor=4),
    "pages 2, heads over two axes": dict(seq=2, expert=2, tensor=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "queries"), [(jnp.float32, 4), (jnp.bfloat16, 1)])
def test_output_and_pages_are_those_of_one_device(monkeypatch, name, dtype, queries):
    monkeypatch.setattr(xla, "KEY_BLOCK", 16)
    spread = partition(**CASES[name])
    devices = spread.devices_of("pages")
    arrays = case(devices, dtype, queries)
    out, *pages = run(*arrays)
    seen, *held = run(*arrays, partition=spread)
    # What is added up in another order: at most 70 weights that sum to 1, of values below 4. In
    # bf16 weights are rounded to 2^-9 before they multiply values, under another largest score.
    bar = 2e-6 if dtype == jnp.float32 else 2**-6
    np.testing.assert_allclose(
        np.asarray(seen, np.float64), np.asarray(out, np.float64), rtol=0, atol=bar
    )
    assert np.all(np.asarray(seen)[np.asarray(arrays[-1]) < 0] == 0)
    assert np.abs(np.asarray(out, np.float64)).max() > 1
    for ours, theirs in zip(held, pages, strict=True):
        # NaN where nobody has written.
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (ours, theirs)))
        share = ours.addressable_shards[0].data.shape
        assert share[1] == 40 // devices
        assert share[3] == KV_HEADS // spread.devices_of("kv_heads")


def test_each_device_reads_its_own_pages_alone(monkeypatch):
    """As many blocks as a row of a quarter of the length has, and nothing is gathered."""
    monkeypatch.setattr(xla, "KEY_BLOCK", 4)
    visited = []

    def gather(pages, numbers, dtype, original=xla.gather):
        jax.debug.callback(lambda: visited.append(pages.shape))
        return original(pages, numbers, dtype)

    monkeypatch.setattr(xla, "gather", gather)
    spread = partition(seq=4)
    program = jax.jit(functools.partial(paged.write_and_attend, partition=spread))
    jax.block_until_ready(program(*case(4, jnp.float32), np.int32(1)))
    jax.effects_barrier()
    # 71 keys are 18 pages: 5, 5, 4 and 4 of them, keys and values.
    assert visited == [(LAYERS * 10, SLOTS, KV_HEADS, DIM)] * 2 * (5 + 5 + 4 + 4)


def test_where_a_device_stands():
    """Against a list of the keys it has."""
    for devices, slots in ((1, 4), (3, 4), (4, 1), (2, 5)):
        positions = np.arange(-1, 60, dtype=np.int32)[None]
        for here in range(devices):
            keys = [s for s in range(60) if s // slots % devices == here]
            limits, ours = paged.local_positions(positions, slots, devices, np.int32(here))
            for p, limit, own in zip(positions[0], limits[0], ours[0], strict=True):
                assert limit == sum(s <= p for s in keys) - 1
                assert own == (keys.index(p) if p in keys else -1)


def test_fp8_pages_hold_the_nearest_and_never_overflow():
    new = jnp.asarray([1e9, -449.0, 448.0, 0.3, np.nan, 2**-10], jnp.float32)
    held = np.asarray(paged.as_held(new, jnp.float8_e4m3fn), np.float32)
    np.testing.assert_array_equal(held, [448, -448, 448, 0.3125, np.nan, 0])
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    error = np.abs(np.asarray(paged.as_held(x, jnp.float8_e4m3fn), np.float32) - x)
    assert (error <= np.maximum(np.abs(x) * 2**-4, 2**-10)).all()  # 3 bits, or half the smallest


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="attention to pages needs 'batch' and 'seq' whole"):
        run(*case(1, jnp.float32), partition=partition(TENSOR, data=2, tensor=2))
    with pytest.raises(ValueError, match="pages: 'pages' has size 40"):
        run(*case(1, jnp.float32), partition=partition(seq=3))
