import cudnn_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import SOFTMAX_CASES, check_close, check_softmax, named

from pallas_kernels import attention_block_backward, platform, softmax_attention
from pallas_kernels.softmax_attention import gpu_cudnn

TOLERANCE = 6e-3  # bf16 results of bf16 probabilities, as for the other forms


@pytest.fixture
def simulated(monkeypatch):
    """A Hopper GPU whose cuDNN is the simulator."""
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    for name, simulator in (
        ("fwd", cudnn_simulator.Forward()),
        ("bwd", cudnn_simulator.Backward()),
    ):
        monkeypatch.setattr(gpu_cudnn.cudnn, f"_dot_product_attention_{name}_p_wrapper", simulator)


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

        (out, lse), back = jax.vjp(attend, q, k, v)
        return out, lse, *back((grad, jnp.zeros_like(lse)))

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


@pytest.mark.parametrize("name", ROWS)
def test_only_ids_in_packing_order_go_to_cudnn(name):
    samples = gpu_cudnn._samples(jnp.asarray(ROWS[name], jnp.int32))
    assert bool(samples.in_order) == (name not in ("hole_in_a_sample", "falling_ids"))


@pytest.mark.parametrize("name", ["padded", "empty_row", "many_samples"])
def test_samples_go_to_cudnn_some_at_a_time(name, simulated, monkeypatch):
    monkeypatch.setattr(gpu_cudnn, "MAX_SAMPLES", 3)
    monkeypatch.setattr(gpu_cudnn, "WORKSPACE_BYTES", 1)  # one at a time, each head by itself
    test_traced_samples_equal_the_xla_form(name, None)


@pytest.mark.parametrize("case", **named(SERVED))
def test_ids_in_the_program_equal_the_definition(case, simulated):
    check_softmax(case, jnp.bfloat16, implementation="cudnn", tolerance=TOLERANCE)


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
    for shape in ((1, 64, 2, 64), (8, 8192, 64, 128), (2, 131072, 64, 128)):
        q, k = (jax.ShapeDtypeStruct((*shape[:2], n, shape[3]), jnp.bfloat16) for n in (64, 8))
        pieces, limit = gpu_cudnn._forward_plan(q, k)
        assert limit == 1 or 4 * limit * np.prod(q.shape[:3]) / pieces <= 1 << 30
        assert np.prod(q.shape) / pieces < 1 << 31
        pieces, limit = gpu_cudnn._backward_plan(q, k)
        assert limit == 1 or 12 * limit * np.prod(q.shape) / pieces <= 4 << 30
        assert 8 % pieces == 0
        assert 1 <= limit <= gpu_cudnn.MAX_SAMPLES


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
