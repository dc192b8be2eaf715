"""Paged attention on GPUs, few queries: the kernels in jax's interpreter; how work is shared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import interpreted_hopper
from kernel_cases import check_close
from test_paged_attention import attend, bits, case, truth

from mmx.config import preset
from pallas_kernels import dispatch, paged_attention, platform
from pallas_kernels.paged_attention import api, gpu_decode

# bf16 rounds at 2^-9 = 2e-3: the weights before their product, and the result.
TOLERANCE = 4e-3
# The interpreter multiplies with numpy, which says so when an operand is NaN; here some are.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


@pytest.fixture
def interpreted(monkeypatch):
    with interpreted_hopper(monkeypatch, cores=3, detect_races=True):
        yield


FP8 = dict(dtype=jnp.bfloat16, page_dtype=jnp.float8_e4m3fn)


def decode(q, keys, values, table, positions):
    return attend(q, keys, values, table, positions, implementation="pallas_gpu")


def check_decode(arrays, positions, capsys):
    """Against the definition, and without influence of what lies beyond a row; the output."""
    *pages, table, inside = arrays
    out = decode(*pages, table, positions)
    check_close(out, truth(*arrays), TOLERANCE, "output")
    assert np.all(np.asarray(out)[np.asarray(positions) < 0] == 0)
    q, keys, values = pages
    most = jnp.finfo(keys.dtype).max if keys.dtype == jnp.float8_e4m3fn else jnp.inf
    keys, values = (jnp.where(jnp.isnan(x), jnp.asarray(most, x.dtype), x) for x in (keys, values))
    beyond = jnp.arange(table.shape[1]) * keys.shape[1] > inside.max(axis=1)[:, None]
    other = decode(q, keys, values, jnp.where(beyond, -7, table), positions)
    assert np.array_equal(bits(other), bits(out))
    assert "RACE" not in capsys.readouterr().out


def test_one_query(interpreted, capsys):
    """Rows of no key, one, a tile of 64 less one and plus one, many tiles; of pages of 16 slots.

    Three workers a key head share 17 tiles, so two of them begin within the long row.
    """
    positions = [[-1], [0], [63], [-1], [64], [700], [127], [-1]]
    arrays = case(positions, heads=8, kv_heads=2, dim=64, slots=16, dtype=jnp.bfloat16)
    check_decode(arrays, arrays[-1], capsys)


@pytest.mark.parametrize("types", [dict(dtype=jnp.bfloat16), FP8], ids=["bf16", "fp8"])
def test_several_queries(interpreted, capsys, types):
    """In no order, with padding, past the table; one key head and 3 x 3 rows of a product.

    Of the first row some tiles are seen by all queries, by two and by one.
    """
    positions = [[383, 200, 199], [70, 3, -1], [-1, -1, -1], [-1, 127, 128]]
    *arrays, _ = case(positions, heads=3, kv_heads=1, dim=128, slots=128, **types)
    arrays[-1] = arrays[-1][:, :3]  # all of 384 keys
    beyond = np.where(np.equal(positions, 383), 9000, positions)
    check_decode([*arrays, jnp.asarray(positions)], jnp.asarray(beyond, jnp.int32), capsys)


def test_as_many_queries_as_a_product_has(interpreted, capsys):
    """64, of which merging reads one partial result at a time, here of four workers."""
    positions = [[*range(500, 508)], [3, *[-1] * 7]]
    arrays = case(positions, heads=8, kv_heads=1, dim=64, slots=64, dtype=jnp.bfloat16)
    check_decode(arrays, arrays[-1], capsys)


def test_fp8(interpreted, capsys):
    """The same rows; queries of very different sizes, which fp16 could not hold together."""
    positions = [[-1], [0], [63], [62], [64], [700], [127], [-1]]  # 62: all but one of a tile
    q, *rest = case(positions, heads=8, kv_heads=2, dim=128, slots=16, **FP8)
    sizes = jnp.exp2(jnp.arange(-30, 34, 8)[:, None]).astype(jnp.bfloat16)
    check_decode((q, *rest), rest[-1], capsys)
    check_decode((q * sizes, *rest), rest[-1], capsys)


def test_fp8_keeps_many_small_weights_together(interpreted):
    """A key in 64 weighs 1 and the others exp(-18): fp16 alone would take these for nothing."""
    q, keys, values, *rest = case([[700]], heads=1, kv_heads=1, dim=64, slots=64, **FP8)
    keys = jnp.full_like(keys, -1.125).at[:, 0].set(1.125)  # scores are 64 products over sqrt(64)
    arrays = (jnp.ones_like(q), keys, jnp.ones_like(values).at[:, 0].set(0), *rest)
    check_close(decode(*arrays), truth(*arrays), TOLERANCE, "output")


@pytest.mark.parametrize("workers", [1, 5, 33])
@pytest.mark.parametrize(
    "reach",
    [[-1], [0], [1_048_575], [-1, -1, 4095, -1, 63, 64, 1_000_000, -1], [511] * 64],
    ids=["none", "one", "long", "ragged", "equal"],
)
def test_every_tile_is_read_once_and_the_merging_knows_where(reach, workers):
    plan = jax.jit(gpu_decode._plan, static_argnums=1)
    work, rows = (np.asarray(x) for x in plan(jnp.asarray(reach, jnp.int32)[:, None], workers))
    tiles = -(-(np.asarray(reach) + 1) // gpu_decode.TILE)
    share = max(-(-tiles.sum() // workers), gpu_decode.MIN_SHARE)
    seen = [[] for _ in reach]
    places = {}
    for worker, (begin, count, row) in enumerate(work):
        assert count <= share
        index = 0
        while index < count:  # as the kernel goes
            first, end = rows[row, :2] - begin
            end = min(end, count)
            assert index < end
            seen[row] += range(index - first, end - first)
            assert places.setdefault(row + worker, (row, worker)) == (row, worker)
            index, row = end, rows[row, 3]
    assert seen == [list(range(n)) for n in tiles]
    assert rows[:, 6].tolist() == list(reach)  # seen by its one query
    for row, (*_, first_worker, number, _) in enumerate(rows):
        wanted = {(row, first_worker + i) for i in range(number)}
        assert {x for x in places.values() if x[0] == row} == wanted


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("queries", [8, 64])
def test_shared_memory_holds_the_ring(queries, dim, narrow):
    shape = gpu_decode._Shape(1, 8, dim, queries, 64, 256, 1.0, narrow)
    tile = gpu_decode.TILE * dim
    ring = 2 * tile * shape.slots * (1 if narrow else 2)
    barriers = (1 + 2 * shape.slots) * 8
    worker = ring + 2 * queries * (dim + gpu_decode.TILE) + barriers + gpu_decode.REDUCTION_MEMORY
    worker += 2 * tile if narrow else 0
    assert worker <= 227 * 1024  # the most of one
    assert shape.workers_a_core * (worker + 1024) <= 228 * 1024  # of a multiprocessor
    assert shape.slots >= 2


SPEC = jax.ShapeDtypeStruct
MODELS = {name: preset(name) for name in ("bench-4b", "minimax-text-01")}


def arguments(config, rows, queries, reach, slots=256, dtype=jnp.bfloat16, page_dtype=None):
    """Shapes of the arguments of a layer whose rows reach so far, in a pool of ten layers."""
    pages = 10 * rows * reach // slots
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    return (
        SPEC((rows, queries, heads, dim), dtype),
        *(SPEC((pages, slots, kv_heads, dim), page_dtype or dtype) for _ in range(2)),
        SPEC((rows, reach // slots), jnp.int32),
        SPEC((rows, queries), jnp.int32),
    )


@pytest.mark.parametrize("types", [dict(), FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("rows", "queries", "reach"), [(1, 1, 4 << 20), (64, 1, 1 << 20), (8, 4, 32_768)]
)
def test_kernels_lower_for_cuda(config, rows, queries, reach, types):
    arrays = arguments(config, rows, queries, reach, **types)
    program = jax.jit(functools.partial(gpu_decode.paged_attention, scale=0.1))
    text = program.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2  # attend, merge


def test_other_shapes_lower_for_cuda():
    config = MODELS["bench-4b"]
    for dim, slots, types in (
        (64, 16, {}), (192, 32, {}), (256, 64, {}), (64, 16, FP8), (192, 32, FP8), (256, 64, FP8)
    ):  # fmt: skip
        *arrays, table, positions = arguments(config, 2, 1, 1024, slots, **types)
        arrays = (SPEC((*x.shape[:-1], dim), x.dtype) for x in arrays)
        program = jax.jit(functools.partial(gpu_decode.paged_attention, scale=0.1))
        program.trace(*arrays, table, positions).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("rows", "queries", "types", "capability", "name"),
    [
        (64, 1, dict(), (9, 0), "pallas_gpu"),
        (1, 8, dict(), (9, 0), "pallas_gpu"),
        (1, 9, dict(), (9, 0), "cudnn"),
        (1, 8192, dict(), (9, 0), "cudnn"),
        (1, 8192, FP8, (9, 0), "cudnn"),
        (64, 1, FP8, (9, 0), "pallas_gpu"),
        (64, 1, dict(), (8, 0), "cudnn"),
        (64, 1, dict(dtype=jnp.float32), (9, 0), "xla"),
        (64, 1, dict(), None, "xla"),
    ],
)
def test_the_choice(rows, queries, types, capability, name, monkeypatch):
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: capability)
    arrays = arguments(MODELS["minimax-text-01"], rows, queries, 4096, **types)
    chosen = dispatch.select("", api.IMPLEMENTATIONS, None, *arrays, scale=1.0)
    assert chosen.name == name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(), "cpu: it is written for Hopper GPUs"),
        (dict(dtype=jnp.float32), "dtype float32: it must be bfloat16"),
        (dict(queries=0), r"empty queries, of shape \(1, 0, 16, 128\)"),
        (dict(queries=17), "17 queries of 4 heads a key head: at most 64 together"),
        (dict(slots=48), "pages of 48 slots: they must be 16, 32 or a multiple of 64"),
        (dict(dim=96), "head size 96: it must be a multiple of 64 and at most 256"),
        (dict(FP8, dim=320), "head size 320: it must be a multiple of 64 and at most 256"),
    ],
)
def test_refusals(change, reason, monkeypatch):
    change = dict(change)
    if change:
        monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    dim = change.pop("dim", 128)
    *arrays, table, positions = arguments(
        MODELS["bench-4b"], 1, change.pop("queries", 1), 480, change.pop("slots", 16), **change
    )
    arrays = [SPEC((*x.shape[:-1], dim), x.dtype) for x in arrays]
    arrays = [jnp.zeros(x.shape, x.dtype) for x in (*arrays, table, positions)]
    with pytest.raises(NotImplementedError, match=reason):
        paged_attention(*arrays, implementation="pallas_gpu")
