from types import SimpleNamespace

import cudnn_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import SOFTMAX_CASES, check_close, check_softmax, named

from pallas_kernels import attention_block_backward, platform, softmax_attention
from pallas_kernels.softmax_attention import cudnn_calls, gpu_cudnn, gpu_cudnn_packed

TOLERANCE = 6e-3  # bf16 results of bf16 probabilities, as for the other forms


@pytest.fixture
def simulated(monkeypatch):
    cudnn_simulator.install(monkeypatch)


SERVED = [
    case
    for case in SOFTMAX_CASES
    if case.kv_length is None and case.kv_segments is None and case.value_dim == case.key_dim
]


def _packed(*, rows):
    ids = np.asarray(rows, np.int32)
    rng = np.random.default_rng(ids.sum())
    q, k, v, grad = (
        jnp.asarray(rng.standard_normal((*ids.shape, heads, 8)), jnp.bfloat16)
        for heads in (4, 2, 2, 4)
    )
    return q, k, v, grad, jnp.asarray(ids)


def _run(implementation):
    @jax.jit  # so that the ids are traced
    def run(q, k, v, grad, ids):
        def attend(q, k, v):
            return softmax_attention(
                q, k, v, segment_ids=ids, return_lse=True, implementation=implementation
            )

        # The log-sum-exp without a gradient, which would take the XLA form's backward pass.
        out, back, lse = jax.vjp(attend, q, k, v, has_aux=True)
        return out, lse, *back(grad)

    return run


ROWS = {
    "packed": [[1] * 9 + [2] * 20 + [3] * 3, [1] * 32],
    "padded": [[0] * 4 + [1] * 9 + [0] * 3 + [2] * 16, [1] * 3 + [0] * 29],
    "empty_row": [[0] * 32, [1] * 10 + [2] * 22],
    "hole_in_a_sample": [[1] * 9 + [0] * 3 + [1] * 20, [1] * 32],
    "falling_ids": [[2] * 9 + [1] * 23, [1] * 32],
    "many_samples": [list(range(1, 33)), [1] * 32],
}


