"""`config.json` <-> ModelConfig: three schemas, their defaults, and everything that is refused."""

import copy
import dataclasses
import json
import math
import warnings
from typing import Any

import checkpoints
import hypothesis
import pytest
from hypothesis import strategies as st

import mmx
from mmx import ModelConfig
from mmx.config import PRESETS

TYPES = ("minimax_text_01", "minimax_m1", "minimax")
# The published config.json of Text-01, as far as facts 1.1 and 1.6 give it.
TEXT_01 = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_text_01",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}


def golden_fields(name):
    return checkpoints.read_fields(checkpoints.GOLDEN / name)


RELEASED = golden_fields(checkpoints.RELEASED)
TRANSFORMERS = golden_fields(checkpoints.TRANSFORMERS)
VL = {
    "model_type": "minimax_vl_01",
    "architectures": ["MiniMaxVL01ForConditionalGeneration"],
    "image_token_index": 200025,
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024},
    "text_config": {**RELEASED, "shared_intermediate_size": [0], "max_position_embeddings": 8192},
}
FAMILIES = {"released": RELEASED, "transformers": TRANSFORMERS, "vl": VL}


def read(fields, **changes):
    """from_hf, for which any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelConfig.from_hf({**fields, **changes})


def without(fields, *keys):
    return {key: value for key, value in fields.items() if key not in keys}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("model_type", ["minimax_text_01", "minimax_m1"])
def test_the_published_config_is_the_preset(model_type):
    assert read(TEXT_01, model_type=model_type) == mmx.preset("minimax-text-01")


def test_released_fields():
    config = read(RELEASED)
    assert config.layer_kinds == ("lightning", "lightning", "lightning", "softmax")
    assert (config.lightning_alpha, config.lightning_beta) == (1.7, 0.6)
    assert (config.softmax_alpha, config.softmax_beta) == (1.4, 0.8)
    assert (config.mlp_alpha, config.mlp_beta) == (1.3, 0.9)
    assert (config.num_kv_heads, config.head_dim, config.rotary_dim) == (2, 16, 8)
    assert (config.rope_theta, config.router_aux_loss_coef) == (10_000.0, 0.01)
    assert config.max_seq_len == 1024


def test_transformers_fields():
    config = read(TRANSFORMERS)
    assert config.layer_kinds == ("softmax", "lightning", "softmax", "lightning")
    assert (config.lightning_alpha, config.lightning_beta) == (1.7, 0.6)
    assert (config.softmax_alpha, config.softmax_beta) == (1.4, 0.8)
    assert (config.mlp_alpha, config.mlp_beta) == (1.3, 0.9)
    assert (config.chunk_size, config.rope_theta) == (16, 10_000.0)
    assert config.post_norm


def test_vl_is_its_text_part():
    assert read(VL) == read(RELEASED, max_position_embeddings=8192)
    tied = {**VL, "tie_word_embeddings": True}
    tied["text_config"] = without(VL["text_config"], "tie_word_embeddings", "model_type")
    assert read(tied).tie_embeddings
    shared = {**VL, "text_config": {**RELEASED, "shared_intermediate_size": [12]}}
    assert read(shared).shared_expert_dim == 12


@pytest.mark.parametrize(
    ("fields", "rotary_dim", "slope_base", "slope_layer_epsilon"),
    [(RELEASED, 8, "alibi", 0.0), (TRANSFORMERS, 8, "geometric", 1e-5), (VL, 8, "alibi", 0.0)],
    ids=FAMILIES,
)
def test_defaults_of_the_families(fields, rotary_dim, slope_base, slope_layer_epsilon):
    """Facts, item 4 and 1.4: what the two families compute and do not write down."""
    config = read(fields)
    assert config.rotary_dim == rotary_dim  # of heads of 16, of 8 (all of it), of 16
    assert config.slope_base == slope_base
    assert config.slope_layer_epsilon == slope_layer_epsilon
    assert config.lightning_norm_epsilon == 1e-6
    assert config.norm_epsilon == 1e-5


def test_defaults_where_keys_are_absent():
    bare = without(RELEASED, "head_dim", "num_key_value_heads", "rotary_dim", "rms_norm_eps",
                   "layernorm_mlp_alpha", "shared_intermediate_size", "bos_token_id")  # fmt: skip
    config = read(bare)
    assert (config.head_dim, config.num_kv_heads, config.rotary_dim) == (8, 4, 8)  # 32 / 4 heads
    assert (config.norm_epsilon, config.mlp_alpha, config.shared_expert_dim) == (1e-5, 1.0, 0)
    assert config.bos_token_id is None
    assert not read(without(RELEASED, "postnorm")).post_norm  # the released class's default
    assert read(without(TRANSFORMERS, "block_size")).chunk_size == 256
    assert read(RELEASED, head_dim=None, rotary_dim=None).head_dim == 8


@pytest.mark.parametrize(
    ("changes", "rotary_dim"),
    [
        ({"rotary_dim": 4}, 4),
        ({"partial_rotary_factor": 0.5}, 4),
        ({"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}, 2),
        ({"rotary_dim": 2, "partial_rotary_factor": 0.5}, 2),
        ({"rotary_dim": None}, 8),
    ],
)
def test_rope_width_of_transformers_when_it_is_said(changes, rotary_dim):
    assert read(TRANSFORMERS, **changes).rotary_dim == rotary_dim


def test_rope_theta_of_either_schema_of_transformers():
    old = {**without(TRANSFORMERS, "rope_parameters"), "rope_theta": 5e5, "rope_scaling": None}
    assert read(old).rope_theta == 5e5
    assert read(TRANSFORMERS, rope_theta=5e5).rope_theta == 1e4  # rope_parameters is the newer


def test_several_end_tokens():
    config = read(RELEASED, eos_token_id=[5, 7])
    assert config.eos_token_id == config.end_token_ids == (5, 7)
    assert json.loads(json.dumps(config.to_hf("minimax_m1")))["eos_token_id"] == [5, 7]
    assert read(RELEASED, eos_token_id=5).end_token_ids == (5,)
    assert read(RELEASED, eos_token_id=None).end_token_ids == ()


@pytest.mark.parametrize("fields", [RELEASED, TRANSFORMERS], ids=["released", "transformers"])
def test_unknown_keys_are_reported(fields):
    with pytest.warns(UserWarning, match="use_banana, use_mamba"):
        config = ModelConfig.from_hf({**fields, "use_mamba": True, "use_banana": 1})
    assert config == read(fields)


@pytest.mark.parametrize("name", checkpoints.GOLDEN_NAMES)
def test_golden_configs_raise_no_warning(name):
    fields = golden_fields(name)
    assert read(fields).num_layers == fields["num_hidden_layers"]


# ---------------------------------------------------------------- refusing

LAYERS = ["full_attention", "linear_attention", "full_attention", "linear_attention"]
REQUIRED = ("vocab_size", "hidden_size", "num_attention_heads", "num_local_experts",
            "num_experts_per_tok", "intermediate_size", "num_hidden_layers")  # fmt: skip
MALFORMED: list[tuple[str, str, Any]] = [
    *(("released", key, value) for key in REQUIRED for value in (32.0, "32", None, [32], 0, -4)),
    *(("transformers", key, value) for key in REQUIRED for value in (32.0, "32", None)),
    *((family, "hidden_act", "gelu") for family in ("released", "transformers")),
    *((family, "sliding_window", 4096) for family in ("released", "transformers")),
    *((family, "attention_dropout", 0.1) for family in ("released", "transformers")),
    *((family, "router_jitter_noise", 0.1) for family in ("released", "transformers")),
    *((family, "attention_bias", True) for family in ("released", "transformers")),
    *(("released", "attn_type_list", value)
      for value in ([0, 0, 1], [0, 0, 0, 2], [0, 0, 0, "1"], [0, 0, 0, []], [0, 0, 0, 1.5],
                    [0] * 5, "0001", None, {})),
    *(("transformers", "layer_types", value)
      for value in (LAYERS[:3], [*LAYERS[:3], "mamba"], [*LAYERS[:3], {}], "full_attention", None)),
    *(("transformers", "rope_parameters", value)
      for value in ("yarn", 8, {"rope_type": "yarn", "factor": 4.0},
                    {"type": "yarn", "factor": 4.0}, {"rope_type": None},
                    {"rope_theta": "big"}, {"partial_rotary_factor": "half"})),
    *(("transformers", "partial_rotary_factor", value)
      for value in (math.nan, math.inf, -1.0, 2.0, 0.0, "half")),
    ("transformers", "rotary_dim", 3),
    ("transformers", "head_dim", 10**400),
    ("released", "eos_token_id", []),
    ("released", "eos_token_id", 64),
    ("released", "eos_token_id", [True]),
    ("released", "eos_token_id", [5, 64]),
    ("released", "bos_token_id", [5]),
    ("released", "num_key_value_heads", 3),
    ("released", "num_key_value_heads", 0),
    ("released", "rope_theta", 10**400),
    ("released", "rms_norm_eps", 0),
    ("released", "postnorm", "yes"),
    ("released", "tie_word_embeddings", None),
    ("released", "shared_intermediate_size", [8, 16]),
    ("released", "shared_intermediate_size", [[8], [16]]),
    ("released", "shared_intermediate_size", "8"),
    ("released", "model_type", "llama"),
    ("released", "model_type", None),
    ("released", "model_type", ["minimax"]),
    ("vl", "text_config", None),
    ("vl", "text_config", []),
    ("vl", "text_config", {}),
    ("vl", "text_config", {"text_config": RELEASED}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key", "value"), MALFORMED, ids=[f"{f}-{k}-{str(v)[:24]}" for f, k, v in MALFORMED]
)
def test_malformed_values_are_refused(family, key, value):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf({**FAMILIES[family], key: value})
    message = str(caught.value)
    # Which input it was: its own name, or ours where the check is the config's.
    ours = {"num_key_value_heads": "num_kv_heads", "hidden_size": "embed_dim",
            "intermediate_size": "expert_dim", "num_attention_heads": "num_heads",
            "num_local_experts": "num_experts", "rms_norm_eps": "norm_epsilon",
            "postnorm": "post_norm", "tie_word_embeddings": "tie_embeddings",
            "partial_rotary_factor": "rotary_dim", "shared_intermediate_size": "shared_expert_dim",
            "text_config": "is missing"}  # fmt: skip
    inside = list(value) if key == "rope_parameters" and isinstance(value, dict) else []
    assert any(name in message for name in (key, ours.get(key, key), *inside)), message
    assert message.startswith(("config.json: ", "ModelConfig: ")), message


@pytest.mark.parametrize("key", [*REQUIRED, "attn_type_list"])
def test_missing_keys_are_refused_by_name(key):
    with pytest.raises(ValueError, match=f"config.json: {key} is "):
        ModelConfig.from_hf(without(RELEASED, key))


def test_unknown_model_type_lists_the_known():
    with pytest.raises(ValueError, match="unknown model_type 'llama'") as caught:
        ModelConfig.from_hf({**RELEASED, "model_type": "llama"})
    assert all(known in str(caught.value) for known in (*TYPES, "minimax_vl_01"))
    with pytest.raises(ValueError, match="unknown model_type None"):
        ModelConfig.from_hf({})


def test_shared_experts_are_mixed_by_a_sigmoid_or_refused():
    assert read(RELEASED, shared_intermediate_size=8).shared_expert_dim == 8
    with pytest.raises(ValueError, match="shared_moe_mode is 'softmax'"):
        read(RELEASED, shared_intermediate_size=8, shared_moe_mode="softmax")


def test_a_config_within_itself_ends_in_an_error():
    nested = VL
    for _ in range(2000):
        nested = {"model_type": "minimax_vl_01", "text_config": nested}
    with pytest.raises(ValueError, match="text_config"):
        ModelConfig.from_hf(nested)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 100)
    | st.sampled_from([0, -1, 2**31, 2**63, -(2**64), 10**400, math.nan, math.inf, -math.inf, 0.5])
    | st.floats()
    | st.sampled_from(["", "silu", "sigmoid", "default", "alibi", "minimax"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["rope_type", "rope_theta", "partial_rotary_factor", "type", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=5,
)
OPTIONAL = ("rope_scaling", "rope_theta", "rotary_dim", "partial_rotary_factor", "slope_base",
            "slope_layer_epsilon", "lightning_norm_epsilon", "chunk_size", "x")  # fmt: skip
DELETED = object()


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_config_is_read_or_refused(family, data):
    """One or two keys deleted or replaced by anything: a config or a ValueError, nothing else."""
    fields = copy.deepcopy(FAMILIES[family])
    target = fields
    if family == "vl" and data.draw(st.booleans()):
        target = fields["text_config"]
    keys = st.sampled_from([*target, *OPTIONAL])
    for key in data.draw(st.lists(keys, min_size=1, max_size=2, unique=True)):
        value = data.draw(JSON | st.just(DELETED))
        if value is DELETED:
            target.pop(key, None)
        else:
            target[key] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = ModelConfig.from_hf(fields)
        except ValueError:
            return
    assert isinstance(config, ModelConfig)
    assert hash(config) == hash(dataclasses.replace(config))


# ---------------------------------------------------------------- writing

SPECIAL = {
    "an epsilon": {"lightning_norm_epsilon": 1e-5},
    "slopes": {"slope_base": "geometric", "slope_layer_epsilon": 3e-5},
    "slopes 2": {"slope_base": "alibi", "slope_layer_epsilon": 0.0, "num_heads": 6},
    "chunks": {"chunk_size": 64},
    "all channels": {"rotary_dim": 16},
    "few channels": {"rotary_dim": 2},
    "tied, tokens": {"tie_embeddings": True, "bos_token_id": 0, "eos_token_id": 511},
    "two ends": {"eos_token_id": (5, 511)},
    "one layer": {"layer_kinds": ("softmax",)},
    "numbers": {"norm_epsilon": 3e-6, "rope_theta": 12345.5, "router_aux_loss_coef": 0.25,
                "max_seq_len": 7, "lightning_beta": 0.1, "softmax_beta": 0.2, "mlp_beta": 0.3},
}  # fmt: skip
CONFIGS = {
    **{name: mmx.preset(name) for name in PRESETS},
    **{name: ModelConfig.from_hf(golden_fields(name)) for name in checkpoints.GOLDEN_NAMES},
    **{name: dataclasses.replace(mmx.preset("tiny"), **new) for name, new in SPECIAL.items()},
}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_written_configs_read_back(name, model_type):
    config = CONFIGS[name]
    fields = json.loads(json.dumps(config.to_hf(model_type), allow_nan=False))
    assert fields["model_type"] == model_type
    assert read(fields) == config


def test_what_is_written_is_the_published_config():
    written = mmx.preset("minimax-text-01").to_hf()
    known = without(TEXT_01, "auto_map", "initializer_range", "output_router_logits",
                    "transformers_version")  # fmt: skip
    assert {key: written[key] for key in known} == known
    assert set(written) == set(known)  # none of our own keys is needed


@pytest.mark.parametrize("model_type", ["minimax_text_01", "minimax_m1"])
@pytest.mark.parametrize("changes", [{"post_norm": False}, {"shared_expert_dim": 24}])
def test_values_only_the_released_schema_can_say(changes, model_type):
    config = dataclasses.replace(mmx.preset("tiny"), **changes)
    assert read(json.loads(json.dumps(config.to_hf(model_type)))) == config
    field, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{field} is {value}.*minimax_text_01"):
        config.to_hf("minimax")


@pytest.mark.parametrize("model_type", ["minimax_vl_01", "llama", "", None])
def test_only_known_schemas_are_written(model_type):
    with pytest.raises(ValueError, match="unknown model_type") as caught:
        mmx.preset("tiny").to_hf(model_type)
    assert all(known in str(caught.value) for known in TYPES)
