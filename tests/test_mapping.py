"""The table between checkpoints and parameters, against an independent list of names and shapes."""

import dataclasses
import math
from collections import Counter, defaultdict

import checkpoints
import jax
import numpy as np
import pytest
from cpu_clock import cpu_seconds

import mmx
from mmx.convert import mapping

TEXT_01 = {
    "vocab_size": 200_064,
    "hidden_size": 6144,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 32,
    "intermediate_size": 9216,
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "alternating": {},
    "no period": {"attn_type_list": [0, 0, 1, 0, 1], "num_hidden_layers": 5},
    "one layer": {"attn_type_list": [0], "num_hidden_layers": 1},
    "tied, shared expert": {"tie_word_embeddings": True, "shared_intermediate_size": 5},
}
LAYOUTS = ("separate", "fused")


def by_key(config, layout="separate"):
    """Entries in one dict; a key occurs once in the separate layout."""
    return {entry.key: entry for entry in mapping.entries(config, layout)}


def leaves(config):
    """Path -> abstract leaf."""
    tree = mmx.abstract_params(config)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def part_of(entry, tensor):
    return tensor[entry.key_slice] if entry.key_slice else tensor


def test_parameters_of_the_released_model_as_the_paper_counts_them():
    total, active = mmx.count_params(mmx.preset("minimax-text-01"))
    # Facts 1.1: attention, router, two experts and norms are active, embedding and head are not.
    assert (total, active) == (456_089_655_296, 45_944_920_064)
    bytes_stored = 2 * total + 2 * 80 * 32 * 6144  # all bf16, but routers fp32
    assert bytes_stored == 912_210_767_872  # total_size in the index of the release


def test_parameters_are_counted_without_overflow():
    wide = dataclasses.replace(mmx.preset("tiny"), embed_dim=2**30, expert_dim=2**30)
    total, _ = mmx.count_params(wide)
    assert total > 8 * 3 * 4 * 2**60  # experts alone


def test_released_names_and_shapes():
    entries = list(mapping.entries(mmx.preset("minimax-text-01"), "separate"))
    assert len(entries) == 8_243  # keys in the index of the release
    assert {e.key: e.key_shape for e in entries} == checkpoints.shapes(TEXT_01)
    assert not any(e.key_slice for e in entries)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_names_and_shapes_of_small_models(changes, layout):
    fields = checkpoints.released_fields(**changes)
    entries = mapping.entries(mmx.ModelConfig.from_hf(fields), layout)
    assert {e.key: e.key_shape for e in entries} == checkpoints.shapes(fields, layout)


def test_the_released_model_is_described_in_two_seconds_without_an_array():
    # A value that changes nothing here makes sure that no cache answers.
    config = dataclasses.replace(mmx.preset("minimax-text-01"), rope_theta=9_999_999.0)
    arrays = len(jax.live_arrays())
    start = cpu_seconds()
    tree = mmx.abstract_params(config)
    assert cpu_seconds() - start < 2
    assert len(jax.live_arrays()) == arrays
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == 456_089_655_296


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["minimax-text-01", "tiny", *VARIANTS])
def test_every_parameter_is_filled_exactly_once(name, layout):
    if name in VARIANTS:
        fields = checkpoints.released_fields(**VARIANTS[name])
        config = mmx.ModelConfig.from_hf(fields)
    else:
        config = mmx.preset(name)
    entries = list(mapping.entries(config, layout))
    most = Counter((e.path, e.index) for e in entries).most_common(1)
    assert most[0][1] == 1, most
    filled = defaultdict(int)
    wanted = leaves(config)
    for entry in entries:
        shape = wanted[entry.path].shape
        assert all(0 <= i < n for i, n in zip(entry.index, shape, strict=False)), entry
        assert entry.shape == shape[len(entry.index) :], entry
        filled[entry.path] += math.prod(entry.shape)
    assert filled == {path: math.prod(leaf.shape) for path, leaf in wanted.items()}


def test_fused_tensors_are_used_exactly_once():
    config = mmx.ModelConfig.from_hf(checkpoints.released_fields())
    used = {}
    for entry in mapping.entries(config, "fused"):
        counts = used.setdefault(entry.key, np.zeros(entry.key_shape, int))
        counts[entry.key_slice or ...] += 1
    assert len(used) == len(checkpoints.shapes(checkpoints.released_fields(), "fused"))
    for key, counts in used.items():
        assert np.all(counts == 1), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_both_directions_are_inverse(changes, layout):
    config = mmx.ModelConfig.from_hf(checkpoints.released_fields(**changes))
    rng = np.random.default_rng(0)
    for entry in mapping.entries(config, layout):
        part = part_of(entry, rng.standard_normal(entry.key_shape))
        param = entry.to_param(part)
        assert param.shape == entry.shape, entry
        back = entry.from_param(param)
        assert back.shape == part.shape, entry
        np.testing.assert_array_equal(back, part, err_msg=entry.key)


