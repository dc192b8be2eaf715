"""`config.json` of Hugging Face checkpoints <-> ModelConfig, in the three schemas there are.

- released: `minimax_text_01` and `minimax_m1`, the publisher's own code;
- transformers: `minimax`, the class inside the transformers library;
- VL-01: `minimax_vl_01`, whose `text_config` is the released schema.

The two families differ in three defaults (RoPE width, slopes, an epsilon); each is read into a
field of its own, so nothing later asks where a model came from. Where a schema cannot say a value,
`to_hf` adds our own key for it and `from_hf` obeys it.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mmx.config import LayerKind, ModelConfig

RELEASED_TYPES = ("minimax_text_01", "minimax_m1")
TRANSFORMERS_TYPE = "minimax"
VL_TYPE = "minimax_vl_01"
MODEL_TYPES = (*RELEASED_TYPES, TRANSFORMERS_TYPE, VL_TYPE)

# Keys both families share: Hugging Face's name -> ours.
_SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "intermediate_size": "expert_dim",
    "rms_norm_eps": "norm_epsilon",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tie_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_attention_heads", "num_local_experts",
             "num_experts_per_tok", "intermediate_size", "num_hidden_layers")  # fmt: skip
_RELEASED_RESIDUALS = {
    "layernorm_linear_attention_alpha": "lightning_alpha",
    "layernorm_linear_attention_beta": "lightning_beta",
    "layernorm_full_attention_alpha": "softmax_alpha",
    "layernorm_full_attention_beta": "softmax_beta",
    "layernorm_mlp_alpha": "mlp_alpha",
    "layernorm_mlp_beta": "mlp_beta",
}
_TRANSFORMERS_RESIDUALS = {
    "linear_attn_alpha_factor": "lightning_alpha",
    "linear_attn_beta_factor": "lightning_beta",
    "full_attn_alpha_factor": "softmax_alpha",
    "full_attn_beta_factor": "softmax_beta",
    "mlp_alpha_factor": "mlp_alpha",
    "mlp_beta_factor": "mlp_beta",
}
_KIND_OF_NUMBER: dict[Any, LayerKind] = {0: "lightning", 1: "softmax"}
_KIND_OF_NAME: dict[Any, LayerKind] = {
    "linear_attention": "lightning",
    "full_attention": "softmax",
}
# Our own keys: values that a schema has no word for.
OWN_KEYS = ("lightning_norm_epsilon", "slope_base", "slope_layer_epsilon", "chunk_size")
# The one value of each that this implementation computes; another one is refused.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "router_jitter_noise": (0, 0.0),
    "sliding_window": (None,),
    "attention_bias": (False,),
}
# Bookkeeping that says nothing about the numbers.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "head_dim",
        "initializer_range",
        "model_type",
        "num_hidden_layers",
        "num_key_value_heads",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a `config.json`; see `ModelConfig.from_hf`. Unknown keys are reported by a warning."""
    model_type = fields.get("model_type")
    if model_type == VL_TYPE:
        return from_hf(_text_fields(fields))
    if model_type in RELEASED_TYPES:
        read = _read_released
    elif model_type == TRANSFORMERS_TYPE:
        read = _read_transformers
    else:
        raise ValueError(
            f"config.json: unknown model_type {model_type!r}; known are {', '.join(MODEL_TYPES)}"
        )
    _check_values(fields)
    ours: dict[str, Any] = {}
    used = set(_IGNORED) | set(_ONLY)
    for key, name in _SHARED.items():
        used.add(key)
        if key in fields:
            ours[name] = fields[key]
    if ours.get("eos_token_id") == []:
        raise ValueError("config.json: eos_token_id is []; it must be a token id or null")
    heads = fields["num_attention_heads"]
    ours["num_kv_heads"] = _or_default(fields, "num_key_value_heads", heads)
    ours["head_dim"] = _or_default(
        fields, "head_dim", fields["hidden_size"] // heads if heads else 0
    )
    read(fields, ours, used)
    for key in OWN_KEYS:
        used.add(key)
        if key in fields:
            ours[key] = fields[key]
    unknown = sorted(set(fields) - used)
    if unknown:
        warnings.warn(f"config.json: unknown keys are not used: {', '.join(unknown)}", stacklevel=3)
    return ModelConfig(**ours)


