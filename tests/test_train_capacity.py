"""Capacity and token drop, and losses in blocks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from golden_cases import close
from random_models import random_params, random_tokens, small_config

import mmx
from mmx.model import backbone
from mmx.training import losses
from sharding.capacity import within_capacity

pytestmark = pytest.mark.usefixtures("quick_programs")
SAME = 1e-6


def kept_one_by_one(experts, is_token, num_experts, capacity_factor):
    """First choices of all tokens, then second ones, while their expert has room."""
    tokens, per_token = experts.shape
    room = int(np.ceil(round(capacity_factor * per_token * is_token.sum() / num_experts, 9)))
    left = [room] * num_experts
    kept = np.zeros(experts.shape, bool)
    for choice in range(per_token):
        for token in range(tokens):
            if is_token[token] and left[experts[token, choice]] > 0:
                left[experts[token, choice]] -= 1
                kept[token, choice] = True
    return kept


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.1, 1.25, 3.0])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "per_token"), [(20, 4, 2), (30, 5, 3), (7, 8, 1)]
)
def test_places_are_given_first_come_first_served(factor, tokens, num_experts, per_token):
    rng = np.random.default_rng(tokens)
    # Skewed, so that some experts overflow and some stay empty.
    scores = rng.normal(0, 1, (tokens, num_experts)) - np.arange(num_experts)
    experts = np.argsort(-scores, axis=1)[:, :per_token].astype(np.int32)
    for is_token in (np.ones(tokens, bool), rng.random(tokens) < 0.5, np.zeros(tokens, bool)):
        (seen,) = within_capacity(
            jnp.asarray(experts)[None],
            jnp.asarray(is_token)[None],
            num_experts=num_experts,
            capacity_factor=factor,
        )
        wanted = kept_one_by_one(experts, is_token, num_experts, factor)
        np.testing.assert_array_equal(seen, wanted)


def test_a_whole_number_of_places_is_not_rounded_up():
    """1.1 * 2 * 20 / 4 is 11 and in fp32 a little more."""
    experts = jnp.tile(jnp.array([[0, 1]], jnp.int32), (1, 20, 1))
    kept = within_capacity(experts, jnp.ones((1, 20), bool), num_experts=4, capacity_factor=1.1)
    assert kept[0].sum(axis=0).tolist() == [11, 11]


CONFIG = small_config("l")
PARAMS = random_params(CONFIG, 5)
TOKENS = random_tokens(CONFIG, (2, 12), 5)
MASK = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 10 + [0, 0]], np.int32)


def moe_output(factor, x, real):
    from mmx.model import _modules
    from mmx.nn import layers

    moe = layers.bind(_modules(CONFIG).blocks.layer_0.moe, first_layer())
    return moe(
        x, real, keep_logits=True, implementation=None, capacity_factor=factor, statistics=True
    )


def first_layer():
    return jax.tree.map(lambda leaf: leaf[0], PARAMS["blocks"]["layer_0"]["moe"])


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_dropped_choice_adds_nothing_and_others_keep_their_weight(factor):
    x = np.random.default_rng(1).normal(size=(2, 12, 24)).astype(np.float32)
    out, stats = jax.jit(moe_output, static_argnums=0)(factor, x, MASK != 0)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), first_layer())
    tokens, is_token = x.reshape(-1, 24).astype(np.float64), (MASK != 0).reshape(-1)
    probabilities = truth.softmax(tokens @ weights["router"]["kernel"])
    experts = np.argsort(-probabilities, axis=1)[:, :2]
    kept = kept_one_by_one(experts, is_token, 4, factor)
    wanted = np.zeros(tokens.shape)
    for n, e in np.ndindex(len(tokens), 2):
        if kept[n, e]:
            one = experts[n, e]
            gate, up = tokens[n] @ weights["gate_proj"][one], tokens[n] @ weights["up_proj"][one]
            share = probabilities[n, one] / probabilities[n, experts[n]].sum()
            wanted[n] += share * ((gate / (1 + np.exp(-gate)) * up) @ weights["down_proj"][one])
    lost = kept.sum(axis=1)[is_token]
    assert set(lost) >= {1, 2}, "some tokens keep both choices and some one"
    assert (0 in lost) == (factor < 1), "and with little room some keep none"
    close(out.reshape(-1, 24), wanted, 1e-5, "output")
    assert stats.num_dropped == (2 - lost).sum()
    chosen = np.bincount(experts[is_token].reshape(-1), minlength=4)
    np.testing.assert_array_equal(stats.tokens_per_expert, chosen)
    true = probabilities[is_token]
    close(stats.entropy_sum, -(true * np.log(true)).sum(), 1e-4, "entropy")


def test_room_for_all_is_dropless():
    """Every gradient too. E / k is room for every token to choose one expert."""

    def value(params, factor):
        batch = {"tokens": TOKENS, "mask": MASK}
        return mmx.loss(params, batch, CONFIG, capacity_factor=factor)[0]

    gradient = jax.jit(jax.value_and_grad(value), static_argnums=1)
    (ample, ample_grads), (dropless, grads) = gradient(PARAMS, 2.0), gradient(PARAMS, None)
    tight, _ = gradient(PARAMS, 0.5)
    close(ample, dropless, SAME, "loss")
    jax.tree.map(lambda a, b: close(a, b, SAME, "gradient"), ample_grads, grads)
    assert abs(float(tight - dropless)) > 1e-3


def test_padding_takes_no_room():
    """A row with padding gives what the row gives without it, experts being overfull."""

    def hidden(tokens, mask):
        x, _, _, stats = backbone(
            PARAMS, tokens, CONFIG, mask=mask, capacity_factor=0.75, statistics=True
        )
        return x, stats

    padded, stats = jax.jit(hidden)(TOKENS[:1], MASK[:1])
    plain, wanted = jax.jit(hidden)(TOKENS[:1, 3:], None)
    assert wanted.num_dropped > 0
    assert stats.num_dropped == wanted.num_dropped
    close(padded[:, 3:], plain, 1e-5, "hidden")


# ---------------------------------------------------------------- losses in blocks


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_change_nothing(tied):
    """Losses and gradients of single tokens; 12 of them in blocks of 6, 3 (one padded) and 1."""
    config = small_config("l", tie_embeddings=tied)
    params = random_params(config, 7)
    x = np.random.default_rng(2).normal(size=(2, 12, 24)).astype(np.float32)
    targets, counted = losses.next_token_targets({"tokens": TOKENS, "mask": MASK})

    def value(params, x, blocks):
        token_losses, log_totals = losses.blockwise_token_losses(
            params, x, targets, counted, config, blocks=blocks
        )
        return losses._mean(token_losses + 0.1 * log_totals**2, counted), token_losses

    gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
    wanted = gradient(params, x, 1)
    for blocks in (2, 5, 12):
        seen = gradient(params, x, blocks)
        # Sums in another order, of numbers below 20.
        jax.tree.map(lambda a, b: close(a, b, SAME * max(1, np.abs(b).max()), ""), seen, wanted)


def test_blocks_never_hold_all_logits():
    """No array of B x T x vocab, forward or backward: 2 x 12 x 40 numbers or more."""
    batch = {"tokens": TOKENS}

    def sizes(blocks):
        def value(params):
            return mmx.loss(params, batch, CONFIG, loss_blocks=blocks)[0]

        text = jax.jit(jax.grad(value)).lower(PARAMS).as_text()
        shapes = re.findall(r"tensor<((?:\d+x)+)f32>", text)
        with_words = [s for s in (list(map(int, s.split("x")[:-1])) for s in shapes) if 40 in s]
        return max(int(np.prod(shape)) for shape in with_words)

    parameters = 24 * 40  # embedding and head are as large as the logits of the whole batch
    assert sizes(4) <= parameters == 2 * 12 * 40
    wide = random_tokens(CONFIG, (4, 24), 1)
    batch["tokens"] = wide
    assert sizes(8) <= parameters < sizes(1) == 4 * 24 * 40


def test_gradient_of_a_bf16_head_is_summed_in_fp32():
    """Each block rounds its part, 1.5 times the error of rounding once; a sum in bf16: 6 times."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 256, 24)), jnp.bfloat16)
    targets = rng.integers(0, 40, (2, 256)).astype(np.int32)
    head = {"head": {"kernel": jnp.asarray(rng.normal(0, 0.2, (24, 40)), jnp.bfloat16)}}

    def gradient(head, x, blocks):
        def value(head):
            token_losses, _ = losses.blockwise_token_losses(
                head, x, targets, jnp.ones(targets.shape, bool), CONFIG, blocks=blocks
            )
            return jnp.sum(token_losses)

        return np.asarray(jax.grad(value)(head)["head"]["kernel"], np.float64)

    exact = gradient(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), head), x.astype("f4"), 1)
    whole = np.abs(gradient(head, x, 1) - exact).mean()
    blocks = np.abs(gradient(head, x, 64) - exact).mean()
    assert whole > 0
    assert blocks < 2 * whole


