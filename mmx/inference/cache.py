"""What a model remembers of the tokens it has seen: a pytree that goes in and comes out."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmx.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The memory of B rows: constant for lightning layers, one slot a token for softmax layers.

    All rows write the same slots, padding included; `slot_samples` tells padding from tokens.

    Attributes:
      lightning_states: fp32, lightning layers in order.
      keys, values: rotated keys and values of the softmax layers in order; S slots.
      slot_samples: which sample of its row the token in each slot is of, counted from 1 as they
        begin, whatever their ids; 0 where it is padding or empty.
      num_slots: slots written so far.
      num_samples: samples of each row begun so far.
      segments: segment id of the last real token of each row; 0 when there was none.
      positions: tokens of that segment seen so far, which is the position of its next token.
    """

    lightning_states: Float[Array, "Ll B H K V"]
    keys: Float[Array, "Ls B S G K"]
    values: Float[Array, "Ls B S G K"]
    slot_samples: Int[Array, "B S"]
    num_slots: Int[Array, ""]
    num_samples: Int[Array, "B"]
    segments: Int[Array, "B"]
    positions: Int[Array, "B"]

    @property
    def max_slots(self) -> int:
        return self.keys.shape[2]


def init_cache(
    config: ModelConfig, batch_size: int, max_slots: int, dtype: jnp.dtype = jnp.float32
) -> Cache:
    """An empty cache with room for `max_slots` tokens a row, padding included.

    `dtype` is that of keys and values; lightning states are always fp32.
    """
    lightning = config.layer_kinds.count("lightning")
    heads, dim = config.num_heads, config.head_dim
    kv_shape = (config.num_layers - lightning, batch_size, max_slots, config.num_kv_heads, dim)
    return Cache(
        lightning_states=jnp.zeros((lightning, batch_size, heads, dim, dim), jnp.float32),
        keys=jnp.zeros(kv_shape, dtype),
        values=jnp.zeros(kv_shape, dtype),
        slot_samples=jnp.zeros((batch_size, max_slots), jnp.int32),
        num_slots=jnp.zeros((), jnp.int32),
        num_samples=jnp.zeros((batch_size,), jnp.int32),
        segments=jnp.zeros((batch_size,), jnp.int32),
        positions=jnp.zeros((batch_size,), jnp.int32),
    )


def state_bytes(config: ModelConfig) -> int:
    """Bytes of fp32 lightning state a sequence, whatever its length."""
    lightning = config.layer_kinds.count("lightning")
    return lightning * config.num_heads * config.head_dim**2 * 4


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of softmax keys and values a token (bf16 unless told)."""
    softmax = config.layer_kinds.count("softmax")
    return softmax * 2 * config.num_kv_heads * config.head_dim * bytes_per_value
