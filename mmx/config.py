"""What a model is: one frozen, hashable record, validated when it is made.

Hugging Face's names for these fields live in `mmx.convert.hf_config` alone.
"""

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

LayerKind = Literal["lightning", "softmax"]
_LIGHTNING: tuple[LayerKind, ...] = ("lightning",)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a MiniMax-01 model; every field is a plain value, so it can be static.

    Attributes:
      vocab_size, embed_dim: rows and width of the embedding.
      layer_kinds: 'lightning' or 'softmax' for each layer, first to last.
      num_heads, head_dim: query heads and their width, both kinds of layer; their product need not
        be `embed_dim`.
      num_kv_heads: key/value heads of the softmax layers. Lightning layers do not share heads.
      rotary_dim: leading channels of each softmax head that RoPE rotates; even.
      rope_theta: RoPE base.
      num_experts, num_experts_per_tok, expert_dim: experts, experts a token, their hidden width.
      shared_expert_dim: hidden width of the expert every token uses; 0 for none (as released).
      norm_epsilon: of the model-width RMSNorms.
      lightning_norm_epsilon: of the RMSNorm inside lightning attention.
      slope_base: base slopes for a number of heads that is no power of two; 'alibi' interpolates
        (the released code), 'geometric' does not (transformers). Equal for powers of two.
      slope_layer_epsilon: added to L - 1 in the layer factor of the slopes; 0 in the released
        code, 1e-5 in transformers.
      lightning_alpha, lightning_beta, softmax_alpha, softmax_beta, mlp_alpha, mlp_beta: weights of
        the residual (alpha) and of the branch (beta).
      post_norm: the residual is the normalised input (DeepNorm style, as released) or, when False,
        the input itself.
      tie_embeddings: the head is the embedding, transposed.
      router_aux_loss_coef: default coefficient of the balance loss in training.
      max_seq_len: the longest sequence, in tokens.
      chunk_size: tokens a chunk of lightning attention; changes speed, not results.
      bos_token_id, eos_token_id: as the checkpoint says; None when it does not. Several end tokens
        are a tuple.
    """

    vocab_size: int
    embed_dim: int
    layer_kinds: tuple[LayerKind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    num_experts: int
    num_experts_per_tok: int
    expert_dim: int
    shared_expert_dim: int = 0
    rope_theta: float = 10_000_000.0
    norm_epsilon: float = 1e-5
    lightning_norm_epsilon: float = 1e-6
    slope_base: Literal["alibi", "geometric"] = "alibi"
    slope_layer_epsilon: float = 0.0
    lightning_alpha: float = 1.0
    lightning_beta: float = 1.0
    softmax_alpha: float = 1.0
    softmax_beta: float = 1.0
    mlp_alpha: float = 1.0
    mlp_beta: float = 1.0
    post_norm: bool = True
    tie_embeddings: bool = False
    router_aux_loss_coef: float = 0.001
    max_seq_len: int = 10_240_000
    chunk_size: int = 256
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("layer_kinds", "eos_token_id"):
            if isinstance(value := getattr(self, field), list):
                object.__setattr__(self, field, tuple(value))
        _validate(self)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Each of which ends a text."""
        ends = self.eos_token_id
        if isinstance(ends, tuple):
            return ends
        return () if ends is None else (ends,)

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def superblock(self) -> tuple[LayerKind, ...]:
        """The smallest run of layers whose repetition is the whole stack (7 + 1 in Text-01).

        A stack that does not repeat is one superblock, so its layers run unrolled.
        """
        kinds = self.layer_kinds
        sizes = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
        return next(kinds[:n] for n in sizes if kinds[:n] * (len(kinds) // n) == kinds)

    @property
    def num_superblocks(self) -> int:
        return self.num_layers // len(self.superblock)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Read the content of a `config.json`: released, transformers, or VL-01 (its text part).

        Raises:
          ValueError: unknown model_type, a missing key, a value that is not supported.
        """
        from mmx.convert import hf_config

        return hf_config.from_hf(fields)

    def to_hf(self, model_type: str = "minimax_text_01") -> dict[str, Any]:
        """Write the content of a `config.json` in the schema of `model_type`.

        Raises:
          ValueError: unknown model_type.
        """
        from mmx.convert import hf_config

        return hf_config.to_hf(self, model_type)


def decay_slopes(config: ModelConfig) -> Float[np.ndarray, "layers heads"]:
    """Slopes of all layers, fp32 >= 0; head h of layer l forgets by exp(-slopes[l, h]) a token.

    base_h (1 - l / (L - 1 + slope_layer_epsilon) + 1e-5), with l the index among *all* layers and
    base the ALiBi slopes 2^(-8 (h + 1) / H). Rows of softmax layers are never used.
    """
    heads, layers = config.num_heads, config.num_layers
    base = _geometric_slopes(heads)
    if config.slope_base == "alibi" and heads & (heads - 1):
        # ALiBi's rule: slopes of the power of two below, then every second one of the double.
        below = 1 << (heads.bit_length() - 1)
        extra = _geometric_slopes(2 * below)[::2][: heads - below]
        base = np.concatenate([_geometric_slopes(below), extra])
    layer = np.arange(layers, dtype=np.float64)
    depth = layer / (max(layers - 1, 1) + config.slope_layer_epsilon)
    return ((1 - depth + 1e-5)[:, None] * base).astype(np.float32)


def _geometric_slopes(heads: int) -> Float[np.ndarray, "heads"]:
    return 2.0 ** (-8.0 * np.arange(1, heads + 1, dtype=np.float64) / heads)


def _validate(config: ModelConfig) -> None:
    def require(ok: bool, field: str, wanted: str) -> None:
        if not ok:
            value = getattr(config, field)
            raise ValueError(f"ModelConfig: {field} is {value!r}; {wanted}")

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in (int, "int"):
            ok = isinstance(value, int) and not isinstance(value, bool)
            require(ok, field.name, "it must be an integer")
            least = 0 if field.name == "shared_expert_dim" else 1
            wanted = f"it must be at least {least} and below 2^31"
            require(least <= value < 1 << 31, field.name, wanted)
        elif field.type in (float, "float"):
            ok = isinstance(value, int | float) and not isinstance(value, bool)
            # A comparison, not isfinite: an integer too large for a float is no number either.
            require(
                ok and abs(value) < sys.float_info.max, field.name, "it must be a finite number"
            )
        elif field.type in (bool, "bool"):
            require(isinstance(value, bool), field.name, "it must be true or false")
    kinds = config.layer_kinds
    require(isinstance(kinds, tuple), "layer_kinds", "it must be a tuple of layer kinds")
    require(len(kinds) > 0, "layer_kinds", "there must be at least one layer")
    wrong = sorted({repr(k) for k in kinds} - {"'lightning'", "'softmax'"})
    wanted = f"each must be 'lightning' or 'softmax', not {', '.join(wrong)}"
    require(not wrong, "layer_kinds", wanted)
    require(
        config.num_heads % config.num_kv_heads == 0,
        "num_kv_heads",
        f"it must divide num_heads={config.num_heads}",
    )
    require(
        config.rotary_dim % 2 == 0 and config.rotary_dim <= config.head_dim,
        "rotary_dim",
        f"it must be even and at most head_dim={config.head_dim}",
    )
    require(
        config.num_experts_per_tok <= config.num_experts,
        "num_experts_per_tok",
        f"it must be at most num_experts={config.num_experts}",
    )
    require(config.slope_base in ("alibi", "geometric"), "slope_base", "use 'alibi' or 'geometric'")
    for field in ("norm_epsilon", "lightning_norm_epsilon", "rope_theta"):
        require(getattr(config, field) > 0, field, "it must be greater than 0")
    require(config.slope_layer_epsilon >= 0, "slope_layer_epsilon", "it must be at least 0")
    for field, several in (("bos_token_id", ""), ("eos_token_id", ", or a tuple of such")):
        value = getattr(config, field)
        ids = value if isinstance(value, tuple) and value and several else (value,)
        in_range = value is None or all(
            isinstance(x, int) and not isinstance(x, bool) and 0 <= x < config.vocab_size
            for x in ids
        )
        wanted = f"it must be None or a token id below vocab_size={config.vocab_size}{several}"
        require(in_range, field, wanted)


def _released(superblocks: int) -> ModelConfig:
    """MiniMax-Text-01 at its released width, with this many of its ten superblocks."""
    alpha = 3.5565588200778455  # (2 * 80)^0.25, the DeepNorm value of the 80-layer stack
    return ModelConfig(
        vocab_size=200_064,
        embed_dim=6144,
        layer_kinds=(*_LIGHTNING * 7, "softmax") * superblocks,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=64,
        num_experts=32,
        num_experts_per_tok=2,
        expert_dim=9216,
        lightning_alpha=alpha,
        softmax_alpha=alpha,
        mlp_alpha=alpha,
    )


def _bench_4b() -> ModelConfig:
    alpha = (2 * 16) ** 0.25
    return dataclasses.replace(
        _released(superblocks=2),
        vocab_size=32_000,
        embed_dim=2048,
        num_heads=16,
        num_kv_heads=4,
        num_experts=8,
        expert_dim=4096,
        lightning_alpha=alpha,
        softmax_alpha=alpha,
        mlp_alpha=alpha,
    )


def _small(
    *, vocab_size: int, embed_dim: int, heads: int, head_dim: int, superblocks: int,
    experts: int, expert_dim: int,
) -> ModelConfig:  # fmt: skip
    """MiniMax-Text-01's proportions at another size: 7 + 1 layers, half of each head rotated."""
    alpha = (2 * 8 * superblocks) ** 0.25
    return dataclasses.replace(
        _released(superblocks=superblocks),
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=max(1, heads // 4),
        head_dim=head_dim,
        rotary_dim=head_dim // 2,
        num_experts=experts,
        expert_dim=expert_dim,
        rope_theta=10_000.0,
        lightning_alpha=alpha,
        softmax_alpha=alpha,
        mlp_alpha=alpha,
    )


def _demo() -> ModelConfig:
    small = _small(
        vocab_size=2048, embed_dim=128, heads=8, head_dim=16, superblocks=1, experts=4,
        expert_dim=128,
    )  # fmt: skip
    return dataclasses.replace(small, chunk_size=32)


def _1b() -> ModelConfig:
    return _small(
        vocab_size=32_000, embed_dim=1024, heads=16, head_dim=64, superblocks=2, experts=8,
        expert_dim=2048,
    )  # fmt: skip


def _tiny() -> ModelConfig:
    alpha = (2 * 8) ** 0.25
    return ModelConfig(
        vocab_size=512,
        embed_dim=64,
        layer_kinds=(*_LIGHTNING * 3, "softmax") * 2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        expert_dim=64,
        rope_theta=10_000.0,
        lightning_alpha=alpha,
        softmax_alpha=alpha,
        mlp_alpha=alpha,
        max_seq_len=65_536,
    )


PRESETS = {
    "minimax-text-01": lambda: _released(superblocks=10),
    "minimax-m1-40k": lambda: _released(superblocks=10),
    "minimax-m1-80k": lambda: _released(superblocks=10),
    "slice-8": lambda: _released(superblocks=1),
    "bench-4b": _bench_4b,
    "1b": _1b,
    "demo": _demo,
    "tiny": _tiny,
}


def preset(name: str) -> ModelConfig:
    """A named configuration; M1 is the network of Text-01 with other weights.

    Raises:
      ValueError: unknown name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}The presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
