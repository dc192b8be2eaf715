"""Lightning attention over split rows, on eight CPU devices, against whole rows in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
import sweep_simulator
import truth
from jax.sharding import PartitionSpec as P
from kernel_cases import BF16, FP32, SLOPES, check_close
from sharded import ROWS

import pallas_kernels
from pallas_kernels import platform
from pallas_kernels.lightning_attention import gpu_sweep
from sharding import lasp

KEY_DIM, VALUE_DIM, CHUNK = 8, 6, 4
MESHES = {
    "two": dict(data=2, seq=2, tensor=2),
    "four": dict(seq=4, tensor=2),
    "eight": dict(seq=8),
}


def _sharded(axes, *, ids, state, implementation=None, chunk_size=CHUNK):
    """The operation on whole arrays, split over a mesh."""
    data, tensor = (name if name in axes else None for name in ("data", "tensor"))
    tokens, states = P(data, "seq", tensor), P(data, tensor)

    def attend(q, k, v, slopes, initial_state, segment_ids):
        return lasp.lightning_attention(
            q,
            k,
            v,
            slopes,
            axis_name="seq",
            initial_state=initial_state,
            segment_ids=segment_ids,
            chunk_size=chunk_size,
            implementation=implementation,
        )

    ins = (tokens, tokens, tokens, P(tensor), states if state else None, P(data, "seq"))
    return jax.shard_map(
        attend,
        mesh=sharded.mesh(**axes),
        in_specs=ins if ids else (*ins[:-1], None),
        out_specs=(tokens, states),
        check_vma=False,
    )


def _arrays(ids, *, dtype=jnp.float32, key_dim=KEY_DIM, value_dim=VALUE_DIM):
    rng = np.random.default_rng(0)
    shape, heads = ids.shape, len(SLOPES)
    q, k, v, grad_out = (
        jnp.asarray(rng.standard_normal((*shape, heads, dim)), dtype)
        for dim in (key_dim, key_dim, value_dim, value_dim)
    )
    state, grad_final = (
        jnp.asarray(rng.standard_normal((shape[0], heads, key_dim, value_dim)), jnp.float32)
        for _ in range(2)
    )
    return q, k, v, jnp.asarray(SLOPES, jnp.float32), state, jnp.asarray(ids), grad_out, grad_final


def _gradients(operation):
    def run(q, k, v, slopes, state, ids, grad_out, grad_final):
        def attend(q, k, v, state):
            return operation(q, k, v, slopes, state, ids)

        results, back = jax.vjp(attend, q, k, v, state)
        return results, back((grad_out, grad_final))

    return run


@functools.cache
def _compiled(name, length=ROWS.shape[1]):
    operation = _sharded(MESHES[name], ids=True, state=True)
    arrays = _arrays(np.resize(ROWS, (len(ROWS), length)))
    return jax.jit(_gradients(operation)).lower(*arrays).compile()


def _check(seen, arrays, tolerance):
    (out, final), grads = seen
    true = truth.lightning(*arrays)
    check_close(out, true.out, tolerance, "output", axis=2)
    check_close(final, true.final_state, tolerance, "final_state", axis=1)
    for grad, wanted, name in zip(grads[:3], true[2:5], "qkv", strict=True):
        check_close(grad, wanted, tolerance, f"gradient to {name}", axis=2)
    check_close(grads[3], true.grad_initial_state, tolerance, "gradient to initial_state")


@pytest.mark.parametrize("name", MESHES)
def test_split_rows_equal_whole_rows(name):
    """Batch over `data`, heads over `tensor`, where the mesh has them."""
    *arrays, grad_out, grad_final = _arrays(ROWS)
    for gradients in ((grad_out, grad_final), (jnp.zeros_like(grad_out), grad_final)):
        _check(_compiled(name)(*arrays, *gradients), (*arrays, *gradients), FP32)


def test_as_in_training_without_ids_and_states():
    """Plain rows from zero, and a gradient through the output alone."""
    operation = _sharded(dict(data=2, seq=4), ids=False, state=False)
    q, k, v, slopes, _, _, grad_out, grad_final = _arrays(ROWS)

    @jax.jit
    def run(q, k, v, grad_out):
        def attend(q, k, v):
            return operation(q, k, v, slopes, None, None)

        out, back, final = jax.vjp(attend, q, k, v, has_aux=True)
        return (out, final), back(grad_out)

    (out, final), grads = run(q, k, v, grad_out)
    zero = np.zeros(grad_final.shape)
    true = truth.lightning(q, k, v, slopes, None, None, grad_out, zero)
    for seen, wanted, axis in zip((out, final, *grads), true[:5], (2, 1, 2, 2, 2), strict=True):
        check_close(seen, wanted, FP32, "result", axis=axis)
    text = run.lower(q, k, v, grad_out).compile().as_text()
    states = ("all-gather", "f32", (4, len(ROWS) // 2, len(SLOPES), KEY_DIM, VALUE_DIM), False)
    assert sharded.collectives(text) == {states: 2}


def test_what_is_sent_does_not_grow_with_the_rows():
    short, long = (
        sharded.collectives(_compiled("eight", length).as_text()) for length in (64, 128)
    )
    assert short == long
    assert {kind for kind, *_ in short} == {"all-gather", "all-reduce"}
    gathered = sum(n for (kind, *_), n in short.items() if kind == "all-gather")
    assert gathered == 3  # states forward and backward, and borders
    assert not any(in_loop for *_, in_loop in short)


def _products(operation, arrays):
    """Matrix products in a compiled program; loops are counted once."""
    return len(re.findall(r"= \S+ dot\(", jax.jit(operation).lower(*arrays).compile().as_text()))


def test_no_token_is_worked_on_twice():
    """But for the states: one product a pass more than on one device, which makes four forward."""
    arrays = _arrays(ROWS[:1])
    split = _sharded(dict(seq=2), ids=True, state=True)

    def whole(q, k, v, slopes, state, ids):
        return pallas_kernels.lightning_attention(
            q, k, v, slopes, initial_state=state, segment_ids=ids, chunk_size=CHUNK
        )

    assert [_products(f, arrays[:6]) for f in (whole, split)] == [4, 5]
    one_device, two = (_products(_gradients(f), arrays) for f in (whole, split))
    assert two == one_device + 2


def test_the_hopper_kernel_serves_the_shards(monkeypatch):
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_sweep, "run", sweep_simulator.run)
    arrays = _arrays(ROWS[[1, 2, 5]], dtype=jnp.bfloat16, key_dim=64, value_dim=64)
    split = _sharded(dict(seq=4), ids=True, state=True, implementation="pallas_gpu")
    # The rounding of bf16 results, as for one device.
    _check(jax.jit(_gradients(split))(*arrays), arrays, BF16)


def test_on_tpu_states_are_made_without_outputs():
    k = jnp.ones((1, 8, 2, 4))
    kernel = lasp._Kernel("seq", None, "pallas_tpu")
    state = kernel.own_state(k, k, jnp.zeros(2), None)  # served where there is no TPU: by XLA
    np.testing.assert_array_equal(state, np.full((1, 2, 4, 4), 8.0))


def test_an_axis_of_one_device():
    arrays = _arrays(ROWS[2:3])[:6]
    operation = _sharded(dict(seq=1), ids=True, state=True)
    q, k, v, slopes, state, ids = arrays
    wanted = pallas_kernels.lightning_attention(
        q, k, v, slopes, initial_state=state, segment_ids=ids, chunk_size=CHUNK
    )
    for seen, same in zip(jax.jit(operation)(*arrays), wanted, strict=True):
        np.testing.assert_allclose(seen, same, rtol=1e-6, atol=1e-6)
