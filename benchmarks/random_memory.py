"""Models and memories of a size, filled at random, and what a decode step must read of them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ModelConfig
from mmx.inference.cache import kv_bytes_per_token, state_bytes
from mmx.inference.pool import Pool, empty_states
from mmx.inference.rows import Rows, empty_rows
from mmx.model import Params, param_specs

PAGE = 256


BF16 = jnp.dtype(jnp.bfloat16)
AT_ONCE = 1 << 26  # numbers whose fp32 form there is room for


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Normal, some of the leading axes in a loop: the fp32 form of all would not fit."""
    looped = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) <= AT_ONCE)

    def draw(key: jax.Array) -> jax.Array:
        return (std * jax.random.normal(key, shape[looped:])).astype(dtype)

    keys = jax.random.split(key, math.prod(shape[:looped]))
    return jax.lax.map(draw, keys).reshape(shape)


def random_params(config: ModelConfig) -> Params:
    """bf16 parameters with the spread of `mmx.init_params`, made without a second copy."""
    specs, tree = jax.tree.flatten(param_specs(config))
    keys = jax.random.split(jax.random.key(0), len(specs))
    leaves = []
    for key, spec in zip(keys, specs, strict=True):
        dtype = jnp.dtype(jnp.float32 if spec.fp32 else jnp.bfloat16)
        one = jnp.ones(spec.shape, dtype)
        leaves.append(_random(key, spec.shape, dtype, spec.std) if spec.std else one)
    return jax.tree.unflatten(tree, jax.block_until_ready(leaves))


def random_pool(config: ModelConfig, rows: int, pages: int, kv_dtype: jnp.dtype = BF16) -> Pool:
    """Pages and states of the size they have."""
    states = jax.eval_shape(lambda: empty_states(config, rows)).shape
    softmax = config.layer_kinds.count("softmax")
    kv = (softmax, pages, PAGE, config.num_kv_heads, config.head_dim)
    keys = jax.random.split(jax.random.key(1), 3)
    return Pool(
        _random(keys[0], states, jnp.float32, 1.0),
        *(_random(key, kv, kv_dtype, 1.0) for key in keys[1:]),
    )


def running_rows(config: ModelConfig, rows: int, row_pages: int, context: int) -> Rows:
    """Every row at `context` tokens, pages side by side, with no end in sight."""
    numbers = np.arange(rows, dtype=np.int32)
    return dataclasses.replace(
        empty_rows(config, rows, row_pages),
        tokens=jnp.asarray(numbers * 7919 % config.vocab_size),
        positions=jnp.full(rows, context, jnp.int32),
        active=jnp.ones(rows, bool),
        limits=jnp.full(rows, 2**30, jnp.int32),
        page_table=jnp.asarray(np.arange(rows * row_pages, dtype=np.int32).reshape(rows, -1)),
    )


def step_bytes(
    config: ModelConfig, params: Params, rows: int, context: int, kv_bytes: int = 2
) -> float:
    """Bytes that a decode step cannot do without."""
    dense = experts = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "embed/" in name:
            continue
        if any(f"moe/{part}_proj" in name for part in ("gate", "up", "down")):
            experts += leaf.nbytes
        else:
            dense += leaf.nbytes
    chosen = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** rows
    kv = rows * context * kv_bytes_per_token(config, kv_bytes)
    return dense + experts * chosen + kv + 2 * rows * state_bytes(config)
