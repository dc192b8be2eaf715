import jax
import numpy as np
import pytest
from random_models import random_params, random_tokens, small_config

import mmx
from mmx.training.flops import forward_flops_per_token, peak_flops, train_flops_per_token


def test_small_model_by_hand():
    """Embed 24, 4 heads of 8 (inner 32), 2 kv heads, 4 experts of 12, 2 a token, 40 words."""
    config = small_config("lls", chunk_size=4)
    seen = forward_flops_per_token(config, 10)  # chunks of 4, 4 and 2
    assert seen.lightning_projections == 2 * (2 * 24 * (96 + 32) + 2 * 32 * 24)
    pairs = 10 + 10 + 3
    inside = 4 * pairs * (2 * 8 + 2 * 8) / 10  # heads, pairs, score and value
    state = 4 * (2 * 8 * 8 + 2 * 8 * 8)  # heads, read and write
    assert seen.lightning_attention == pytest.approx(2 * (inside + state))
    assert seen.softmax_projections == 2 * 24 * (32 + 16 + 16) + 2 * 32 * 24
    assert seen.softmax_attention == pytest.approx(4 * 55 * 32 / 10)
    assert seen.experts == 3 * 2 * (3 * 2 * 24 * 12)
    assert seen.router == 3 * 2 * 24 * 4
    assert seen.head == 2 * 24 * 40
    assert train_flops_per_token(config, 10) == pytest.approx(3 * seen.total)


def test_shared_expert_counts_with_its_gate():
    plain, shared = small_config("ls"), small_config("ls", shared_expert_dim=20)
    more = forward_flops_per_token(shared, 8).experts - forward_flops_per_token(plain, 8).experts
    assert more == 2 * (3 * 2 * 24 * 20 + 2 * 24)


def test_lightning_is_linear_and_softmax_quadratic_in_the_length():
    config = mmx.preset("minimax-text-01")
    short, long = (forward_flops_per_token(config, t) for t in (2**13, 2**20))
    assert long.lightning_attention == short.lightning_attention
    assert long.softmax_attention == pytest.approx(128 * short.softmax_attention, rel=1e-3)
    assert long.experts == short.experts


def test_active_parameters_times_two():
    """Without attention and head a token costs two FLOPs for each active entry of a matrix."""
    for name in ("minimax-text-01", "bench-4b"):
        config = mmx.preset(name)
        flops = forward_flops_per_token(config, 4096)
        products = flops.total - flops.lightning_attention - flops.softmax_attention - flops.head
        _, active = mmx.count_params(config)
        assert products == pytest.approx(2 * active, rel=1e-3)  # norms, and all of the router


def test_agrees_with_what_the_compiler_counts():
    """One expert, so that nothing is computed for nothing.

    The compiler counts all pairs of tokens, not the causal half, and elementwise work; a loop once,
    so that all but one token of lightning attention is missing, 2 % of the whole.
    """
    config = small_config(
        "ls", num_experts=1, num_experts_per_tok=1, chunk_size=32, embed_dim=64, expert_dim=128
    )
    params, tokens = random_params(config, 0), random_tokens(config, (1, 32), 0)

    def logits(params):
        return mmx.forward(params, tokens, config, implementation="reference").logits

    cost = jax.jit(logits).lower(params).compile().cost_analysis()
    counted = cost["flops"] / 32
    flops = forward_flops_per_token(config, 32)
    assert 1.0 < counted / flops.total < 1.6


def test_peaks():
    assert peak_flops("NVIDIA H200") == 989.5e12
    assert peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="seq_len is 0; it must be at least 1"):
        forward_flops_per_token(small_config("l"), 0)
    assert np.isfinite(train_flops_per_token(small_config("l"), 1))
