"""Modules that decode few rows in int8 on a Hopper GPU, in jax's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import interpreted_hopper
from kernel_cases import FP32, check_close
from random_models import random_params, small_config

from mmx.inference.quantize import quantize
from mmx.model import _modules
from mmx.nn import functional, layers, moe
from mmx.nn.functional import Product
from mmx.nn.quantized import quantized

# What the kernels do not copy of a block of 64 rows is NaN there, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


@pytest.fixture
def hopper(monkeypatch):
    with interpreted_hopper(monkeypatch, cores=3, detect_races=False):
        yield


def calls_of(monkeypatch, module, name):
    """A list with an entry for each call of an operation that was given scales."""
    calls, original = [], getattr(module, name)

    def call(*args, scales, **kwargs):
        calls.extend([] if scales is None else [name])
        return original(*args, scales=scales, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


def random(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


PRODUCTS = [  # activations, and of each product its subscripts, matrix and inputs
    ((3, 1, 128), ("btd,dhk->bthk", (128, 2, 64), (0,)), ("btd,de->bte", (128, 64), (0,))),
    ((3, 1, 2, 64), ("bthk,hkd->btd", (2, 64, 128), (0, 1))),
]


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_those_of_the_integers(case, hopper, monkeypatch):
    calls = calls_of(monkeypatch, functional, "skinny_matmul")
    shape, *products = case
    x = random(shape, 0, jnp.bfloat16)
    held = [
        quantized(random(shape, 1 + i), inputs) for i, (_, shape, inputs) in enumerate(products)
    ]
    asked = [Product(p[0], w, jnp.float32) for p, w in zip(products, held, strict=True)]
    seen = functional.project_together(x, *asked, skinny=True)
    for result, (subscripts, _, _), w in zip(seen, products, held, strict=True):
        exact = np.asarray(w.values, np.float64) * np.asarray(w.scale, np.float64)
        check_close(
            result, np.einsum(subscripts, np.asarray(x, np.float64), exact), FP32, subscripts
        )
    assert len(calls) == 1


def test_experts_are_those_of_many_tokens(hopper, monkeypatch):
    calls = calls_of(monkeypatch, moe, "expert_mixture")
    config = small_config("l", embed_dim=64, expert_dim=128)
    params = quantize(random_params(config, 0, jnp.bfloat16), config)
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["layer_0"]["moe"])
    module, x = _modules(config).blocks.layer_0.moe, random((5, 1, 64), 3, jnp.bfloat16)
    real = jnp.asarray([[True], [True], [False], [True], [True]])

    def run(x, real):
        return layers.bind(module, layer)(
            x, real, keep_logits=False, implementation=None, capacity_factor=None, statistics=False
        )[0]

    seen = run(x, real)
    # As five tokens of one row, which are sorted by expert.
    wanted = run(x.reshape(1, 5, 64), real.reshape(1, 5)).reshape(5, 1, 64)
    keep = np.asarray(real)[:, 0]
    # bf16: gate and up are rounded in the one way, their product in both.
    check_close(seen[keep], wanted[keep], 6e-3, "output")
    assert np.all(np.asarray(seen[~keep]) == 0)
    assert len(calls) == 1