def _text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's part of a VL-01 config, in the released schema."""
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError("config.json: text_config is missing; minimax_vl_01 must have one")
    if text.get("model_type", RELEASED_TYPES[0]) not in RELEASED_TYPES:
        raise ValueError(
            f"config.json: text_config.model_type is {text['model_type']!r}; "
            f"it must be one of {', '.join(RELEASED_TYPES)}"
        )
    tied = {"tie_word_embeddings": fields.get("tie_word_embeddings", False)}
    return {**tied, "model_type": RELEASED_TYPES[0], **text}


def _check_values(fields: Mapping[str, Any]) -> None:
    for key in _REQUIRED:
        if not isinstance(fields.get(key), int):
            seen = f"is {fields[key]!r}" if key in fields else "is missing"
            raise ValueError(f"config.json: {key} {seen}; it must be an integer")
    for key, values in _ONLY.items():
        if key in fields and fields[key] not in values:
            raise ValueError(
                f"config.json: {key} is {fields[key]!r}; only {values[0]!r} is supported"
            )


def _read_released(fields: Mapping[str, Any], ours: dict[str, Any], used: set[str]) -> None:
    if fields.get("rope_scaling") is not None:
        raise ValueError(
            f"config.json: rope_scaling is {fields['rope_scaling']!r}; only null is supported"
        )
    used |= {*_RELEASED_RESIDUALS, "attn_type_list", "layer_types", "postnorm", "rotary_dim"}
    used |= {"rope_scaling", "rope_theta", "shared_intermediate_size", "shared_moe_mode"}
    ours["layer_kinds"] = _layer_kinds(fields, "attn_type_list", _KIND_OF_NUMBER)
    for key, name in _RELEASED_RESIDUALS.items():
        ours[name] = fields.get(key, 1.0)
    ours["post_norm"] = fields.get("postnorm", False)
    ours["rotary_dim"] = _or_default(fields, "rotary_dim", ours["head_dim"])
    ours["rope_theta"] = _or_default(fields, "rope_theta", 1e6)
    ours["shared_expert_dim"] = _shared_expert_dim(fields)
    ours["slope_base"], ours["slope_layer_epsilon"] = "alibi", 0.0


def _read_transformers(fields: Mapping[str, Any], ours: dict[str, Any], used: set[str]) -> None:
    used |= {*_TRANSFORMERS_RESIDUALS, "layer_types", "rope_parameters", "rope_theta",
             "rope_scaling", "rotary_dim", "partial_rotary_factor", "block_size"}  # fmt: skip
    ours["layer_kinds"] = _layer_kinds(fields, "layer_types", _KIND_OF_NAME)
    for key, name in _TRANSFORMERS_RESIDUALS.items():
        ours[name] = fields.get(key, 1.0)
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters is {rope!r}; it must be an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(
            f"config.json: rope_parameters.rope_type is {rope_type!r}; only 'default' is supported"
        )
    ours["rope_theta"] = rope.get("rope_theta", _or_default(fields, "rope_theta", 1e6))
    # The class in transformers rotates the whole head unless the config says otherwise.
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if not isinstance(partial, int | float) or not 0 < partial <= 1:
        raise ValueError(f"config.json: partial_rotary_factor is {partial!r}; it must be in (0, 1]")
    whole = ours["head_dim"]
    if partial != 1 and isinstance(whole, int) and whole < 1 << 30:
        whole = int(whole * partial)
    ours["rotary_dim"] = _or_default(fields, "rotary_dim", whole)
    ours["chunk_size"] = fields.get("block_size", 256)
    ours["post_norm"] = True
    ours["slope_base"], ours["slope_layer_epsilon"] = "geometric", 1e-5


