"""Ring attention over split rows, on eight CPU devices, against whole rows in float64."""

import functools
from collections import Counter

import cudnn_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
import truth
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P
from kernel_cases import FP32, check_close
from sharded import PACKED_ROWS, ROWS

import pallas_kernels
from pallas_kernels import platform
from pallas_kernels.softmax_attention.reference import RESIDUALS
from sharding import ring

KEY_DIM, VALUE_DIM = 8, 6
# Axes, and heads of queries and of keys.
CASES = {
    "two": (dict(data=2, seq=2, tensor=2), (4, 2)),
    "four": (dict(seq=4, tensor=2), (8, 2)),
    "eight": (dict(seq=8), (6, 2)),
}


def _sharded(axes, *, ids=True, implementation=None):
    """The operation on whole arrays, split over a mesh."""
    data, tensor = (name if name in axes else None for name in ("data", "tensor"))

    def attend(q, k, v, segment_ids):
        return ring.softmax_attention(
            q, k, v, axis_name="seq", segment_ids=segment_ids, implementation=implementation
        )

    tokens = P(data, "seq", tensor)
    return jax.shard_map(
        attend,
        mesh=sharded.mesh(**axes),
        in_specs=(tokens, tokens, tokens, P(data, "seq") if ids else None),
        out_specs=tokens,
        check_vma=False,
    )


def _arrays(ids, heads, *, dtype=jnp.float32, dims=(KEY_DIM, VALUE_DIM)):
    rng = np.random.default_rng(0)
    (q_heads, kv_heads), (key_dim, value_dim) = heads, dims
    shapes = (q_heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim), (q_heads, value_dim)
    q, k, v, grad = (
        jnp.asarray(rng.standard_normal((*ids.shape, *shape)), dtype) for shape in shapes
    )
    return q, k, v, jnp.asarray(ids), grad


def _gradients(operation):
    def run(q, k, v, ids, grad):
        out, back = jax.vjp(lambda q, k, v: operation(q, k, v, ids), q, k, v)
        return out, *back(grad)

    return run


@functools.cache
def _compiled(name):
    axes, heads = CASES[name]
    run = jax.jit(_gradients(_sharded(axes)))
    return run.lower(*_arrays(ROWS, heads)).compile()


def _check(seen, arrays, tolerance):
    q, k, v, ids, grad = arrays
    ids = np.asarray(ids)
    visible = np.tril((ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None])
    true = truth.softmax_attention(q, k, v, visible, q.shape[-1] ** -0.5, grad)
    wanted = (true.out, *true[2:])
    for one, other, name in zip(seen, wanted, ("out", "dq", "dk", "dv"), strict=True):
        check_close(one, other, tolerance, name)
        np.testing.assert_array_equal(np.asarray(one)[ids == 0], 0)


@pytest.mark.parametrize("name", CASES)
def test_split_rows_equal_whole_rows(name):
    """Batch over `data`, heads over `tensor`, where the mesh has them."""
    arrays = _arrays(ROWS, CASES[name][1])
    _check(_compiled(name)(*arrays), arrays, FP32)


def test_rows_without_ids():
    heads = (4, 4)
    q, k, v, ids, grad = _arrays(np.ones((2, 64), np.int32), heads)
    run = jax.jit(_gradients(_sharded(dict(data=2, seq=4), ids=False)))
    _check(run(q, k, v, None, grad), (q, k, v, ids, grad), FP32)


# ---------------------------------------------------------------- work and communication


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 7, 8])
def test_every_block_is_made_once_and_all_devices_make_as_many(devices):
    made = []
    for device in range(devices):
        halves = [(device, pair) for pair in ring.OWN_BLOCKS]
        for source in set(range(devices)) - {device}:
            halves += [(source, pair) for pair in ring.whole_blocks(device, source)]
        made.append(
            [
                (ring.chunk(device, mine, devices), ring.chunk(source, theirs, devices))
                for source, (mine, theirs) in halves
            ]
        )
    causal = {(a, b) for a in range(2 * devices) for b in range(a + 1)}
    assert Counter(block for blocks in made for block in blocks) == Counter(causal)
    assert len({len(blocks) for blocks in made}) == 1
    # Blocks on the diagonal are half a block.
    assert {sum(a == b for a, b in blocks) for blocks in made} == {2}


