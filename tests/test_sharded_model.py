"""The model over 8 CPU devices against one: logits, loss, every gradient; rows packed every way."""

import functools

import jax
import numpy as np
import pytest
from random_models import random_params, random_tokens, small_config
from sharded import ROWS, collectives
from sweeps import sweep

from mmx.model import param_specs, unembed
from mmx.training import losses
from mmx.training.losses import blockwise_token_losses
from sharding import MeshConfig, Partition, constrain, make_mesh, named, rules

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
    "seq over two axes": (
        rules.LONG_CONTEXT, dict(expert=2, seq=2, data=2), dict(capacity_factor=0.8),
    ),
    "serving": (rules.SERVING, dict(data=2, expert=2, tensor=2), dict(remat="superblock")),
}  # fmt: skip


def partition_of(rules_, sizes, **options) -> Partition:
    return Partition(make_mesh(MeshConfig(**{"fsdp": 1, **sizes})), rules_, **options)


PARAMS = random_params(CONFIG, 3)
BATCH = {"tokens": TOKENS, "segment_ids": IDS}
# Half the compile time, which is nearly all of these tests'; lasp, ring and experts are tested with
# every implementation in files of their own.
QUICK = {"xla_backend_optimization_level": 0}


def spread(partition):
    """The parameters on their devices."""
    axes = jax.tree.map(lambda spec: spec.axes, param_specs(CONFIG))
    return jax.device_put(PARAMS, named(PARAMS, axes, partition))


def gradient_of(partition, **options):
    """Jitted: params -> (loss, (its parts, logits)), gradients."""

    def value(params):
        seen = []

        def keep(params, x, *rest, **named):
            logits = unembed(params, x, CONFIG)
            seen.append(constrain(logits, "batch", "seq", "vocab", partition=partition))
            return blockwise_token_losses(params, x, *rest, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "blockwise_token_losses", keep)
            total, parts = losses.loss_parts(
                params, BATCH, CONFIG, z_loss_coef=0.01, implementation="reference",
                partition=partition, **options,
            )  # fmt: skip
        return total, (parts, *seen)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@functools.cache
def one_device(capacity_factor):
    run = gradient_of(None, capacity_factor=capacity_factor).lower(PARAMS).compile(QUICK)
    return jax.device_get(run(PARAMS))


def close(seen, true):
    """Relative to the largest number of each array."""

    def leaf(path, a, b):
        bar = SAME * max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=bar, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(leaf, seen, true)


def check_what_is_sent(text, partition):
    """Of 8 rows, 64 tokens, 4 experts of width 12, 40 words; see CONFIG."""
    sent = collectives(text)
    gathered = {shape for kind, dtype, shape, _ in sent if (kind, dtype) == ("all-gather", "f32")}
    assert not [shape for shape in gathered if 64 in shape], "whole rows of activations"
    if partition.axes_of("vocab"):
        assert not [shape for shape in gathered if 40 in shape], "logits, or matrices of all words"
    if partition.axes_of("experts"):
        width = 12 // partition.devices_of("expert_mlp")
        assert not gathered & {(4, 24, width), (4, width, 24)}, "the weights of all experts"
    split = partition.devices_of("seq")
    heads, kv_heads = (n // partition.devices_of("heads") for n in (8, 4))
    rows = 8 // partition.devices_of("batch")
    states = {shape for shape in gathered if len(shape) == 5}
    assert states == ({(split, rows, heads, 8, 8)} if split > 1 else set()), "LASP: states alone"
    ring = {
        shape
        for kind, dtype, shape, in_loop in sent
        if (kind, dtype, in_loop) == ("collective-permute", "f32", True)
    }
    # Keys, values and their gradients; two devices pass them to each other without a loop.
    assert ring == ({(rows, 64 // split, kv_heads, 8)} if split > 2 else set()), "the ring"


@pytest.mark.parametrize("name", sweep(CASES, "seq over two axes".__ne__))
def test_logits_loss_and_gradients_are_those_of_one_device(name):
    ours, sizes, options = CASES[name]
    params = spread(partition := partition_of(ours, sizes))
    run = gradient_of(partition, **options).lower(params).compile(QUICK)
    check_what_is_sent(run.as_text(), partition)
    (total, (parts, logits)), grads = jax.device_get(run(params))
    (true_total, (true, true_logits)), true_grads = one_device(options.get("capacity_factor"))
    real = IDS[..., None] != 0  # logits at padding mean nothing
    close(np.where(real, logits, 0), np.where(real, true_logits, 0))
    dropped = parts.stats.num_dropped
    np.testing.assert_array_equal(dropped, true.stats.num_dropped)
    assert (dropped > 0).all() == ("capacity_factor" in options)
    close((total, parts, grads), (true_total, true, true_grads))


def test_a_mesh_of_one_device_is_the_same_program():
    """To the letter: nothing is there that could cost anything."""
    partition = Partition(make_mesh(MeshConfig(), jax.devices()[:1]), rules.EXPERT)

    def program(partition):
        return gradient_of(partition, capacity_factor=0.8, loss_blocks=2).lower(PARAMS).as_text()

    assert program(partition) == program(None)
