"""Spoil the source in one place: a check that compares with the truth must notice.

A mutation that passes would mean that the checks of test_golden and test_model_truth are blind
there. Each check passes on the source as it is, here or in those files. This tests the tests, and
each mutation compiles the model anew: `make test-all`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from golden_cases import check_cached, check_forward, close
from random_models import random_params, random_tokens, small_config

import mmx
from pallas_kernels.lightning_attention import xla
from pallas_kernels.softmax_attention import reference

pytestmark = pytest.mark.slow

# What a numeric comparison says, as opposed to an assertion that fails on the way to it.
NUMBERS_DIFFER = "Not equal to tolerance|Arrays are not equal"


@pytest.fixture
def mutate():
    """`setattr`, undone afterwards; no compiled program outlives it."""
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()
        yield patch.setattr
    jax.clear_caches()


def check_packed(*, ids=((1, 1, 1, 1, 2, 2, 2, 2, 2, 3), (0, 4, 4, 4, 4, 4, 0, 6, 6, 6))) -> None:
    """Packed samples and padding, of a model with one layer of each kind, against the truth."""
    config = small_config("ls")
    params, tokens = random_params(config, 0), random_tokens(config, (2, 10), 0)
    ids = np.array(ids, np.int32)
    true = truth.forward(params, tokens, config, segment_ids=ids)
    logits = np.asarray(mmx.forward(params, tokens, config, segment_ids=ids).logits)
    close(logits[ids != 0], true.logits[ids != 0], 5e-5, "logits")  # the bar of the golden cases


def check_padded() -> None:
    check_packed(ids=((1, 1, 1, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 0, 1, 1, 0, 1, 1)))


def check_in_pieces() -> None:
    """A text read in two pieces, the second with the cache of the first, against the truth."""
    config = small_config("ls")
    params, tokens = random_params(config, 0), random_tokens(config, (2, 10), 0)
    cache, logits = mmx.init_cache(config, 2, 10), []
    for piece in (tokens[:, :6], tokens[:, 6:]):
        out = mmx.forward(params, piece, config, cache=cache)
        cache = out.cache
        logits.append(np.asarray(out.logits))
    wanted = truth.forward(params, tokens, config).logits
    close(np.concatenate(logits, axis=1), wanted, 5e-5, "logits")


def test_the_checks_pass_on_the_source_as_it_is():
    check_packed()
    check_padded()
    check_in_pieces()


# ---------------------------------------------------------------- lightning attention


def _wrap_lightning(mutate, change):
    original = mmx.nn.lightning.lightning_attention
    mutate(
        "mmx.nn.lightning.lightning_attention",
        lambda q, k, v, slopes, **rest: change(original, q, k, v, slopes, rest),
    )


def lightning_gives_zeros(mutate):
    def change(original, q, k, v, slopes, rest):
        out, state = original(q, k, v, slopes, **rest)
        return jnp.zeros_like(out), state

    _wrap_lightning(mutate, change)


def current_token_decays(mutate):
    def change(original, q, k, v, slopes, rest):
        return original(q, k * jnp.exp(-slopes)[:, None], v, slopes, **rest)

    _wrap_lightning(mutate, change)


def past_decays_one_step_less(mutate):
    def change(original, q, k, v, slopes, rest):
        # Decay e^-s too little for all but the current token: raise q, lower the diagonal.
        raised, state = original(q * jnp.exp(slopes)[:, None], k, v, slopes, **rest)
        diagonal = jnp.sum(q * k, axis=-1, keepdims=True) * v
        return raised - jnp.expm1(slopes)[:, None] * diagonal, state

    _wrap_lightning(mutate, change)


def padding_decays_the_state(mutate):
    def change(original, q, k, v, slopes, rest):
        real = (rest["segment_ids"] != 0)[..., None, None]
        rest = {**rest, "segment_ids": None}
        return original(*(jnp.where(real, x, 0) for x in (q, k, v)), slopes, **rest)

    _wrap_lightning(mutate, change)


def slopes_of_the_next_layer(mutate):
    original = mmx.config.decay_slopes

    def shifted(config):
        slopes = original(config)
        return np.concatenate([slopes[1:], slopes[-1:]])

    mutate("mmx.config.decay_slopes", shifted)


def state_survives_a_border(mutate):
    original = xla.segment_runs

    def one_run(segment_ids):
        real, runs = original(segment_ids)
        return real, jnp.zeros_like(runs)

    mutate(xla, "segment_runs", one_run)


def norm_of_each_head(mutate):
    original = mmx.nn.functional.rms_norm

    def by_head(x, scale, *, epsilon):
        if epsilon != 1e-6:
            return original(x, scale, epsilon=epsilon)
        heads = x.reshape(*x.shape[:-1], 4, -1)
        return original(heads, scale.reshape(4, -1), epsilon=epsilon).reshape(x.shape)

    mutate("mmx.nn.functional.rms_norm", by_head)


# ---------------------------------------------------------------- softmax attention


def rope_turns_the_whole_head(mutate):
    original = mmx.nn.functional.rotary_embedding
    mutate(
        "mmx.nn.functional.rotary_embedding",
        lambda x, positions, *, rotary_dim, theta: original(
            x, positions, rotary_dim=x.shape[-1], theta=theta
        ),
    )


def positions_forget_the_cache(mutate):
    original = mmx.nn.sequence.describe

    def forgetful(shape, mask, segment_ids, cache, *, partition=None):
        sequence, advanced = original(shape, mask, segment_ids, cache, partition=partition)
        positions = original(shape, mask, segment_ids, None, partition=partition)[0].positions
        return dataclasses.replace(sequence, positions=positions), advanced

    mutate("mmx.model.describe", forgetful)


def _change_visible(mutate, change):
    original = reference.visible
    mutate(
        reference,
        "visible",
        lambda *arrays, causal: original(*change(*arrays), causal=causal),
    )


def query_sees_the_next_token(mutate):
    _change_visible(mutate, lambda ids, kv_ids, q, kv: (ids, kv_ids, q + 1, kv))


def query_misses_itself(mutate):
    _change_visible(mutate, lambda ids, kv_ids, q, kv: (ids, kv_ids, jnp.maximum(q - 1, 0), kv))


def query_sees_other_samples(mutate):
    _change_visible(
        mutate, lambda ids, kv_ids, q, kv: (jnp.minimum(ids, 1), jnp.minimum(kv_ids, 1), q, kv)
    )


def heads_read_the_wrong_group(mutate):
    original = mmx.nn.attention.softmax_attention

    def interleaved(q, k, v, **rest):
        batch, length, heads, dim = q.shape
        groups = k.shape[2]
        q = q.reshape(batch, length, heads // groups, groups, dim).swapaxes(2, 3)
        out = original(q.reshape(batch, length, heads, dim), k, v, **rest)
        out = out.reshape(batch, length, groups, heads // groups, dim).swapaxes(2, 3)
        return out.reshape(batch, length, heads, dim)

    mutate("mmx.nn.attention.softmax_attention", interleaved)


# ---------------------------------------------------------------- layer and experts


def _change_epsilon(mutate, old, new):
    original = mmx.nn.functional.rms_norm
    mutate(
        "mmx.nn.functional.rms_norm",
        lambda x, scale, *, epsilon: original(x, scale, epsilon=new if epsilon == old else epsilon),
    )


def epsilon_of_the_lightning_norm(mutate):
    _change_epsilon(mutate, 1e-6, 1e-5)


def epsilon_of_the_layer_norm(mutate):
    _change_epsilon(mutate, 1e-5, 1e-6)


def residual_and_branch_exchanged(mutate):
    original = mmx.nn.block._add
    mutate(
        "mmx.nn.block._add",
        lambda alpha, residual, beta, branch: original(beta, residual, alpha, branch),
    )


def top_k_not_renormalised(mutate):
    original = mmx.nn.moe.Router.__call__

    def plain(self, x, **options):
        _, experts, probabilities, logits = original(self, x, **options)
        weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        return weights, experts, probabilities, logits

    mutate("mmx.nn.moe.Router.__call__", plain)


def padding_counts_in_the_balance(mutate):
    original = mmx.nn.moe.MoE.__call__
    mutate(
        "mmx.nn.moe.MoE.__call__",
        lambda self, x, real, **rest: original(self, x, jnp.ones_like(real), **rest),
    )


MUTATIONS = [
    (lightning_gives_zeros, check_forward, "text/p01_default_pattern"),
    (current_token_decays, check_forward, "text/p01_default_pattern"),
    (past_decays_one_step_less, check_forward, "text/p01_default_pattern"),
    (padding_decays_the_state, check_padded, None),
    (slopes_of_the_next_layer, check_forward, "text/p01_default_pattern"),
    (state_survives_a_border, check_packed, None),
    (norm_of_each_head, check_forward, "released/o1_fp32_3shards"),
    (rope_turns_the_whole_head, check_forward, "released/o1_fp32_3shards"),
    (positions_forget_the_cache, check_in_pieces, None),
    (query_sees_the_next_token, check_forward, "text/p01_default_pattern"),
    (query_misses_itself, check_forward, "text/p01_default_pattern"),
    (query_sees_other_samples, check_packed, None),
    (heads_read_the_wrong_group, check_forward, "text/p01_default_pattern"),
    # One token, so the state is small and 1e-6 counts: elsewhere this shows less than the bar.
    (epsilon_of_the_lightning_norm, check_forward, "text/p05_T1"),
    (epsilon_of_the_layer_norm, check_forward, "text/p01_default_pattern"),
    (residual_and_branch_exchanged, check_forward, "text/p01_default_pattern"),
    (top_k_not_renormalised, check_forward, "text/p01_default_pattern"),
    (padding_counts_in_the_balance, check_cached, "text/p03_left_pad"),
]


@pytest.mark.parametrize(
    ("mutation", "check", "name"), MUTATIONS, ids=[m.__name__ for m, _, _ in MUTATIONS]
)
def test_is_noticed(mutate, mutation, check, name):
    mutation(mutate)
    with pytest.raises(AssertionError, match=NUMBERS_DIFFER):
        check(*([] if name is None else [name]))