def test_only_keys_and_values_go_round():
    """What is sent in loops are shards of keys, values and ids; queries move in halves, outside."""
    heads, kv_heads = CASES["eight"][1]
    sent = sharded.collectives(_compiled("eight").as_text())
    assert {kind for kind, *_ in sent} == {"collective-permute"}
    rows, tokens = len(ROWS), 64 // 8
    dims = (KEY_DIM, VALUE_DIM)
    round_trip = {(rows, tokens, kv_heads, dim) for dim in dims} | {(rows, tokens)}
    halves = {(rows, tokens // 2, h, dim) for h in (heads, kv_heads) for dim in dims}
    halves |= {(rows, tokens // 2)}
    assert {shape for *_, shape, in_loop in sent if in_loop} == round_trip
    assert {shape for *_, shape, in_loop in sent if not in_loop} == round_trip | halves


def _loops_that_send(jaxpr):
    """Bodies of the loops, anywhere inside, that send something."""
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            sends = any(e.primitive.name == "ppermute" for e in inner.eqns)
            if equation.primitive.name in ("scan", "while") and sends:
                yield inner
            yield from _loops_that_send(inner)


def test_what_is_sent_does_not_wait_for_products():
    axes, heads = CASES["four"]
    traced = jax.make_jaxpr(_gradients(_sharded(axes)))(*_arrays(ROWS, heads))
    loops = list(_loops_that_send(traced.jaxpr))
    assert len(loops) == 2  # forward and backward
    for body, arrays in zip(loops, (3, 5), strict=True):  # k, v, ids; and gradients of k and v
        sent = [e for e in body.eqns if e.primitive.name == "ppermute"]
        assert len(sent) == arrays
        assert all(operand in body.invars for e in sent for operand in e.invars)


def test_recomputed_layers_go_round_once():
    """With `RESIDUALS` kept, as the model does, the backward pass repeats no forward pass."""
    axes, heads = CASES["four"]
    keep = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
    for policy, loops in ((keep, 2), (None, 3)):
        layer = jax.checkpoint(_sharded(axes), policy=policy)
        traced = jax.make_jaxpr(_gradients(layer))(*_arrays(ROWS, heads))
        assert len(list(_loops_that_send(traced.jaxpr))) == loops


# ---------------------------------------------------------------- cuDNN


def test_packed_rows_through_cudnn(monkeypatch):
    cudnn_simulator.install(monkeypatch)
    run = jax.jit(_gradients(_sharded(dict(seq=4), implementation="cudnn")))
    for rows in (PACKED_ROWS, ROWS[: len(PACKED_ROWS)]):  # the latter in part by XLA, as they must
        arrays = _arrays(rows, (4, 2), dtype=jnp.bfloat16, dims=(8, 8))
        # bf16 results of each of eight blocks of bf16 probabilities.
        _check(run(*arrays), arrays, 8e-3)


@pytest.mark.parametrize("ids", [False, True])
def test_program_for_cuda_calls_cudnn(ids, monkeypatch):
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    rows = jnp.ones((1, 1024), jnp.int32)
    q, k, v, grad = (
        jax.ShapeDtypeStruct((1, 1024, heads, 64), jnp.bfloat16) for heads in (4, 1, 1, 4)
    )
    run = jax.jit(_gradients(_sharded(dict(seq=4), ids=ids)))
    traced = run.trace(q, k, v, rows if ids else None, grad)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The own product, and two each in the loop and after it.
    assert text.count("__cudnn$fmhaSoftmaxBackward") == 5
    assert text.count("__cudnn$fmhaSoftmax") == 10


# ---------------------------------------------------------------- edges


def test_an_axis_of_one_device():
    arrays = _arrays(ROWS[2:4], (4, 2))[:4]
    seen = jax.jit(_sharded(dict(seq=1)))(*arrays)
    q, k, v, ids = arrays
    wanted = pallas_kernels.softmax_attention(q, k, v, segment_ids=ids)
    np.testing.assert_allclose(seen, wanted, rtol=1e-6, atol=1e-6)


BAD = [
    (dict(length=60), ValueError, "15 tokens a device are no two equal chunks; pad the rows"),
    (dict(key_length=32), ValueError, r"k has shape \(1, 8, 1, 8\); it must be \(1, 16, 1, 8\)"),
    (dict(implementation="cudnn"), NotImplementedError, "cpu: cuDNN's fused attention needs"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(change, error, message):
    length = change.get("length", 64)
    q = jnp.ones((1, length, 2, 8))
    k = jnp.ones((1, change.get("key_length", length), 1, 8))
    operation = _sharded(dict(seq=4), ids=False, implementation=change.get("implementation"))
    with pytest.raises(error, match=message):
        operation(q, k, k, None)
