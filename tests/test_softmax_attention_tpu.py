"""Splash attention in the TPU interpreter, and compiled for every TPU that libtpu knows."""

import math

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
import truth
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh
from kernel_cases import FP32, SOFTMAX_CASES, SoftmaxCase, _runs, check_close, check_softmax
from tpu_compiler import Compile, compile_for_every_tpu, needs_libtpu

from pallas_kernels.softmax_attention import tpu

# The kernels take queries that are already scaled, and give gradients of those: with a scale that
# is no power of two that makes two bf16 roundings more than the two that 4e-3 stands for.
TOLERANCE = {jnp.float32: FP32, jnp.bfloat16: 6e-3}
# The interpreter runs one key head of one row after the other, so there are few of them.
FEW = dict(heads=2, kv_heads=1)
SHARED = ("one_head_each", "packed_chunk_on_cache")
CASES = (
    # One block, its query heads below one another.
    *(case for case in SOFTMAX_CASES if case.name in SHARED),
    # Several blocks of 128.
    SoftmaxCase("stacked_blocks", 100, heads=3, kv_heads=1),
    SoftmaxCase("whole_blocks_not_causal", 256, causal=False, **FEW),
    SoftmaxCase("not_causal", 150, kv_length=200, causal=False, **FEW),
    SoftmaxCase("chunk_on_cache", 140, kv_length=400, q_offset=133, **FEW),
    # The first queries come before all keys, and so does a block of them.
    SoftmaxCase("before_the_keys", 200, kv_length=140, q_offset=-139, **FEW),
    SoftmaxCase(
        "packed",
        260,
        # Borders on block borders and off them.
        segments=(_runs((1, 50), (2, 78), (3, 128), (4, 1), (5, 3)),),
        value_dim=12,
    ),
    SoftmaxCase("padded", 200, segments=(_runs((0, 140), (1, 60)), _runs((0, 200))), **FEW),
)
RUNS = [(case, jnp.float32) for case in CASES]
RUNS += [(case, jnp.bfloat16) for case in CASES if case.name in (*SHARED, "packed", "padded")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK", 128)


def _plan(q, k, causal, scale=None):
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return tpu.Plan.make(q, k, causal=causal, scale=scale, interpret=True)


def _attend(
    q,
    k,
    v,
    *,
    causal,
    segment_ids=None,
    kv_segment_ids=None,
    q_offset=0,
    scale=None,
    return_lse=True,
    implementation=None,
):
    """What the public function does on a TPU."""
    del return_lse, implementation
    if kv_segment_ids is None and k.shape[1] == q.shape[1]:
        kv_segment_ids = segment_ids
    plan = _plan(q, k, causal, scale)
    return tpu._attend(plan, q, k, v, segment_ids, kv_segment_ids, jnp.asarray(q_offset, jnp.int32))


@pytest.mark.parametrize(
    ("case", "dtype"), RUNS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", None))
)
def test_equals_the_definition(monkeypatch, case, dtype):
    monkeypatch.setattr(kernel_cases, "softmax_attention", _attend)
    check_softmax(case, dtype, implementation=None, tolerance=TOLERANCE[dtype])


def _normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_ids_of_one_side_alone():
    q, k, v = _normal(0, (1, 40, 1, 8), (1, 60, 1, 8), (1, 60, 1, 8))
    ids = jnp.asarray([_runs((1, 20), (2, 10), (0, 10))])
    kv_ids = jnp.asarray([_runs((1, 30), (0, 30))])
    ones, kv_ones = jnp.ones_like(ids), jnp.ones_like(kv_ids)
    for some, full in (((ids, None), (ids, kv_ones)), ((None, kv_ids), (ones, kv_ids))):
        seen, wanted = (
            tpu._attend(_plan(q, k, causal=False), q, k, v, *pair, jnp.asarray(0))[0]
            for pair in (some, full)
        )
        np.testing.assert_array_equal(seen, wanted)
        assert np.any(np.asarray(seen) != 0)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_blocks_of_keys_sum_to_those_of_the_row(causal):
    length, heads, border = 200, 2, 130
    shapes = ((1, length, heads, 8), (1, length, 1, 8), (1, length, 1, 8), (1, length, heads, 8))
    q, k, v, grad_out = _normal(1, *shapes)
    ids = jnp.asarray([_runs((1, 90), (2, 100), (0, 10))])
    visible = np.asarray((ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None])
    if causal:
        visible = visible & np.tri(length, dtype=bool)
    true = truth.softmax_attention(q, k, v, visible, 8**-0.5, grad_out)
    out, lse = jnp.asarray(true.out, jnp.float32), jnp.asarray(true.lse, jnp.float32)

    grads = []
    for keys in (slice(0, border), slice(border, length)):
        offset = jnp.asarray(-keys.start, jnp.int32)
        plan = _plan(q, k[:, keys], causal)
        arrays = (q, k[:, keys], v[:, keys], ids, ids[:, keys], offset)
        grads.append(tpu._backward(plan, *arrays, out, lse, grad_out, None))
    check_close(grads[0][0] + grads[1][0], true.grad_q, FP32, "gradient to q")
    for which, wanted, name in ((1, true.grad_k, "k"), (2, true.grad_v, "v")):
        seen = jnp.concatenate([grad[which] for grad in grads], axis=1)
        check_close(seen, wanted, FP32, f"gradient to {name}")


def test_blocks_above_the_diagonal_are_not_visited():
    # NaN among the values reaches every query whose program multiplies with it, even by 0.
    length, offset = 256, 128
    q, k, v = _normal(2, (1, length, 1, 8), (1, 512, 1, 8), (1, 512, 1, 8))
    v = v.at[:, offset + length :].set(jnp.nan)
    run = jax.jit(lambda q, k, v, offset: _attend(q, k, v, causal=True, q_offset=offset))
    out, back = jax.vjp(lambda q, k: run(q, k, v, offset)[0], q, k)
    grad_q, grad_k = back(out)
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(grad_q))
    assert np.all(np.isfinite(grad_k))
    # One key further the last block is needed: the values do reach what visits them.
    assert np.any(np.isnan(run(q, k, v, offset + 1)[0]))


