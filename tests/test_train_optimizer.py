"""The first moment in bf16: the same beta1, rounded once a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params, small_config

from mmx.training.optimizer import OptimizerOptions, _adam, make_optimizer


@pytest.mark.parametrize("beta1", [0.9, 0.99])
def test_a_first_moment_in_bf16_makes_the_same_updates(beta1):
    """Over 300 steps of gradients with noise, where another beta1 shows: 2 % at 0.9, 15 % at 0.99.

    A moment that is off by 2^-9 a step is off by less than 2^-9 / sqrt(1 - beta1^2) = 1.4 % in the
    end, each of 4,096 in its own direction; their mean by far less.
    """
    signs = jnp.asarray(np.where(np.random.default_rng(0).random(4096) < 0.5, -1, 1), jnp.float32)

    def last_update(dtype):
        adam = _adam(OptimizerOptions(beta1=beta1, first_moment_dtype=dtype))

        def step(state, key):
            grad = signs * (1 + 0.5 * jax.random.normal(key, signs.shape))
            update, state = adam.update(grad, state)
            return state, jnp.mean(update * signs)

        keys = jax.random.split(jax.random.key(0), 300)
        return jax.jit(lambda: jax.lax.scan(step, adam.init(signs), keys)[1][-1])()

    np.testing.assert_allclose(last_update("bfloat16"), last_update("float32"), rtol=0.005)


def test_only_the_first_moment_is_in_bf16():
    config = small_config("ls")
    optimizer = make_optimizer(config, OptimizerOptions(first_moment_dtype="bfloat16"))
    params = random_params(config, 0)
    shapes = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    updates, state = shapes
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"bfloat16", "float32", "int32"}


def test_a_beta1_that_bf16_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"beta1 is 0.999; it must be in \[0, 0.99\] with a first"):
        OptimizerOptions(beta1=0.999, first_moment_dtype="bfloat16")
