"""Model FLOPs of the hybrid, and the share of a device's peak they are.

A multiplication and an addition are two FLOPs. Counted are the products of matrices that the model
is defined by; norms, activations, softmax and the optimizer are left out, and so is anything that
is computed twice to save memory. Sequences are counted as one sample of their whole length.
"""

import dataclasses
from dataclasses import dataclass

from mmx.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass, a token, by what they are for: all layers of a kind together.

    Attributes:
      lightning_projections, lightning_attention: q, k, v, gate and output; and what is between.
      softmax_projections, softmax_attention: q, k, v and output; and what is between.
      experts: of the experts a token uses, and the shared one.
      router: scores of all experts.
      head: logits. The embedding is looked up, not multiplied.
    """

    lightning_projections: float
    lightning_attention: float
    softmax_projections: float
    softmax_attention: float
    experts: float
    router: float
    head: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> Flops:
    """FLOPs of a forward pass over `seq_len` tokens, divided by `seq_len`.

    Softmax attention counts the pairs that causality leaves: a token sees (T + 1) / 2 others on
    average, 2 K FLOPs for a score and 2 K for its value. Lightning attention counts the chunked
    form: the same inside a chunk, and per token and head one product with the state (2 K V) and one
    update of it (2 K V). So it grows linearly with T; softmax attention with its square.

    Args:
      config: of the model; `chunk_size` counts.
      seq_len: T; at least 1.

    Raises:
      ValueError: seq_len below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
    lightning = config.layer_kinds.count("lightning")
    softmax = config.num_layers - lightning
    dim, heads, head_dim = config.embed_dim, config.num_heads, config.head_dim
    inner, kv_inner = heads * head_dim, config.num_kv_heads * head_dim
    whole, rest = divmod(seq_len, config.chunk_size)
    pairs_in_chunks = (whole * _pairs(config.chunk_size) + _pairs(rest)) / seq_len
    per_pair = 4 * inner  # a score and its value, all heads
    gated_mlp = 3 * 2 * dim
    shared = config.shared_expert_dim
    return Flops(
        lightning_projections=lightning * 2 * dim * 5 * inner,
        lightning_attention=lightning * (per_pair * pairs_in_chunks + 4 * inner * head_dim),
        softmax_projections=softmax * 2 * dim * (2 * inner + 2 * kv_inner),
        softmax_attention=softmax * per_pair * _pairs(seq_len) / seq_len,
        experts=config.num_layers
        * (
            gated_mlp * (config.num_experts_per_tok * config.expert_dim + shared)
            + (2 * dim if shared else 0)
        ),
        router=config.num_layers * 2 * dim * config.num_experts,
        head=2 * dim * config.vocab_size,
    )


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of training, a token: three forward passes, the backward being two of them."""
    return 3 * forward_flops_per_token(config, seq_len).total


def _pairs(length: int) -> int:
    """Pairs (query, key) with key <= query."""
    return length * (length + 1) // 2


# Dense bf16 peak of one device in TFLOP/s from the vendors' data sheets, without sparsity; by a
# part of jax's `device_kind` in lower case, the first that fits.
_PEAKS = (
    ("h200", 989.5),
    ("h100 pcie", 756.5),
    ("h100 nvl", 835.5),
    ("h100", 989.5),
    ("h800", 989.5),
    ("h20", 148.0),
    ("gb200", 2500.0),
    ("b200", 2250.0),
    ("a100", 312.0),
    ("a800", 312.0),
    ("l40s", 362.0),
    ("l40", 181.0),
    ("l4", 121.0),
    ("tpu v6 lite", 918.0),
    ("tpu v6e", 918.0),
    ("tpu v5 lite", 197.0),
    ("tpu v5e", 197.0),
    ("tpu v5p", 459.0),
    ("tpu v5", 459.0),
    ("tpu v4", 275.0),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s one device can do at most; None when it is not known.

    Args:
      device_kind: `jax.devices()[0].device_kind`, such as 'NVIDIA H200' or 'TPU v5 lite'.
    """
    kind = device_kind.lower()
    return next((tera * 1e12 for name, tera in _PEAKS if name in kind), None)
