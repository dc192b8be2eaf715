"""The two primitives of cuDNN's fused attention, as jax binds them.

They are bound directly, and not through `jax.nn.dot_product_attention`, for three things it does
not offer: the log-sum-exp in fp32, the backward pass with a log-sum-exp and an output that were
merged over several blocks of keys (ring attention), and packed samples whose borders are traced.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

# Stands for the log-sum-exp of a query that saw nothing: exp(score - this) is 0, and no NaN.
NOTHING_SEEN = 1e30


class Mask(NamedTuple):
    """The static part of a call."""

    causal: bool
    padded: bool
    scale: float

    @property
    def type(self) -> cudnn.MaskType:
        if self.padded:
            return cudnn.MaskType.PADDING_CAUSAL if self.causal else cudnn.MaskType.PADDING
        return cudnn.MaskType.CAUSAL if self.causal else cudnn.MaskType.NO_MASK


class Place(NamedTuple):
    """Which rows there are; None: every row is one sample that fills it.

    Attributes:
      q_length, kv_length: int32 tokens, of each row [B] or of each sample of each row [B, M].
      q_begins, kv_begins: int32 [B, M+1], where samples begin; None with one sample a row.
    """

    q_length: Any = None
    kv_length: Any = None
    q_begins: Any = None
    kv_begins: Any = None


def forward(mask: Mask, q, k, v, place: Place) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, K] and the log-sum-exp in fp32, [B, H, T] or a sample [B*M, H, T]."""
    return cudnn._dot_product_attention_fwd_p_wrapper.bind(
        *_operands(q, k, v, place), **_parameters(mask), is_training=True
    )


def backward(mask: Mask, q, k, v, place: Place, lse, out, grad_out) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v from what `forward` gives, or what stands for it."""
    return cudnn._dot_product_attention_bwd_p_wrapper.bind(
        *_operands(q, k, v, place), lse, out, grad_out, **_parameters(mask)
    )


def _operands(q, k, v, place: Place):
    """Operands of both primitives up to their own: no bias, no pages."""
    none = jnp.zeros(0, q.dtype)
    return q, k, v, none, *(none if x is None else x for x in place), none, none


def _parameters(mask: Mask):
    return dict(
        scale=mask.scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask.type,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )
