"""Paged attention: against a float64 definition, and bit for bit against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import TOLERANCE, check_close

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import xla

DTYPES = [jnp.float32, jnp.bfloat16]
both = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@functools.partial(jax.jit, static_argnames="implementation")
def attend(q, key_pages, value_pages, page_table, positions, implementation="xla"):
    return paged_attention(
        q, key_pages, value_pages, page_table, positions, implementation=implementation
    )


def case(positions, *, heads, kv_heads, dim, slots, dtype, page_dtype=None, spare=3, seed=0):
    """Arguments for these positions: pages in no order, what no row may read is NaN or no page."""
    rng = np.random.default_rng(seed)
    positions = np.asarray(positions, np.int32)
    lengths = positions.max(axis=1) + 1
    counts = -(-lengths // slots)
    order = rng.permutation(counts.sum() + spare)
    table = rng.integers(-(2**31), 2**31, (len(lengths), counts.max() + 2)).astype(np.int32)
    pages = rng.standard_normal((2, len(order), slots, kv_heads, dim))
    fresh = np.full(pages.shape[1:3], True)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count], order = order[:count], order[count:]
        for s in range(length):
            fresh[table[row, s // slots], s % slots] = False
    pages[:, fresh] = np.nan
    q = jnp.asarray(rng.standard_normal((*positions.shape, heads, dim)), dtype)
    keys, values = (jnp.asarray(p, page_dtype or dtype) for p in pages)
    return q, keys, values, jnp.asarray(table), jnp.asarray(positions)


def truth(q, keys, values, table, positions):
    """The definition in float64, one query and head at a time."""
    q, keys, values = (np.asarray(x).astype(np.float64) for x in (q, keys, values))
    table, positions = np.asarray(table), np.asarray(positions)
    slots, kv_heads = keys.shape[1:3]
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        s = np.arange(int(positions[b, t]) + 1)
        if s.size:
            where = table[b, s // slots], s % slots, h * kv_heads // q.shape[2]
            scores = keys[where] @ q[b, t, h] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ values[where]
    return out


# A row from its start, with padding on both sides; one far along, in no order; only padding; one
# key; ends of pages (4 slots) and of blocks (16 keys).
POSITIONS = [
    [-1, 0, 1, 2, 3, 4, -1],
    [70, 41, 9, -1, 71, 16, 15],
    [-1] * 7,
    [0, -1, -1, -1, -5, -1, -1],
    [3, 4, 15, 16, 31, 32, 47],
]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    ("slots", "dtype", "page_dtype"),  # blocks of 16, 15, 24 and 16 keys
    [
        (4, jnp.float32, jnp.float32),
        (5, jnp.bfloat16, jnp.bfloat16),
        (24, jnp.float32, jnp.bfloat16),
        (4, jnp.float32, jnp.float8_e4m3fn),
    ],
)
def test_equals_the_definition(monkeypatch, implementation, slots, dtype, page_dtype):
    monkeypatch.setattr(xla, "KEY_BLOCK", 16)
    monkeypatch.setattr(xla, "QUERY_BLOCK", 4)
    types = dict(dtype=dtype, page_dtype=page_dtype)
    arrays = case(POSITIONS, heads=6, kv_heads=2, dim=16, slots=slots, **types)
    out = paged_attention(*arrays, implementation=implementation)
    assert out.dtype == dtype
    wanted = truth(*arrays)
    check_close(out, wanted, TOLERANCE[dtype], implementation)
    assert np.all(np.asarray(out)[np.asarray(arrays[-1]) < 0] == 0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_scale_and_positions_past_the_table(implementation):
    q, keys, values, table, positions = case(
        [[7]], heads=2, kv_heads=1, dim=8, slots=4, dtype=jnp.float32
    )
    table = table[:, :2]
    call = functools.partial(paged_attention, q, keys, values, table, implementation=implementation)
    wanted = truth(3 * q, keys, values, table, positions)
    check_close(call(positions, scale=3 / np.sqrt(8)), wanted, TOLERANCE[jnp.float32], "scale")
    assert np.array_equal(call(positions + 1000), call(positions))


@both
def test_large_scores_and_blocks_of_real_size(dtype):
    """Weights from 1 to nothing, over three blocks, the last of which may outweigh the others."""
    q, *rest = case([[1300], [700]], heads=4, kv_heads=2, dim=64, slots=16, dtype=dtype)
    arrays = (20 * q, *rest)
    check_close(attend(*arrays), truth(*arrays), TOLERANCE[dtype], "large scores")


# ---------------------------------------------------------------- bit for bit


def bits(x):
    return np.asarray(x.astype(jnp.float32)).view(np.int32)


def last(lengths, queries):
    """Positions of the last queries of rows of these lengths."""
    return np.asarray(lengths)[:, None] + np.arange(-queries, 0)


# Sizes at which XLA on CPU adds in an order that varies with the batch, if the code leaves it open.
PLAIN = dict(heads=2, kv_heads=2, dim=64, slots=16)
SMALL = dict(heads=4, kv_heads=2, dim=64, slots=16)
WIDE = dict(heads=64, kv_heads=8, dim=128, slots=16)


@both
@pytest.mark.parametrize(
    ("shape", "queries"), [(PLAIN, 1), (SMALL, 1), (WIDE, 16)], ids=["plain", "small", "wide"]
)
def test_a_row_does_not_depend_on_the_batch(shape, queries, dtype):
    """Nor on its place in it, the length of the table, or blocks visited for longer rows."""
    lengths = [700, 1500, 90, 17, 512]
    q, keys, values, table, positions = case(last(lengths, queries), **shape, dtype=dtype)
    whole = bits(attend(q, keys, values, table, positions))
    longer = jnp.pad(table, ((0, 0), (0, 100)), constant_values=-7)
    for rows in (np.array([0]), np.array([3, 0, 4])):
        some = bits(attend(q[rows], keys, values, longer[rows], positions[rows]))
        assert np.array_equal(some, whole[rows]), rows


@both
def test_what_lies_beyond_a_row_is_without_influence(dtype):
    """Entries of the table and slots of pages that no query reaches: any number, NaN, infinity."""
    arrays = case(last([530, 3], 2), **SMALL, dtype=dtype, spare=5)
    q, keys, values, table, positions = arrays
    whole = bits(attend(*arrays))
    assert np.all(np.isfinite(whole.view(np.float32)))
    assert np.isnan(np.asarray(keys, np.float32)).any()
    beyond = jnp.arange(table.shape[1]) * 16 > positions.max(axis=1)[:, None]
    for filling, entry in ((np.inf, -1), (0, 0), (-np.inf, 2**31 - 1)):
        pages = (jnp.where(jnp.isnan(p), filling, p).astype(dtype) for p in (keys, values))
        other = attend(q, *pages, jnp.where(beyond, entry, table), positions)
        assert np.array_equal(bits(other), whole), (filling, entry)


@both
def test_calls_of_whole_query_blocks_equal_one_call(dtype):
    """One block of queries or several, the last of them padded: the products are the same."""
    q, *pages, table, positions = case(last([300, 700], 250), **WIDE, dtype=dtype)
    whole = bits(attend(q, *pages, table, positions))
    for part in (slice(0, 128), slice(122, 250)):
        some = bits(attend(q[:, part], *pages, table, positions[:, part]))
        assert np.array_equal(some, whole[:, part]), part


@both
def test_steps_of_one_query_are_close_to_one_call(dtype):
    """Not the same bits: XLA multiplies matrices of other shapes in another order."""
    q, *pages, table, positions = case(last([300, 700], 16), **SMALL, dtype=dtype)
    whole = attend(q, *pages, table, positions)
    steps = [attend(q[:, [t]], *pages, table, positions[:, [t]]) for t in range(16)]
    wanted = np.asarray(whole).astype(np.float64)
    check_close(jnp.concatenate(steps, axis=1), wanted, TOLERANCE[dtype] / 4, "steps")


# ---------------------------------------------------------------- work and memory


def test_blocks_follow_the_positions_without_another_program(monkeypatch):
    monkeypatch.setattr(xla, "KEY_BLOCK", 16)
    monkeypatch.setattr(xla, "QUERY_BLOCK", 4)
    visited, programs = [], []

    def gather(*args, original=xla.gather):
        jax.debug.callback(lambda: visited.append(1))
        return original(*args)

    monkeypatch.setattr(xla, "gather", gather)

    @jax.jit
    def program(*arrays):
        programs.append(1)
        return paged_attention(*arrays, implementation="xla")

    q, keys, values, table, _ = case(
        np.zeros((2, 8)), heads=1, kv_heads=1, dim=4, slots=4, dtype=jnp.float32
    )
    table = jnp.zeros((2, 40), jnp.int32)
    for first, second, blocks in [(-1, -1, 0), (0, -1, 1), (-1, 15, 1), (15, 16, 3), (99, 159, 17)]:
        positions = np.full((2, 8), -1, np.int32)
        positions[0, 3], positions[1, 5] = first, second  # in two blocks of queries
        visited.clear()
        jax.block_until_ready(program(q, keys, values, table, jnp.asarray(positions)))
        jax.effects_barrier()
        assert len(visited) == 2 * blocks, (first, second)  # keys and values
    assert len(programs) == 1


def test_memory_does_not_grow_with_the_length():
    """4 M keys, 8,192 queries; bf16 pages are cast to fp32 a block at a time."""
    shape = jax.ShapeDtypeStruct

    def temporary(queries, pages):
        kv = shape((pages, 64, 1, 16), jnp.bfloat16)
        table, positions = shape((1, pages), jnp.int32), shape((1, queries), jnp.int32)
        q = shape((1, queries, 2, 16), jnp.float32)
        memory = attend.lower(q, kv, kv, table, positions).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    long = temporary(8192, 2**16)
    inputs = 8192 * 2 * 16 * 4 + 2**16 * 4
    block = 128 * 2 * 512 * 4  # scores
    assert long < 3 * inputs + 8 * block, long
    # A decode step has one query, not a block of them.
    assert temporary(1, 16) < block, temporary(1, 16)


# ---------------------------------------------------------------- refusals

GOOD = dict(
    q=jnp.ones((2, 3, 4, 8)),
    key_pages=jnp.ones((5, 16, 2, 8)),
    value_pages=jnp.ones((5, 16, 2, 8)),
    page_table=jnp.ones((2, 6), jnp.int32),
    positions=jnp.ones((2, 3), jnp.int32),
)
BF16_Q = dict(q=jnp.ones((2, 3, 4, 8), jnp.bfloat16))
NO_PAGES = dict(key_pages=jnp.ones((0, 16, 2, 8)), value_pages=jnp.ones((0, 16, 2, 8)))
BAD = [
    (dict(q=jnp.ones((3, 4, 8))), r"q and key_pages have shapes \(3, 4, 8\) and \(5, 16, 2, 8\)"),
    (dict(key_pages=jnp.ones((5, 16, 2, 7))), r"key_pages has shape \(5, 16, 2, 7\); it must be"),
    (dict(key_pages=jnp.ones((5, 16, 8))), r"q and key_pages have shapes"),
    (dict(value_pages=jnp.ones((4, 16, 2, 8))), r"value_pages has shape .*must be \(5, 16, 2, 8\)"),
    (dict(page_table=jnp.ones((3, 6), jnp.int32)), r"page_table has shape .*must be \(2, 6\)"),
    (dict(page_table=jnp.ones((2, 0), jnp.int32)), r"page_table has shape .*must be \(2, 1\)"),
    (dict(page_table=jnp.ones((2,), jnp.int32)), r"page_table has shape \(2,\)"),
    (dict(positions=jnp.ones((2, 4), jnp.int32)), r"positions has shape .*must be \(2, 3\)"),
    (dict(positions=jnp.ones((2, 3))), "positions has dtype float32; it must be int32"),
    (dict(page_table=jnp.ones((2, 6), jnp.int8)), "page_table has dtype int8; it must be int32"),
    (dict(q=jnp.ones((2, 3, 3, 8))), "3 query heads are no multiple of 2 key heads"),
    (dict(q=jnp.ones((2, 3, 4, 8), int)), "q has dtype int32"),
    (dict(value_pages=jnp.ones((5, 16, 2, 8), jnp.bfloat16)), "dtypes disagree .*bfloat16"),
    (
        BF16_Q,
        "key_pages has dtype float32; q's is bfloat16, so it must be bfloat16 or float8_e4m3fn",
    ),
    (NO_PAGES, r"key_pages has shape \(0, 16, 2, 8\); no axis may be empty"),
    (dict(implementation="vllm"), "unknown implementation 'vllm'; choose None or one of .*'xla'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change, message):
    arguments = {**GOOD, **change}
    arrays = [arguments.pop(name) for name in GOOD]
    with pytest.raises(ValueError, match=rf"^paged_attention: {message}"):
        paged_attention(*arrays, **arguments)