def test_qkv_is_head_major():
    fields = checkpoints.released_fields()
    heads, dim, width = 6, 4, 10
    tensor = np.empty((heads * 3 * dim, width), np.int64)
    for head in range(heads):
        for which in range(3):  # q, k, v of a head are neighbours (facts 1.6)
            for channel in range(dim):
                row = head * 3 * dim + which * dim + channel
                for column in range(width):
                    tensor[row, column] = 1000 * head + 100 * which + 20 * channel + column
    entry = by_key(mmx.ModelConfig.from_hf(fields))["model.layers.0.self_attn.qkv_proj.weight"]
    param = entry.to_param(tensor)
    assert param.shape == (width, heads, 3, dim)
    for (column, head, which, channel), value in np.ndenumerate(param):
        assert value == 1000 * head + 100 * which + 20 * channel + column


def test_other_attention_matrices():
    entries = by_key(mmx.ModelConfig.from_hf(checkpoints.released_fields()))
    heads, kv_heads, dim, width = 6, 2, 4, 10
    for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        tensor = np.arange(count * dim * width).reshape(count * dim, width)
        param = entries[f"model.layers.1.self_attn.{name}.weight"].to_param(tensor)
        assert param.shape == (width, count, dim)
        assert param[3, 1, 2] == tensor[1 * dim + 2, 3]
    tensor = np.arange(heads * dim * width).reshape(heads * dim, width)
    param = entries["model.layers.0.self_attn.output_gate.weight"].to_param(tensor)
    assert param.shape == (width, heads, dim)
    assert param[3, 5, 2] == tensor[5 * dim + 2, 3]
    tensor = np.arange(heads * dim * width).reshape(width, heads * dim)
    for name in (
        "model.layers.0.self_attn.out_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ):
        param = entries[name].to_param(tensor)
        assert param.shape == (heads, dim, width)
        assert param[5, 2, 3] == tensor[3, 5 * dim + 2]


def test_what_is_transposed_and_what_is_not():
    entries = by_key(mmx.ModelConfig.from_hf(checkpoints.released_fields()))
    for name, shape in {
        "lm_head.weight": (10, 23),
        "model.layers.0.block_sparse_moe.gate.weight": (10, 3),
        "model.layers.0.block_sparse_moe.experts.2.w1.weight": (10, 7),
        "model.layers.0.block_sparse_moe.experts.2.w2.weight": (7, 10),
    }.items():
        tensor = np.arange(math.prod(shape)).reshape(shape[::-1])
        param = entries[name].to_param(tensor)
        assert param.shape == shape
        assert param[4, 1] == tensor[1, 4]
    for name in ("model.embed_tokens.weight", "model.norm.weight",
                 "model.layers.0.input_layernorm.weight",
                 "model.layers.0.self_attn.norm.weight"):  # fmt: skip
        tensor = np.arange(math.prod(entries[name].key_shape)).reshape(entries[name].key_shape)
        np.testing.assert_array_equal(entries[name].to_param(tensor), tensor)


def test_paths():
    """w1 is the gate, w3 the other input, w2 the output (facts 1.1); layers fold into periods."""
    entries = by_key(mmx.ModelConfig.from_hf(checkpoints.released_fields()))
    moe = "model.layers.3.block_sparse_moe."
    at = "blocks/layer_1/"
    for key, (path, index) in {
        moe + "experts.2.w1.weight": (at + "moe/gate_proj", (1, 2)),
        moe + "experts.2.w3.weight": (at + "moe/up_proj", (1, 2)),
        moe + "experts.2.w2.weight": (at + "moe/down_proj", (1, 2)),
        moe + "gate.weight": (at + "moe/router/kernel", (1,)),
        "model.layers.3.input_layernorm.weight": (at + "attention_norm/scale", (1,)),
        "model.layers.3.post_attention_layernorm.weight": (at + "mlp_norm/scale", (1,)),
        "model.layers.3.self_attn.o_proj.weight": (at + "attention/out_proj", (1,)),
        "model.embed_tokens.weight": ("embed/embedding", ()),
        "model.norm.weight": ("final_norm/scale", ()),
        "lm_head.weight": ("head/kernel", ()),
    }.items():
        assert (entries[key].path, entries[key].index) == (path, index)


def test_fused_gate_comes_before_up():
    config = mmx.ModelConfig.from_hf(checkpoints.released_fields())
    entries = {(e.path, e.index): e for e in mapping.entries(config, "fused")}
    tensor = np.arange(3 * 14 * 10).reshape(3, 14, 10)
    for name, first in (("gate_proj", 0), ("up_proj", 7)):
        entry = entries[f"blocks/layer_0/moe/{name}", (1, 2)]
        assert entry.key == "model.layers.2.mlp.experts.gate_up_proj"
        param = entry.to_param(part_of(entry, tensor))
        assert param.shape == (10, 7)
        assert param[4, 6] == tensor[2, first + 6, 4]
    entry = entries["blocks/layer_0/moe/down_proj", (1, 2)]
    tensor = np.arange(3 * 10 * 7).reshape(3, 10, 7)
    assert entry.to_param(part_of(entry, tensor))[6, 4] == tensor[2, 4, 6]


@pytest.mark.parametrize("name", ["slope_rate", "query_decay", "key_decay", "diagonal_decay"])
def test_decay_tables_are_known(name):
    assert mapping.BUFFERS.fullmatch(f"model.layers.12.self_attn.{name}")
    assert not mapping.BUFFERS.fullmatch(f"model.layers.12.self_attn.{name}.weight")
    assert not mapping.BUFFERS.fullmatch(f"model.layers.x.self_attn.{name}")
