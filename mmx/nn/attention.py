"""Softmax attention as a layer: grouped-query, RoPE on the leading channels of each head."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from mmx.config import ModelConfig
from mmx.nn import functional
from mmx.nn.layers import declare
from mmx.nn.sequence import Sequence
from pallas_kernels import softmax_attention


class KeyValueSlots(NamedTuple):
    """The keys and values of all softmax layers, and where this layer writes among them.

    `keys` and `values` are the arrays of `Cache`; passing them whole lets XLA update them in place.
    """

    keys: Float[Array, "Ls B S G K"]
    values: Float[Array, "Ls B S G K"]
    slot_segments: Int[Array, "B S"]
    layer: Int[Array, ""]
    first_slot: Int[Array, ""]


class SoftmaxAttention(nnx.Module):
    """out(attend(rope(q x), rope(k x), v x)), scaled by 1 / sqrt(head_dim)."""

    def __init__(self, config: ModelConfig):
        dim, head_dim = config.embed_dim, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.rotary_dim, self.rope_theta = config.rotary_dim, config.rope_theta
        self.q_proj = declare(
            (dim, heads, head_dim),
            ("embed", "heads", "head_dim"),
            fan_in=dim,
            fan_out=heads * head_dim,
        )
        kv_shape, kv_axes = (dim, kv_heads, head_dim), ("embed", "kv_heads", "head_dim")
        self.k_proj = declare(kv_shape, kv_axes, fan_in=dim, fan_out=kv_heads * head_dim)
        self.v_proj = declare(kv_shape, kv_axes, fan_in=dim, fan_out=kv_heads * head_dim)
        self.out_proj = declare(
            (heads, head_dim, dim),
            ("heads", "head_dim", "embed"),
            fan_in=heads * head_dim,
            fan_out=dim,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        slots: KeyValueSlots | None,
        *,
        implementation: str | None,
    ) -> tuple[Float[Array, "B T D"], KeyValueSlots | None]:
        """Return the layer's output and, with a cache, the slots with the new tokens in them."""
        q, k = (
            functional.rotary_embedding(
                functional.project("btd,dhk->bthk", x, kernel),
                sequence.positions,
                rotary_dim=self.rotary_dim,
                theta=self.rope_theta,
            )
            for kernel in (self.q_proj[...], self.k_proj[...])
        )
        v = functional.project("btd,dhk->bthk", x, self.v_proj[...])
        out: Any  # an array: no log-sum-exp is asked for
        if slots is None:
            out = softmax_attention(
                q, k, v, segment_ids=sequence.kernel_segment_ids, implementation=implementation
            )
        else:
            at = (slots.layer, 0, slots.first_slot, 0, 0)
            keys = jax.lax.dynamic_update_slice(slots.keys, k[None].astype(slots.keys.dtype), at)
            values = jax.lax.dynamic_update_slice(
                slots.values, v[None].astype(slots.values.dtype), at
            )
            slots = slots._replace(keys=keys, values=values)
            out = softmax_attention(
                q,
                jax.lax.dynamic_index_in_dim(keys, slots.layer, keepdims=False).astype(q.dtype),
                jax.lax.dynamic_index_in_dim(values, slots.layer, keepdims=False).astype(q.dtype),
                segment_ids=sequence.segment_ids,
                kv_segment_ids=slots.slot_segments,
                q_offset=slots.first_slot,
                implementation=implementation,
            )
        return functional.project("bthk,hkd->btd", out, self.out_proj[...]), slots
