"""The model over 8 CPU devices against one: logits, loss and every gradient, rows packed every way."""

import functools

import jax
import numpy as np
import pytest
from random_models import random_params, random_tokens, small_config
from sharded import ROWS

import mmx
from mmx.model import param_specs
from mmx.training.losses import loss_parts
from sharding import MeshConfig, Partition, make_mesh, named, rules

CONFIG = small_config("ls", num_heads=8, num_kv_heads=4, shared_expert_dim=8)
IDS = ROWS[:8]
TOKENS = random_tokens(CONFIG, IDS.shape, 1)
# fp32 sums over 512 tokens, 24 channels and 40 words in another order.
SAME = 1e-5
CASES = {
    "fsdp 8": (rules.FSDP, dict(fsdp=8), {}),
    "tensor 4, data 2": (rules.TENSOR, dict(data=2, tensor=4), dict(capacity_factor=0.8)),
    "expert 4, fsdp 2": (rules.EXPERT, dict(expert=4, fsdp=2), dict(capacity_factor=0.8)),
    "expert 2, width 2, seq 2": (
        rules.EXPERT, dict(expert=2, tensor=2, seq=2), dict(loss_blocks=3, remat="layer"),
    ),
    "seq 8": (rules.LONG_CONTEXT, dict(seq=8), {}),
    "seq 4, tensor 2": (rules.EXPERT, dict(seq=4, tensor=2), {}),
    "seq over two axes": (rules.LONG_CONTEXT, dict(expert=2, seq=2, data=2), dict(capacity_factor=0.8)),
    "serving": (rules.SERVING, dict(data=2, expert=2, tensor=2), dict(remat="superblock")),
}  # fmt: skip


def partition_of(rules_, sizes, **options) -> Partition:
    return Partition(make_mesh(MeshConfig(**{"fsdp": 1, **sizes})), rules_, **options)


@functools.cache
def params_of(tied: bool = False):
    return random_params(CONFIG, 3)


def program(partition, **options):
    """Params -> logits, loss with its parts, gradients."""

    def value(params):
        batch = {"tokens": TOKENS, "segment_ids": IDS}
        total, parts = loss_parts(
            params, batch, CONFIG, z_loss_coef=0.01, partition=partition, **options
        )
        return total, parts

    @jax.jit
    def run(params):
        forward = mmx.forward(params, TOKENS, CONFIG, segment_ids=IDS, partition=partition)
        (total, parts), grads = jax.value_and_grad(value, has_aux=True)(params)
        return forward.logits, total, parts, grads

    return run


@functools.cache
def one_device(capacity_factor):
    return jax.device_get(program(None, capacity_factor=capacity_factor)(params_of()))


def close(seen, true):
    """Relative to the largest number of each array."""

    def leaf(path, a, b):
        bar = SAME * max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=bar, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(leaf, seen, true)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_those_of_one_device(name):
    ours, sizes, options = CASES[name]
    partition = partition_of(ours, sizes)
    axes = jax.tree.map(lambda spec: spec.axes, param_specs(CONFIG))
    params = jax.device_put(params_of(), named(params_of(), axes, partition))
    logits, *seen = jax.device_get(program(partition, **options)(params))
    true_logits, *true = one_device(options.get("capacity_factor"))
    real = IDS[..., None] != 0  # logits at padding mean nothing
    close(np.where(real, logits, 0), np.where(real, true_logits, 0))
    dropped = seen[1].stats.num_dropped
    np.testing.assert_array_equal(dropped, true[1].stats.num_dropped)
    assert (dropped > 0).all() == ("capacity_factor" in options)
    close(seen, true)
