"""Small models with random weights, spread so that nothing about them is special."""

import jax
import jax.numpy as jnp
import numpy as np

import mmx
from mmx.model import param_specs

SMALL = dict(
    vocab_size=40,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    expert_dim=12,
    rope_theta=100.0,
    lightning_alpha=1.7,
    lightning_beta=0.6,
    softmax_alpha=1.4,
    softmax_beta=0.8,
    mlp_alpha=1.3,
    mlp_beta=0.9,
    max_seq_len=256,
    chunk_size=4,
)


def small_config(pattern: str, **changes) -> mmx.ModelConfig:
    """A config from 'l' and 's' for the layers, and what differs from SMALL."""
    kinds = {"l": "lightning", "s": "softmax"}
    return mmx.ModelConfig(layer_kinds=tuple(kinds[c] for c in pattern), **{**SMALL, **changes})


def random_params(config: mmx.ModelConfig, seed: int, dtype=jnp.float32):
    """Spread as `mmx.init_params` spreads them, norm scales away from 1, a router that decides.

    Drawn by numpy: a compiled program for each shape would take longer than the tests do.
    """
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            values = rng.uniform(0.5, 1.5, spec.shape)
        else:
            decisive = name.endswith(("router/kernel", "shared_coefficient"))
            values = (4 if decisive else 1) * spec.std * rng.standard_normal(spec.shape)
        return jnp.asarray(values, jnp.float32 if spec.fp32 else dtype)

    return jax.tree_util.tree_map_with_path(draw, param_specs(config))


def random_tokens(config: mmx.ModelConfig, shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)
