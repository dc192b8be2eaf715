"""One token of lightning attention on Hopper GPUs, interpreted, and its place in a model."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import interpreted_hopper
from kernel_cases import FP32, check_close
from random_models import random_params, small_config

from mmx.inference.decoding import decode
from mmx.inference.pool import PoolShape, init_pool
from mmx.inference.rows import empty_rows
from mmx.model import trunk
from mmx.nn.block import Execution
from mmx.nn.layers import bind, specs
from mmx.nn.memory import Pages
from mmx.nn.moe import MoE
from mmx.nn.sequence import Sequence
from pallas_kernels import lightning_decode_step, platform
from pallas_kernels.lightning_attention import gpu_decode, xla

# The interpreter multiplies with numpy, which says so when an operand is NaN; here some are.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


@pytest.fixture
def interpreted(monkeypatch):
    with interpreted_hopper(monkeypatch, cores=3, detect_races=True):
        yield


def case(rows: int, heads: int, key_dim: int, value_dim: int, layers: int, dtype):
    rng = np.random.default_rng(rows)
    q, k = (jnp.asarray(rng.standard_normal((rows, heads, key_dim)), dtype) for _ in range(2))
    v = jnp.asarray(rng.standard_normal((rows, heads, value_dim)), dtype)
    slopes = jnp.asarray(np.geomspace(1e-5, 1.0, heads), jnp.float32)
    states = rng.standard_normal((layers, rows, heads, key_dim, value_dim))
    return q, k, v, slopes, jnp.asarray(states, jnp.float32)


def truth(q, k, v, slopes, state, continues):
    """The recurrence in float64."""
    q, k, v, slopes, state = (np.asarray(x, np.float64) for x in (q, k, v, slopes, state))
    old = np.where(np.asarray(continues)[:, None, None, None], state, 0)
    new = np.exp(-slopes)[:, None, None] * old + k[..., :, None] * v[..., None, :]
    return np.einsum("bhk,bhkv->bhv", q, new), new


@pytest.mark.parametrize("implementation", ["pallas_gpu", "xla"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 192)])
def test_layer_among_several(key_dim, value_dim, implementation, interpreted, capsys):
    """Rows that are no token keep every bit; what is not carried on may be NaN."""
    q, k, v, slopes, states = case(4, 3, key_dim, value_dim, 3, jnp.float32)
    real = jnp.asarray([True, False, True, True])
    continues = jnp.asarray([True, True, False, True])
    states = states.at[1, 2].set(jnp.nan)
    wanted_out, wanted = truth(q, k, v, slopes, jnp.nan_to_num(states[1]), continues)
    out, after = lightning_decode_step(
        q, k, v, slopes, states, layer=1, real=real, continues=continues,
        implementation=implementation,
    )  # fmt: skip
    keep = np.asarray(real)
    check_close(out[keep], wanted_out[keep], FP32, "output", axis=1)
    check_close(after[1][keep], wanted[keep], FP32, "state", axis=1)
    assert np.all(np.asarray(out[1]) == 0)
    untouched = np.array(after)
    untouched[1, keep] = np.asarray(states)[1, keep]
    assert np.array_equal(untouched, states, equal_nan=True)
    assert "RACE" not in capsys.readouterr().out


def test_bf16_and_one_layer(interpreted):
    q, k, v, slopes, states = case(2, 2, 64, 64, 1, jnp.bfloat16)
    wanted_out, wanted = truth(q, k, v, slopes, states[0], np.ones(2, bool))
    out, after = lightning_decode_step(q, k, v, slopes, states[0], implementation="pallas_gpu")
    assert (out.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)
    check_close(after, wanted, FP32, "state", axis=1)
    check_close(out, wanted_out, 2.5e-3, "output")  # rounded once, by 2^-9 at most


def test_gradients_are_those_of_the_recurrence(interpreted):
    """Against jax's own derivative of the XLA form, of all that has one."""
    *arrays, states = case(2, 2, 64, 64, 2, jnp.float32)
    rest = jnp.asarray([True, False]), jnp.asarray([True, True])
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (arrays[2], states)]

    def grads(step):
        def total(*arrays):
            results = step(*arrays, jnp.int32(1), *rest)
            return sum(jnp.sum(w * r) for w, r in zip(weights, results, strict=True))

        return jax.grad(total, argnums=range(5))(*arrays, states)

    both = grads(gpu_decode.lightning_decode_step), grads(xla.lightning_decode_step)
    for seen, wanted in zip(*both, strict=True):
        np.testing.assert_array_equal(seen, wanted)
        assert np.any(np.asarray(seen) != 0)