@pytest.mark.parametrize("name", ROWS)
def test_traced_samples_equal_the_xla_form(name, simulated):
    arrays = _packed(rows=ROWS[name])
    seen, wanted = _run("cudnn")(*arrays), _run("xla")(*arrays)
    real = np.asarray(arrays[-1]) > 0
    for a, b, what in zip(seen, wanted, ("out", "lse", "dq", "dk", "dv"), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        check_close(a[real], b[real], TOLERANCE, what)
        np.testing.assert_array_equal(a[~real], b[~real])


def test_pieces_of_a_packed_row_equal_the_xla_form(simulated):
    """Keys of the first half, queries of the second: output, log-sum-exp, and as in a ring."""

    def pieces(implementation):
        @jax.jit
        def run(q, k, v, grad, ids):
            ids, kv_ids, keys = ids[:, 16:], ids[:, :16], (k[:, :16], v[:, :16])
            q, grad = q[:, 16:], grad[:, 16:]
            static = dict(causal=False, segment_ids=ids, kv_segment_ids=kv_ids)
            static["implementation"] = implementation

            def attend(q, k, v):
                return softmax_attention(q, k, v, return_lse=True, **static)

            out, back, lse = jax.vjp(attend, q, *keys, has_aux=True)
            # As if there were other keys of as much weight, which gave 0.
            merged = (0.5 * out, lse + jnp.log(2.0), grad)
            ring = attention_block_backward(q, *keys, *merged, **static)
            return out, lse, *back(grad), *ring

        return run

    seen, wanted = pieces("cudnn"), pieces("xla")
    for rows in ROWS.values():
        arrays = _packed(rows=rows)
        for a, b in zip(seen(*arrays), wanted(*arrays), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            finite = np.isfinite(b)
            np.testing.assert_array_equal(a[~finite], b[~finite])
            check_close(a[finite], b[finite], TOLERANCE, "result")


def test_what_pieces_of_a_row_have_in_common():
    rows = [[2, 2, 3, 3], [0, 3, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0], [4, 4, 4, 4]]
    kv_rows = [[1, 2, 2, 0], [1, 2, 2, 3], [1, 1, 2, 2], [1, 1, 1, 1], [0, 4, 4, 4]]
    groups = gpu_cudnn_packed._common(jnp.asarray(rows), jnp.asarray(kv_rows))
    queries, keys, statistic, position = groups.group(0)
    assert bool(groups.in_order)
    assert int(groups.number) == 1
    np.testing.assert_array_equal(queries.lengths[:, 0], [2, 1, -1, -1, 4])
    np.testing.assert_array_equal(keys.lengths[:, 0], [2, 1, -1, -1, 3])
    np.testing.assert_array_equal(queries.begins[:, 0], [0, 1, -1, -1, 0])
    np.testing.assert_array_equal(keys.begins[:, 0], [1, 3, -1, -1, 1])
    np.testing.assert_array_equal(statistic[:, :2], [[0, 0], [0, 1], [0, 0], [0, 0], [2, 2]])
    np.testing.assert_array_equal(position[4], [0, 1, 2, 3])
    for ids, kv_ids in (([1, 2], [2, 3]), ([2, 1], [1, 1]), ([3, 3], [3, 1]), ([1, 0, 1], [1, 1])):
        assert not gpu_cudnn_packed._common(jnp.asarray([ids]), jnp.asarray([kv_ids])).in_order
    nothing = gpu_cudnn_packed._common(jnp.asarray([[2, 2]]), jnp.asarray([[1, 1]]))
    assert int(nothing.number) == 0


@pytest.mark.parametrize("name", ROWS)
def test_only_ids_in_packing_order_go_to_cudnn(name):
    samples = gpu_cudnn_packed._samples(jnp.asarray(ROWS[name], jnp.int32))
    assert bool(samples.in_order) == (name not in ("hole_in_a_sample", "falling_ids"))


@pytest.mark.parametrize("name", ["padded", "empty_row", "many_samples"])
def test_samples_go_to_cudnn_some_at_a_time(name, simulated, monkeypatch):
    monkeypatch.setattr(gpu_cudnn_packed, "MAX_SAMPLES", 3)
    monkeypatch.setattr(
        gpu_cudnn_packed, "WORKSPACE_BYTES", 1
    )  # one at a time, each head by itself
    test_traced_samples_equal_the_xla_form(name, None)


@pytest.mark.parametrize("case", **named(SERVED))
def test_ids_in_the_program_equal_the_definition(case, simulated):
    check_softmax(case, jnp.bfloat16, implementation="cudnn", tolerance=TOLERANCE)


@pytest.mark.parametrize(("length", "calls"), [(32, 2), (68, 3), (33, 1)])
def test_long_rows_by_halves_equal_the_xla_form(length, calls, simulated, monkeypatch):
    """33 tokens are odd and not cut, and of 68 the quarters are not cut again."""
    monkeypatch.setattr(gpu_cudnn, "WHOLE", 16)
    lengths = []

    def bind(*operands, original=cudnn_calls.cudnn._dot_product_attention_fwd_p_wrapper, **static):
        lengths.append((static["mask_type"].name, operands[0].shape[:2]))
        return original.bind(*operands, **static)

    monkeypatch.setattr(
        cudnn_calls.cudnn, "_dot_product_attention_fwd_p_wrapper", SimpleNamespace(bind=bind)
    )
    rng = np.random.default_rng(length)
    q, k, v, grad = (
        jnp.asarray(rng.standard_normal((2, length, heads, 8)), jnp.bfloat16)
        for heads in (4, 2, 2, 4)
    )

    def run(implementation):
        def attend(q, k, v):
            return softmax_attention(q, k, v, return_lse=True, implementation=implementation)

        @jax.jit
        def both(q, k, v, grad):
            out, back, lse = jax.vjp(attend, q, k, v, has_aux=True)
            return out, lse, *back(grad)

        return both(q, k, v, grad)

    seen, wanted = run("cudnn"), run("xla")
    for a, b, what in zip(seen, wanted, ("out", "lse", "dq", "dk", "dv"), strict=True):
        check_close(np.asarray(a, np.float64), np.asarray(b, np.float64), TOLERANCE, what)
    assert lengths[0] == ("CAUSAL", (2 << (calls - 1), length >> (calls - 1)))
    assert len(lengths) == calls


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_blocks_of_keys_add_up_to_the_whole(implementation, simulated):
    dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
    tolerance = TOLERANCE if implementation == "cudnn" else 2e-6
    rng = np.random.default_rng(3)
    q, grad = (jnp.asarray(rng.standard_normal((2, 12, 4, 8)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((2, 24, 2, 8)), dtype) for _ in range(2))

    def whole(q, k, v):
        # Queries 12..23 of 24.
        return softmax_attention(q, k, v, q_offset=12, return_lse=True, implementation="reference")

    (out, lse), back = jax.vjp(whole, q, k, v)
    wanted = back((grad, jnp.zeros_like(lse)))
    blocks = [(slice(0, 12), False), (slice(12, 24), True)]
    parts = [
        attention_block_backward(
            q, k[:, part], v[:, part], out, lse, grad, causal=causal, implementation=implementation
        )
        for part, causal in blocks
    ]
    grads = (
        sum(p[0].astype(jnp.float32) for p in parts),
        *(jnp.concatenate([p[i] for p in parts], axis=1) for i in (1, 2)),
    )
    for a, b, what in zip(grads, wanted, "qkv", strict=True):
        check_close(a, b, tolerance, f"gradient to {what}")


@pytest.mark.parametrize("packed", [False, True])
def test_program_for_cuda_calls_cudnn(packed):
    q = jax.ShapeDtypeStruct((2, 1024, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 1024, 2, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def total(q, k, v, ids):
        ids = ids if packed else None
        out, _ = gpu_cudnn.softmax_attention(q, k, v, ids, ids, 0, causal=True, scale=0.1)
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert text.count("__cudnn$fmhaSoftmax(") + text.count('"__cudnn$fmhaSoftmax"') == 1


def test_what_cudnn_keeps_on_the_side_stays_small():
    least = gpu_cudnn_packed.MIN_SAMPLES
    for shape in ((1, 64, 2, 64), (8, 8192, 64, 128), (2, 131072, 64, 128)):
        q, k = (jax.ShapeDtypeStruct((*shape[:2], n, shape[3]), jnp.bfloat16) for n in (64, 8))
        pieces, limit = gpu_cudnn_packed._forward_plan(q, k)
        assert limit == least or 4 * limit * np.prod(q.shape[:3]) / pieces <= 1 << 30
        assert np.prod(q.shape) / pieces < 1 << 31
        pieces, limit = gpu_cudnn_packed._backward_plan(q, k)
        assert limit == least or 12 * limit * np.prod(q.shape) / pieces <= 4 << 30
        assert 8 % pieces == 0
        assert least <= limit <= gpu_cudnn_packed.MAX_SAMPLES


def test_refusals_say_what_to_use_instead(monkeypatch):
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)

    def refusal(q, **arguments):
        with pytest.raises(NotImplementedError) as caught:
            softmax_attention(q, q, q, implementation="cudnn", **arguments)
        return str(caught.value)

    assert "cpu: cuDNN's fused attention needs" in refusal(q)
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    assert "dtype float32" in refusal(q.astype(jnp.float32))
    assert "q_offset" in refusal(q, q_offset=3)
    ids = jnp.asarray([[1, 1, 2, 2, 3, 3, 3, 3]])
    assert "not those of the keys" in refusal(q, segment_ids=ids, kv_segment_ids=ids + 0)
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (8, 0))
    assert "(9, 0)" in refusal(q, segment_ids=ids)