def test_blocks_are_chosen_by_the_size_of_the_logits(monkeypatch):
    chosen = []
    real = jax.lax.map
    monkeypatch.setattr(jax.lax, "map", lambda f, xs: (chosen.append(xs[1].shape), real(f, xs))[1])

    def blocks(batch, length, vocab):
        config = small_config("l", vocab_size=vocab)
        shapes = (
            {"head": {"kernel": jax.ShapeDtypeStruct((24, vocab), jnp.bfloat16)}},
            jax.ShapeDtypeStruct((batch, length, 24), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, length), jnp.int32),
            jax.ShapeDtypeStruct((batch, length), bool),
        )
        chosen.clear()
        jax.eval_shape(lambda *args: losses.blockwise_token_losses(*args, config), *shapes)
        return chosen

    assert blocks(2, 64, 512) == []
    assert blocks(4, 4096, 32_000) == [(4, 4, 1024)]  # 2.1 GB of logits in four blocks
    assert blocks(1, 1 << 20, 200_064) == [(1563, 1, 671)]
    assert blocks(64, 8192, 200_064) == [(16, 64, 512)]  # never fewer than 512 tokens a row


def test_no_blocks_are_refused():
    with pytest.raises(ValueError, match="loss_blocks is 0; it must be at least 1, or None"):
        mmx.loss(PARAMS, {"tokens": TOKENS}, CONFIG, loss_blocks=0)
