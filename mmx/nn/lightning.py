"""Lightning attention as a layer: SiLU on q, k, v, decayed linear attention, norm, output gate."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmx.config import ModelConfig
from mmx.nn import functional
from mmx.nn.layers import RMSNorm, declare
from mmx.nn.memory import State
from mmx.nn.sequence import Sequence
from pallas_kernels import lightning_decode_step
from sharding import Partition, constrain
from sharding.attention import lightning_attention


class LightningAttention(nnx.Module):
    """out((norm(attend(silu(qkv x))) * sigmoid(gate x)); paper section 2.2.

    The norm spans all heads together. The gate sees the same normalised input as q, k and v.
    There is no positional encoding but the decay.
    """

    def __init__(self, config: ModelConfig):
        dim, heads, head_dim = config.embed_dim, config.num_heads, config.head_dim
        inner = heads * head_dim
        self.chunk_size = config.chunk_size
        # Head-major, so that a split over heads keeps each head's q, k and v together.
        self.qkv_proj = declare(
            (dim, heads, 3, head_dim),
            ("embed", "heads", None, "head_dim"),
            fan_in=dim,
            fan_out=3 * inner,
            inputs=(0,),
        )
        self.gate_proj = declare(
            (dim, heads, head_dim),
            ("embed", "heads", "head_dim"),
            fan_in=dim,
            fan_out=inner,
            inputs=(0,),
        )
        self.norm = RMSNorm(inner, "heads", epsilon=config.lightning_norm_epsilon)
        self.out_proj = declare(
            (heads, head_dim, dim),
            ("heads", "head_dim", "embed"),
            fan_in=inner,
            fan_out=dim,
            inputs=(0, 1),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        decay_slopes: Float[Array, "H"],
        state: State | None,
        *,
        implementation: str | None,
        partition: Partition | None = None,
    ) -> tuple[Float[Array, "B T D"], State | Float[Array, "B H K V"]]:
        """Return the layer's output and its state after the last token, in fp32.

        The state is a `State` if it was one, else an array.
        """
        # Few tokens, and all there is of them and of the weights on one device.
        alone = x.shape[1] == 1 and implementation is None and partition is None
        into_gate = functional.Product("btd,dhk->bthk", self.gate_proj[...], jnp.float32)
        gate = None  # of many tokens computed where it is used, and not kept till then
        # What is smaller is reordered: the weights, or of single tokens the activations.
        if x.shape[1] == 1:
            into_qkv = functional.Product("btd,dhck->bthck", self.qkv_proj[...])
            qkv, gate = functional.project_together(x, into_qkv, into_gate, skinny=alone)
            qkv = qkv.swapaxes(2, 3)
        else:
            kernel = jax.tree.map(lambda w: jnp.swapaxes(w, 1, 2), self.qkv_proj[...])
            qkv = functional.project("btd,dchk->btchk", x, kernel)
        qkv = constrain(qkv, "batch", "seq", None, "heads", None, partition=partition)
        qkv = functional.silu(qkv)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if state is not None and x.shape[1] == 1:
            out, states = lightning_decode_step(
                q[:, 0],
                k[:, 0],
                v[:, 0],
                decay_slopes,
                state.states,
                layer=state.layer,
                real=sequence.real[:, 0],
                continues=sequence.continues,
                implementation=None if alone else "xla",
            )
            out, after = out[:, None], State(states, state.layer)
        else:
            initial_state = None
            if state is not None:
                assert sequence.continues is not None
                initial_state = jnp.where(sequence.continues[:, None, None, None], state.value(), 0)
            out, final_state = lightning_attention(
                q,
                k,
                v,
                decay_slopes,
                initial_state=initial_state,
                segment_ids=sequence.kernel_segment_ids,
                chunk_size=self.chunk_size,
                implementation=implementation,
                partition=partition,
            )
            after = final_state if state is None else state.replaced(final_state)
        heads, head_dim = out.shape[2:]
        out = self.norm(out.reshape(*out.shape[:2], heads * head_dim)).reshape(out.shape)
        if gate is None:
            (gate,) = functional.project_together(x, into_gate, skinny=False)
        gate = constrain(gate, "batch", "seq", "heads", None, partition=partition)
        out = _gated(out, gate)
        into_out = functional.Product("bthk,hkd->btd", self.out_proj[...])
        return functional.project_together(out, into_out, skinny=alone)[0], after


@functional.recomputed
def _gated(out: Float[Array, "B T H V"], gate: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
    return (out.astype(jnp.float32) * jax.nn.sigmoid(gate)).astype(out.dtype)