def _or_default(fields: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, or the default where the key is absent or null."""
    value = fields.get(key)
    return default if value is None else value


def _layer_kinds(
    fields: Mapping[str, Any], key: str, kinds: Mapping[Any, LayerKind]
) -> tuple[LayerKind, ...]:
    layers, values = fields["num_hidden_layers"], fields.get(key)
    if not isinstance(values, list) or len(values) != layers:
        seen = f"has {len(values)} entries" if isinstance(values, list) else f"is {values!r}"
        raise ValueError(
            f"config.json: {key} {seen}; it must be a list of num_hidden_layers={layers}"
        )
    for value in values:
        if not isinstance(value, int | str) or value not in kinds:
            known = ", ".join(repr(k) for k in kinds)
            raise ValueError(f"config.json: {key} contains {value!r}; known are {known}")
    return tuple(kinds[v] for v in values)


def _shared_expert_dim(fields: Mapping[str, Any]) -> int:
    value = fields.get("shared_intermediate_size", 0)
    if isinstance(value, list):  # VL-01 writes a list, [0]
        if any(v != value[0] for v in value):
            raise ValueError(
                f"config.json: shared_intermediate_size is {value!r}; "
                "layers with different shared experts are not supported"
            )
        value = value[0] if value else 0
    mode = fields.get("shared_moe_mode", "sigmoid")
    if value and mode != "sigmoid":
        raise ValueError(f"config.json: shared_moe_mode is {mode!r}; only 'sigmoid' is supported")
    return value


def to_hf(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Write a `config.json`; see `ModelConfig.to_hf`."""
    writers: dict[str, tuple[str, Callable[[ModelConfig], dict[str, Any]]]] = {
        "minimax_text_01": ("MiniMaxText01ForCausalLM", _write_released),
        "minimax_m1": ("MiniMaxM1ForCausalLM", _write_released),
        TRANSFORMERS_TYPE: ("MiniMaxForCausalLM", _write_transformers),
    }
    if model_type not in writers:
        raise ValueError(
            f"to_hf: unknown model_type {model_type!r}; known are {', '.join(writers)}"
        )
    architecture, write = writers[model_type]
    fields: dict[str, Any] = {"model_type": model_type, "architectures": [architecture]}
    for key, name in _SHARED.items():
        value = getattr(config, name)
        fields[key] = list(value) if isinstance(value, tuple) else value
    fields |= {
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "use_cache": True,
    }
    fields |= write(config)
    # A reader of ours takes these keys; for any other they are the schema's own values already.
    defaults = from_hf(fields)
    for key in OWN_KEYS:
        if getattr(config, key) != getattr(defaults, key):
            fields[key] = getattr(config, key)
    return fields


def _write_released(config: ModelConfig) -> dict[str, Any]:
    return {
        "attn_type_list": [0 if k == "lightning" else 1 for k in config.layer_kinds],
        **{key: getattr(config, name) for key, name in _RELEASED_RESIDUALS.items()},
        "postnorm": config.post_norm,
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rope_theta,
        "shared_intermediate_size": config.shared_expert_dim,
        "shared_moe_mode": "sigmoid",
    }


def _write_transformers(config: ModelConfig) -> dict[str, Any]:
    for field, wanted in (("post_norm", True), ("shared_expert_dim", 0)):
        if getattr(config, field) != wanted:
            raise ValueError(
                f"to_hf: {field} is {getattr(config, field)!r}, and model_type 'minimax' has no "
                "word for it; write 'minimax_text_01' instead"
            )
    names = {"lightning": "linear_attention", "softmax": "full_attention"}
    fields = {
        "layer_types": [names[k] for k in config.layer_kinds],
        **{key: getattr(config, name) for key, name in _TRANSFORMERS_RESIDUALS.items()},
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "block_size": config.chunk_size,
    }
    if config.rotary_dim != config.head_dim:
        fields["rotary_dim"] = config.rotary_dim
    return fields
