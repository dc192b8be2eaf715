"""Lookup and losses of a vocabulary, whole and spread: gradients of frequent words, wrong ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import MeshConfig, Partition, make_mesh, rules, vocabulary

MESHES = {
    "one device": None,
    "tensor=2": (MeshConfig(fsdp=1, tensor=2), rules.TENSOR),
    "fsdp=2": (MeshConfig(fsdp=2), rules.FSDP),
}


@pytest.fixture(params=MESHES.values(), ids=MESHES)
def partition(request):
    if request.param is None:
        return None
    config, chosen = request.param
    return Partition(make_mesh(config, jax.devices()[:2]), chosen)


def test_a_frequent_word_has_the_gradient_of_all_its_places(partition):
    """A bf16 sum of ones stands still at 256. Here sums of devices are rounded, and theirs."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((2, 4096)) < 0.9, 5, rng.integers(0, 8, (2, 4096)))
    grad = jnp.asarray(1 + 0.5 * rng.standard_normal((2, 4096, 4)), jnp.bfloat16)

    @jax.jit
    def pull(table, tokens, grad):
        find = lambda table: vocabulary.lookup(table, tokens, partition=partition)  # noqa: E731
        return jax.vjp(find, table)[1](grad)[0]

    seen = pull(jnp.ones((8, 4), jnp.bfloat16), jnp.asarray(tokens, jnp.int32), grad)
    assert seen.dtype == jnp.bfloat16
    wanted = np.zeros((8, 4))
    np.add.at(wanted, tokens.reshape(-1), np.asarray(grad, np.float64).reshape(-1, 4))
    np.testing.assert_allclose(np.asarray(seen, np.float64), wanted, rtol=3 * 2**-9)


def test_a_word_out_of_range_is_nan_and_has_no_gradient(partition):
    table = jnp.arange(32, dtype=jnp.float32).reshape(8, 4)
    tokens = jnp.asarray([[-1, 8, 3, 7], [0, 1 << 30, -(1 << 31), 2]])

    @jax.jit
    def run(table, tokens):
        found, pull = jax.vjp(
            lambda table: vocabulary.lookup(table, tokens, partition=partition), table
        )
        return found, pull(jnp.ones_like(found))[0]

    found, grad = run(table, tokens)
    known = np.asarray((tokens >= 0) & (tokens < 8))
    np.testing.assert_array_equal(np.isnan(found).all(-1), ~known)
    np.testing.assert_array_equal(np.asarray(found)[known], np.asarray(table)[tokens[known]])
    np.testing.assert_array_equal(grad[:, 0], [1, 0, 1, 1, 0, 0, 0, 1])


def test_a_target_out_of_range_is_nan(partition):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    head = jnp.asarray(np.random.default_rng(1).normal(size=(6, 8)), jnp.float32)
    targets = jnp.asarray([[-1, 8, 3, 7], [0, 1 << 30, -100, 2]])
    seen, _ = jax.jit(
        lambda *arrays: vocabulary.token_losses(
            *arrays,
            logits=lambda head, x: x @ head,
            head_axes=("embed", "vocab"),
            vocab_size=8,
            partition=partition,
        )
    )(x, head, targets)
    known = np.asarray((targets >= 0) & (targets < 8))
    np.testing.assert_array_equal(np.isnan(seen), ~known)
    logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64)
    total = np.log(np.exp(logits).sum(-1))
    wanted = total - np.take_along_axis(logits, np.clip(targets, 0, 7)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(seen)[known], wanted[known], rtol=1e-6)
