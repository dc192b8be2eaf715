"""Array operations of MiniMax-01 with interchangeable implementations.

Every operation has one signature and several implementations; `implementation=None` takes the
best one for the platform. This package knows jax only: no model config, no module, no mesh.
"""

from pallas_kernels.expert_mixture.api import expert_mixture as expert_mixture
from pallas_kernels.expert_mixture.api import supported as expert_mixture_supported
from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from pallas_kernels.lightning_attention.api import lightning_attention as lightning_attention
from pallas_kernels.lightning_attention.api import lightning_decode_step as lightning_decode_step
from pallas_kernels.lightning_attention.api import lightning_state as lightning_state
from pallas_kernels.paged_attention.api import paged_attention as paged_attention
from pallas_kernels.skinny_matmul.api import skinny_matmul as skinny_matmul
from pallas_kernels.skinny_matmul.api import supported as skinny_matmul_supported
from pallas_kernels.softmax_attention.api import (
    attention_block_backward as attention_block_backward,
)
from pallas_kernels.softmax_attention.api import softmax_attention as softmax_attention

__all__ = [
    "attention_block_backward",
    "expert_mixture",
    "expert_mixture_supported",
    "grouped_matmul",
    "lightning_attention",
    "lightning_decode_step",
    "lightning_state",
    "paged_attention",
    "skinny_matmul",
    "skinny_matmul_supported",
    "softmax_attention",
]