def test_a_table_of_blocks_that_is_too_large_is_left_out(monkeypatch):
    monkeypatch.setattr(tpu, "MAX_TABLE", 0)
    q, k, v = _normal(3, (1, 200, 2, 8), (1, 200, 1, 8), (1, 200, 1, 8))
    visible = np.tri(200, dtype=bool)[None]
    true = truth.softmax_attention(q, k, v, visible, 8**-0.5, q)
    (out, _), back = jax.vjp(lambda q, k, v: _attend(q, k, v, causal=True), q, k, v)
    grads = back((q, jnp.zeros((1, 200, 2))))
    for seen, wanted in zip((out, *grads), (true.out, *true[2:]), strict=True):
        check_close(seen, wanted, FP32, "output or gradient")


def test_rows_and_key_heads_are_mapped_over(monkeypatch):
    # On a TPU they are grid axes of one kernel, which only the older interpreter knows.
    monkeypatch.setattr(tpu, "_interpreter", lambda plan: True)
    q, k, v = _normal(4, (2, 140, 4, 8), (2, 140, 2, 8), (2, 140, 2, 8))
    ids = jnp.asarray([_runs((1, 60), (2, 80)), _runs((1, 120), (0, 20))])
    same = np.asarray((ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None])
    true = truth.softmax_attention(q, k, v, same & np.tri(140, dtype=bool), 8**-0.5, q)

    def attend(q, k, v):
        return tpu.softmax_attention(q, k, v, ids, ids, 0, causal=True, scale=8**-0.5)

    (out, _), back = jax.vjp(attend, q, k, v)
    grads = back((q, jnp.zeros(q.shape[:3])))
    for seen, wanted in zip((out, *grads), (true.out, *true[2:]), strict=True):
        check_close(seen, wanted, FP32, "output or gradient")


def _products(jaxpr):
    """The precision of every matrix product in a program and the kernels it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from _products(inner)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(jnp.float32, jax.lax.Precision.HIGHEST), (jnp.bfloat16, jax.lax.Precision.DEFAULT)],
)
@pytest.mark.parametrize("surrounding", ["default", "highest"])
def test_products_of_fp32_are_fp32(dtype, wanted, surrounding):
    # The interpreter multiplies exactly whatever is asked for, a TPU rounds fp32 to bf16.
    x = jnp.ones((1, 200, 2, 8), dtype)

    def forward_backward(q, k, v):
        def attend(q, k, v):
            return tpu.softmax_attention(q, k, v, None, None, 0, causal=True, scale=1.0)

        results, back = jax.vjp(attend, q, k, v)
        return back(results)

    with jax.default_matmul_precision(surrounding):
        program = jax.make_jaxpr(forward_backward)(x, x, x)
    seen = list(_products(program.jaxpr))
    assert len(seen) >= 9  # two forward, four for keys and values, three for queries
    assert set(seen) == {(wanted, wanted)}


def test_what_is_unsupported():
    def unsupported(dtype=jnp.bfloat16, key_dim=128):
        x = jax.ShapeDtypeStruct((1, 8, 4, key_dim), dtype)
        return tpu.unsupported(x, x, x, None, None, 0, causal=True, scale=1.0)  # pyright: ignore

    assert "platform 'cpu'" in str(unsupported())
    device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert unsupported() is None
        assert "dtype float64" in str(unsupported(dtype=jnp.float64))
        assert "K=384" in str(unsupported(key_dim=384))


def compile_cases() -> list[Compile]:
    def case(name, length, kv_length, heads, kv_heads, dim, dtype, *, causal=True, segments=False):
        def forward_backward(q, k, v, ids, kv_ids, q_offset):
            def attend(q, k, v):
                arrays = (q, k, v, ids, kv_ids, q_offset)
                return tpu.softmax_attention(*arrays, causal=causal, scale=0.1)

            results, back = jax.vjp(attend, q, k, v)
            return results, back(results)

        q = jax.ShapeDtypeStruct((1, length, heads, dim), dtype)
        k = jax.ShapeDtypeStruct((1, kv_length, kv_heads, dim), dtype)
        ids, kv_ids = (
            jax.ShapeDtypeStruct((1, size), jnp.int32) if segments else None
            for size in (length, kv_length)
        )
        offset = jax.ShapeDtypeStruct((), jnp.int32)
        return Compile(name, forward_backward, (q, k, k, ids, kv_ids, offset), kernels=3)

    bf16, fp32 = jnp.bfloat16, jnp.float32
    return [
        case("packed", 4096, 4096, 16, 2, 128, bf16, segments=True),
        case("ragged 64", 1000, 1300, 8, 2, 64, bf16, causal=False),
        case("ragged 96", 1000, 1300, 8, 2, 96, bf16),
        case("fp32 256", 2048, 2048, 4, 2, 256, fp32, segments=True),
        case("decode", 1, 4000, 64, 8, 128, bf16, segments=True),
        # As many blocks as scalar memory holds, and more.
        case("largest table", 1 << 18, 1 << 18, 2, 1, 128, bf16),
        case("no table", 300_000, 300_000, 2, 1, 128, bf16),
    ]


@needs_libtpu
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_for_every_tpu(everything):
    compile_for_every_tpu(__name__, everything=everything)
