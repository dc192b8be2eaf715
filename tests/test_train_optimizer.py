"""The first moment in bf16: the same beta1, rounded once a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params, small_config

from mmx.training.optimizer import OptimizerOptions, make_optimizer

CONFIG = small_config("ls")
PARAMS = random_params(CONFIG, 0)


@pytest.mark.parametrize("beta1", [0.9, 0.99])
def test_a_first_moment_in_bf16_makes_the_same_updates(beta1):
    """Over 300 steps of gradients with noise, where another beta1 shows: 2 % at 0.9, 15 % at 0.99.

    A moment that is off by 2^-9 a step is off by less than 2^-9 / sqrt(1 - beta1^2) = 1.4 % in the
    end, each in its own direction.
    """
    signs = jax.tree.map(lambda x: jnp.sign(x) + (x == 0), PARAMS)

    def run(dtype):
        options = OptimizerOptions(beta1=beta1, weight_decay=0.0, first_moment_dtype=dtype)
        optimizer = make_optimizer(CONFIG, options)

        def step(state, key):
            grads = jax.tree.map(lambda s: s * (1 + 0.5 * jax.random.normal(key, s.shape)), signs)
            update, state = optimizer.update(grads, state, PARAMS)
            return state, jax.tree.map(lambda u, s: jnp.mean(u * s), update, signs)

        keys = jax.random.split(jax.random.key(0), 300)
        state, means = jax.lax.scan(step, optimizer.init(PARAMS), keys)
        return state, jax.tree.map(lambda x: x[-1], means)

    (narrow, updates), (_, wanted) = (jax.jit(run, static_argnums=0)(dtype) for dtype in (
        "bfloat16", "float32"
    ))  # fmt: skip
    moments = {leaf.dtype.name for leaf in jax.tree.leaves(narrow)}
    assert moments == {"bfloat16", "float32", "int32"}
    large = [leaf.size >= 100 for leaf in jax.tree.leaves(PARAMS)]
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), large, strict=True)
    ratios = [float(one / other) for one, other, many in pairs if many]
    np.testing.assert_allclose(ratios, 1, atol=0.01)


def test_a_beta1_that_bf16_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"beta1 is 0.999; it must be in \[0, 0.99\] with a first"):
        OptimizerOptions(beta1=0.999, first_moment_dtype="bfloat16")
