"""Softmax attention as a layer: grouped-query, RoPE on the leading channels of each head."""

import functools

from flax import nnx
from jaxtyping import Array, Float

from mmx.config import ModelConfig
from mmx.nn import functional
from mmx.nn.layers import declare
from mmx.nn.memory import KeyValues
from mmx.nn.sequence import Sequence
from sharding import Partition, constrain
from sharding.attention import softmax_attention


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
            inputs=(0,),
        )
        shape, axes = (dim, kv_heads, head_dim), ("embed", "kv_heads", "head_dim")
        fan_out = kv_heads * head_dim
        self.k_proj = declare(shape, axes, fan_in=dim, fan_out=fan_out, inputs=(0,))
        self.v_proj = declare(shape, axes, fan_in=dim, fan_out=fan_out, inputs=(0,))
        self.out_proj = declare(
            (heads, head_dim, dim),
            ("heads", "head_dim", "embed"),
            fan_in=heads * head_dim,
            fan_out=dim,
            inputs=(0, 1),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        memory: KeyValues | None,
        *,
        implementation: str | None,
        partition: Partition | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """Return the layer's output and, with a memory, that with the new tokens in it."""
        # Few tokens, and all there is of them and of the weights on one device.
        alone = x.shape[1] == 1 and implementation is None and partition is None
        kernels = (self.q_proj[...], self.k_proj[...], self.v_proj[...])
        products = (functional.Product("btd,dhk->bthk", kernel) for kernel in kernels)
        q, k, v = (
            constrain(projected, "batch", "seq", heads, None, partition=partition)
            for projected, heads in zip(
                functional.project_together(x, *products, skinny=alone),
                ("heads", "kv_heads", "kv_heads"),
                strict=True,
            )
        )
        rotate = functools.partial(
            functional.rotary_embedding, rotary_dim=self.rotary_dim, theta=self.rope_theta
        )
        q, k = rotate(q, sequence.positions), rotate(k, sequence.positions)
        how = {"implementation": implementation, "partition": partition}
        if memory is None:
            out = softmax_attention(q, k, v, segment_ids=sequence.kernel_segment_ids, **how)
        else:
            out, memory = memory.attend(q, k, v, sequence, **how)
        into_out = functional.Product("bthk,hkd->btd", self.out_proj[...])
        return functional.project_together(out, into_out, skinny=alone)[0], memory
