"""ModelConfig by itself: what it refuses, the presets and the slopes of decay."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

import mmx
from mmx.config import PRESETS, decay_slopes

TINY = mmx.preset("tiny")
NAN, INF = math.nan, math.inf
INTEGERS = ("vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "rotary_dim",
            "num_experts", "num_experts_per_tok", "expert_dim", "shared_expert_dim", "max_seq_len",
            "chunk_size")  # fmt: skip
FLOATS = ("rope_theta", "norm_epsilon", "lightning_norm_epsilon", "slope_layer_epsilon",
          "lightning_alpha", "lightning_beta", "softmax_alpha", "softmax_beta", "mlp_alpha",
          "mlp_beta", "router_aux_loss_coef")  # fmt: skip
BOOLEANS = ("post_norm", "tie_embeddings")

IMPOSSIBLE: list[tuple[str, Any]] = [
    *((name, value) for name in INTEGERS for value in (-1, True, "8", 8.0, None, NAN, INF, [8])),
    *((name, 0) for name in INTEGERS if name != "shared_expert_dim"),
    *((name, value) for name in FLOATS for value in (NAN, INF, -INF, "1", True, None, 10**400)),
    *((name, value) for name in BOOLEANS for value in (0, 1, "true", None)),
    ("norm_epsilon", 0.0),
    ("norm_epsilon", -1e-5),
    ("lightning_norm_epsilon", 0),
    ("rope_theta", 0.0),
    ("rope_theta", -1.0),
    ("slope_layer_epsilon", -1e-9),
    ("num_kv_heads", 3),  # of 4 heads
    ("num_kv_heads", 8),
    ("rotary_dim", 7),
    ("rotary_dim", 18),  # of 16
    ("num_experts_per_tok", 5),  # of 4
    ("slope_base", "linear"),
    ("slope_base", None),
    ("layer_kinds", ()),
    ("layer_kinds", ("lightning", "attention")),
    ("layer_kinds", ("lightning", None)),
    ("layer_kinds", None),
    ("layer_kinds", 8),
    *((f"{which}_token_id", value) for which in ("bos", "eos")
      for value in (-1, 512, True, 1.0, "2", (), (2, 512), (2, True), ((2,),))),
    ("bos_token_id", (2, 3)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), IMPOSSIBLE, ids=[f"{name}={str(value)[:12]}" for name, value in IMPOSSIBLE]
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(TINY, **{field: value})
    message = str(caught.value)
    assert "\n" not in message
    seen, remedy = message.split("; ", 1)
    assert seen == f"ModelConfig: {field} is {value!r}"
    assert re.search(r"must |use ", remedy), message


def test_every_field_is_among_the_tested():
    fields = {field.name for field in dataclasses.fields(mmx.ModelConfig)}
    others = {"layer_kinds", "slope_base", "bos_token_id", "eos_token_id"}
    assert fields == {*INTEGERS, *FLOATS, *BOOLEANS, *others}
    assert len(fields) <= 30


def test_the_other_number_is_named():
    """A pair that does not fit: the message says both."""
    for changes, named in (
        ({"num_kv_heads": 3}, "num_heads=4"),
        ({"rotary_dim": 18}, "head_dim=16"),
        ({"num_experts_per_tok": 5}, "num_experts=4"),
        ({"eos_token_id": 512}, "vocab_size=512"),
        ({"layer_kinds": ("mamba",)}, "mamba"),
    ):
        with pytest.raises(ValueError, match=named):
            dataclasses.replace(TINY, **changes)


def test_limits_that_are_still_possible():
    for field, value in (("shared_expert_dim", 0), ("rotary_dim", 16), ("num_kv_heads", 4),
                         ("num_experts_per_tok", 4), ("eos_token_id", 0), ("eos_token_id", 511),
                         ("eos_token_id", (3, 511)),
                         ("mlp_alpha", 1), ("slope_layer_epsilon", 0), ("slope_layer_epsilon", 0.0),
                         ("lightning_beta", 0.0), ("max_seq_len", 1)):  # fmt: skip
        assert getattr(dataclasses.replace(TINY, **{field: value}), field) == value


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.vocab_size = 3
    same = dataclasses.replace(TINY)
    assert same is not TINY
    assert {TINY: 1}[same] == 1
    assert dataclasses.replace(TINY, chunk_size=64) not in {TINY: 1}


def test_a_list_of_layers_becomes_a_tuple():
    config = dataclasses.replace(TINY, layer_kinds=list(TINY.layer_kinds))
    assert config == TINY
    assert hash(config) == hash(TINY)


@pytest.mark.parametrize(
    ("pattern", "superblock", "repeats"),
    [("LLLLLLLS" * 10, "LLLLLLLS", 10), ("LS" * 4, "LS", 4), ("LLL", "L", 3), ("S", "S", 1),
     ("LLSLS", "LLSLS", 1), ("LLLLLLLSLS", "LLLLLLLSLS", 1), ("SLLSLL", "SLL", 2)],
)  # fmt: skip
def test_superblock_is_the_shortest_period(pattern, superblock, repeats):
    names = {"L": "lightning", "S": "softmax"}
    config = dataclasses.replace(TINY, layer_kinds=tuple(names[c] for c in pattern))
    assert config.superblock == tuple(names[c] for c in superblock)
    assert (config.num_superblocks, config.num_layers) == (repeats, len(pattern))


# ---------------------------------------------------------------- presets


def numbers(config):
    """Vocabulary, width, layers, heads, kv heads, head, RoPE, experts, top-k and expert width."""
    return (config.vocab_size, config.embed_dim, config.num_layers, config.num_heads,
            config.num_kv_heads, config.head_dim, config.rotary_dim, config.num_experts,
            config.num_experts_per_tok, config.expert_dim)  # fmt: skip


@pytest.mark.parametrize("name", ["minimax-text-01", "minimax-m1-40k", "minimax-m1-80k"])
def test_released_presets(name):
    config = mmx.preset(name)
    assert numbers(config) == (200_064, 6144, 80, 64, 8, 128, 64, 32, 2, 9216)
    softmax = [i for i, kind in enumerate(config.layer_kinds) if kind == "softmax"]
    assert softmax == [7, 15, 23, 31, 39, 47, 55, 63, 71, 79]
    # alpha is (2 * 80)^(1/4); beta at run time is 1 (facts, item 5)
    alphas = (config.lightning_alpha, config.softmax_alpha, config.mlp_alpha)
    assert alphas == (3.5565588200778455,) * 3
    assert (config.lightning_beta, config.softmax_beta, config.mlp_beta) == (1, 1, 1)
    assert (config.rope_theta, config.max_seq_len, config.chunk_size) == (1e7, 10_240_000, 256)
    assert (config.norm_epsilon, config.lightning_norm_epsilon) == (1e-5, 1e-6)
    assert (config.slope_base, config.slope_layer_epsilon) == ("alibi", 0)
    assert (config.post_norm, config.tie_embeddings, config.shared_expert_dim) == (True, False, 0)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    assert config.router_aux_loss_coef == 0.001


def test_slice_8_is_one_superblock_at_full_width():
    config = mmx.preset("slice-8")
    assert config.layer_kinds == ("lightning",) * 7 + ("softmax",)
    full = mmx.preset("minimax-text-01")
    assert dataclasses.replace(config, layer_kinds=full.layer_kinds) == full


def test_bench_4b():
    config = mmx.preset("bench-4b")
    assert numbers(config) == (32_000, 2048, 16, 16, 4, 128, 64, 8, 2, 4096)
    assert config.layer_kinds == (("lightning",) * 7 + ("softmax",)) * 2
    total, _ = mmx.count_params(config)
    # By hand: experts 16*8*3*2048*4096; 14 lightning (5 squares of 2048 and a norm of 2048),
    # 2 softmax (2 squares, 2 of 2048x512); router 16*2048*8; norms 33*2048; embedding and head.
    experts = 16 * 8 * 3 * 2048 * 4096
    attention = 14 * (5 * 2048**2 + 2048) + 2 * (2 * 2048**2 + 2 * 2048 * 512)
    rest = 16 * 2048 * 8 + 33 * 2048 + 2 * 32_000 * 2048
    assert total == experts + attention + rest
    assert 3.5e9 < total < 4.5e9


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="unknown preset 'gpt'") as caught:
        mmx.preset("gpt")
    assert all(name in str(caught.value) for name in PRESETS)
    assert all(isinstance(mmx.preset(name), mmx.ModelConfig) for name in PRESETS)


# ---------------------------------------------------------------- slopes


@pytest.mark.parametrize(
    ("layer", "factor", "fastest", "slowest"),
    # Facts 1.4; the tolerances are half a unit of the last digit printed there.
    [
        (0, (1.00001, 5e-8), (0.76, 5e-3), (177, 0.5)),
        (40, (0.4937, 5e-5), (1.5, 0.05), (359, 0.5)),
        (78, (0.012668, 5e-7), (60, 0.5), (14_007, 0.5)),
    ],
)
def test_half_lives_of_the_released_model(layer, factor, fastest, slowest):
    slopes = decay_slopes(mmx.preset("minimax-text-01"))[layer].astype(np.float64)
    base = 2.0 ** (-np.arange(1, 65) / 8)
    # fp32 slopes: 6e-8 relative.
    np.testing.assert_allclose(slopes / base, factor[0], atol=factor[1] + 1e-7)
    half_lives = math.log(2) / slopes
    np.testing.assert_allclose(half_lives[0], fastest[0], atol=fastest[1])
    np.testing.assert_allclose(half_lives[-1], slowest[0], atol=slowest[1])


def slopes_of(heads, **changes):
    """Slopes of layer 0, without its factor of 1 + 1e-5."""
    config = dataclasses.replace(TINY, num_heads=heads, num_kv_heads=1, **changes)
    return decay_slopes(config)[0].astype(np.float64) / 1.00001


# One rounding to fp32 is 6e-8.
ROUNDING = 1e-7


def test_alibi_slopes_of_six_and_twelve_heads():
    """Those of 4 (8) heads, then every second one of 8 (16), by hand."""
    np.testing.assert_allclose(
        slopes_of(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8], rtol=ROUNDING
    )
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    four = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(slopes_of(12), eight + four, rtol=ROUNDING)


def test_geometric_slopes_of_six_heads():
    by_hand = [2 ** (-4 / 3), 2 ** (-8 / 3), 1 / 16, 2 ** (-16 / 3), 2 ** (-20 / 3), 1 / 256]
    np.testing.assert_allclose(slopes_of(6, slope_base="geometric"), by_hand, rtol=ROUNDING)


@pytest.mark.parametrize("heads", [1, 2, 8, 64])
def test_both_rules_agree_for_powers_of_two(heads):
    np.testing.assert_array_equal(slopes_of(heads), slopes_of(heads, slope_base="geometric"))
    np.testing.assert_allclose(
        slopes_of(heads), [2 ** (-8 * h / heads) for h in range(1, heads + 1)], rtol=ROUNDING
    )


def test_layer_factor_counts_all_layers():
    """8 layers: 1 - l / 7 + 1e-5 whatever the kinds, and down to 1e-5 at the last."""
    kinds = ("softmax", "lightning") * 4
    slopes = decay_slopes(dataclasses.replace(TINY, layer_kinds=kinds))
    np.testing.assert_array_equal(slopes, decay_slopes(TINY))
    assert slopes.dtype == np.float32
    assert slopes.shape == (8, 4)
    base = np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256])
    by_hand = np.outer([1 - layer / 7 + 1e-5 for layer in range(8)], base)
    np.testing.assert_allclose(slopes, by_hand, rtol=ROUNDING)
    assert np.all(slopes > 0)


def test_layer_factor_of_transformers():
    """1 - l / (7 + 1e-5) + 1e-5: at the last layer 1e-5 + 1e-5 / 7."""
    slopes = decay_slopes(dataclasses.replace(TINY, slope_layer_epsilon=1e-5))
    # 1 - 7 / (7 + 1e-5) = 1.4285694e-6, the difference of two numbers near 1 in float64.
    np.testing.assert_allclose(slopes[7, 0], (1e-5 + 1.4285694e-6) / 4, rtol=1e-6)
    np.testing.assert_allclose(slopes[3, 0], (1 - 3 / 7.00001 + 1e-5) / 4, rtol=ROUNDING)


def test_one_layer():
    slopes = decay_slopes(dataclasses.replace(TINY, layer_kinds=("lightning",)))
    np.testing.assert_allclose(slopes, [[1.00001 / 4**h for h in range(1, 5)]], rtol=ROUNDING)