def test_kernel_updates_in_place_and_lowers_for_cuda():
    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    token, flags = spec(64, 64, 128), spec(64, dtype=jnp.bool)
    arrays = token, token, token, spec(64, dtype=jnp.float32)
    states = spec(7, 64, 64, 128, 128, dtype=jnp.float32)
    traced = jax.jit(gpu_decode.lightning_decode_step, donate_argnums=4).trace(
        *arrays, states, spec(dtype=jnp.int32), flags, flags
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    (alias,) = re.findall(r"output_operand_alias<([^>]*)>", text)
    assert "output_tuple_indices = [1]" in alias  # the states


def test_refusals_say_what_to_use_instead(monkeypatch):
    def refusal(states, dtype=jnp.bfloat16):
        rows, heads, key_dim, value_dim = states.shape
        q, v = (jnp.zeros((rows, heads, dim), dtype) for dim in (key_dim, value_dim))
        slopes = jnp.zeros(heads)
        with pytest.raises(NotImplementedError, match="use implementation='xla'") as caught:
            lightning_decode_step(q, q, v, slopes, states, implementation="pallas_gpu")
        return str(caught.value)

    assert "cpu: it is written for Hopper" in refusal(jnp.zeros((1, 1, 64, 64)))
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    assert "at most 128" in refusal(jnp.zeros((1, 1, 192, 64)))
    assert "multiples of 64" in refusal(jnp.zeros((1, 1, 64, 40)))
    assert "keeps states in fp32" in refusal(jnp.zeros((1, 1, 64, 64), jnp.bfloat16))


# ---------------------------------------------------------------- in a model

CONFIG = small_config(
    "ls", embed_dim=64, num_heads=2, num_kv_heads=1, head_dim=64, rotary_dim=32, expert_dim=128
)
PAGE = 64


def one_token(params, pool, config=CONFIG, **how):
    """Activations before the head, and the states, of three rows of which one does not run."""
    sequence = Sequence(
        segment_ids=jnp.asarray([[1], [0], [1]]),
        positions=jnp.asarray([[70], [0], [5]]),
        continues=jnp.ones(3, bool),
        packed=True,
    )
    table = jnp.asarray([[0, 3], [4, 5], [2, 1]])
    memory = Pages(pool.lightning_states, pool.key_pages, pool.value_pages, table)
    tokens = jnp.asarray([[3], [0], [17]])
    run = jax.jit(functools.partial(trunk, config=config, execution=Execution(**how)))
    x, memory, _, _ = run(params, tokens, sequence=sequence, memory=memory)
    return x[:, 0], memory


def test_model_gives_the_same_with_all_kernels_of_decoding(interpreted):
    """Against the XLA form in fp32, of the same bf16 weights; a row that does not run is NaN."""
    params = random_params(CONFIG, 0, jnp.bfloat16)
    pool = init_pool(CONFIG, PoolShape(3, 6, PAGE, jnp.dtype(jnp.bfloat16)))
    rng = np.random.default_rng(0)
    filled = (jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in jax.tree.leaves(pool))
    pool = jax.tree.unflatten(jax.tree.structure(pool), filled)
    pool = dataclasses.replace(pool, lightning_states=pool.lightning_states.at[:, 1].set(jnp.nan))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, pool))
    wanted, wanted_memory = one_token(*wide, implementation="xla")
    seen, memory = one_token(params, pool)
    runs = np.asarray([0, 2])
    # Some ten roundings to bf16 of 2^-9 each, one after the other, between input and output.
    check_close(seen[runs], np.asarray(wanted, np.float64)[runs], 1e-2, "activations")
    states = np.asarray(memory.lightning_states)
    check_close(states[:, runs], np.asarray(wanted_memory.lightning_states)[:, runs], 1e-2, "state")
    assert np.array_equal(states[:, 1], pool.lightning_states[:, 1], equal_nan=True)


def test_rows_that_are_no_token_go_to_no_expert(interpreted):
    """So nothing is read for them: their output is 0, and that of the others theirs alone."""
    module = MoE(CONFIG)
    rng = np.random.default_rng(2)
    params = {
        name: jnp.asarray(rng.standard_normal(spec.shape) / 8, jnp.bfloat16)
        for name, spec in specs(module).items()
        if name != "router"
    }
    router = {"kernel": jnp.asarray(rng.standard_normal((64, CONFIG.num_experts)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((3, 1, 64)), jnp.bfloat16)
    real = jnp.asarray([[True], [False], [True]])
    how = dict(keep_logits=False, implementation=None)
    out, _ = bind(module, {**params, "router": router})(x, real, **how)
    every, _ = bind(module, {**params, "router": router})(x, jnp.ones((3, 1), bool), **how)
    assert np.all(np.asarray(out[1]) == 0)
    assert np.any(np.asarray(every[1]) != 0)
    assert np.array_equal(out[::2], every[::2])


def test_decode_program_is_made_of_these_kernels(monkeypatch):
    """Of the small model, lowered for a Hopper GPU: one call of each kernel where one is due."""
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    params = jax.eval_shape(lambda: random_params(CONFIG, 0, jnp.bfloat16))
    pool = jax.eval_shape(lambda: init_pool(CONFIG, PoolShape(3, 6, PAGE, jnp.dtype(jnp.bfloat16))))
    rows = jax.eval_shape(lambda: empty_rows(CONFIG, 3, 2))
    jax.clear_caches()  # what was traced for a CPU
    traced = decode.trace(params, pool, rows, config=CONFIG, steps=2)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = ("_products", "_hidden", "weighted_products", "_step", "_attend", "merge")
    calls = {name: len(re.findall(rf"call @{name}(?:_\d+)?\(", text)) for name in names}
    assert calls == {
        "_products": 4,  # into and out of either attention
        "_hidden": 2,
        "weighted_products": 2,
        "_step": 1,
        "_attend": 1,
        "merge": 1,
    }
    jax.clear_caches()
