import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from golden_cases import close
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_params, random_tokens, small_config

import mmx
from mmx.nn.moe import RouterStats

pytestmark = pytest.mark.usefixtures("quick_programs")
# Two ways of one computation in fp32, logits of about 3: a few hundred roundings apart at most.
SAME = 1e-5
CONFIG = small_config("ls", num_heads=3, num_kv_heads=1)
PARAMS = random_params(CONFIG, 0)
LENGTH = 8
TOKENS = random_tokens(CONFIG, (3, LENGTH), 0)
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def _logits(tokens, **rest) -> np.ndarray:
    return np.asarray(mmx.forward(PARAMS, tokens, CONFIG, **rest).logits)


def _in_pieces(tokens, sizes) -> np.ndarray:
    """The tokens fed to a cache in pieces of these sizes."""
    cache = mmx.init_cache(CONFIG, *tokens.shape)
    logits, begin = [], 0
    for size in sizes:
        out = mmx.forward(PARAMS, tokens[:, begin : begin + size], CONFIG, cache=cache)
        cache, begin = out.cache, begin + size
        logits.append(np.asarray(out.logits))
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("length", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_any_pieces_fed_to_a_cache_equal_the_whole(length):
    # One test, because both parts use the same compiled programs: one for each size of a piece.
    tokens = TOKENS[:, :length]
    whole = truth.forward(PARAMS, tokens, CONFIG).logits
    close(_logits(tokens), whole, SAME, "without a cache")
    for prefill in range(1, length + 1):
        pieces = [prefill, *[1] * (length - prefill)]
        close(_in_pieces(tokens, pieces), whole, SAME, f"prefill of {prefill}, then single tokens")

    @few
    @given(st.sets(st.integers(1, length - 1)))
    def any_pieces(borders):
        pieces = np.diff([0, *sorted(borders), length]).tolist()
        close(_in_pieces(tokens, pieces), whole, SAME, str(pieces))

    any_pieces()


ROOM = 13


@few
@given(st.lists(st.permutations(range(ROOM)), min_size=3, max_size=3))
def test_padding_changes_nothing_wherever_it_is(places):
    whole = _logits(TOKENS)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (3, ROOM), dtype=np.int32)  # padding is not zero
    mask = np.zeros((3, ROOM), np.int32)
    at = [np.sort(order[:LENGTH]) for order in places]
    for row in range(3):
        tokens[row, at[row]], mask[row, at[row]] = TOKENS[row], 1
    padded = _logits(tokens, mask=mask)
    for row in range(3):
        close(padded[row, at[row]], whole[row], SAME, f"row {row}, tokens at {at[row]}")


SAMPLES = 6  # at most, in a row


@few
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=SAMPLES), min_size=3, max_size=3),
    st.permutations(range(1, SAMPLES + 1)),
    st.sets(st.integers(0, ROOM - 1)),
)
def test_packed_samples_equal_separate_ones(lengths, names, padding):
    tokens = random_tokens(CONFIG, (3, ROOM), 1)
    ids = np.zeros((3, ROOM), np.int32)
    for row, sizes in enumerate(lengths):
        line = [name for name, size in zip(names, sizes, strict=False) for _ in range(size)]
        ids[row, : len(line)] = line[:ROOM]
    ids[:, sorted(padding)] = 0  # also inside a sample
    packed = _logits(tokens, segment_ids=ids)
    # Each sample alone in a row of its own, all in one batch of one shape.
    alone = np.zeros((3 * SAMPLES, ROOM), np.int32)
    mask = np.zeros_like(alone)
    samples = [(row, at) for row in range(3) for at in truth.samples(ids[row])]
    for number, (row, at) in enumerate(samples):
        alone[number, : len(at)], mask[number, : len(at)] = tokens[row, at], 1
    separate = _logits(alone, mask=mask)
    for number, (row, at) in enumerate(samples):
        close(packed[row, at], separate[number, : len(at)], SAME, f"row {row}, tokens at {at}")


def test_a_sample_continues_through_the_cache_and_the_next_one_does_not():
    ids = np.array([[4] * 5 + [9] * 3, [0, 4, 4, 0, 4, 4, 4, 0], [1] * 4 + [2, 2, 2, 7]], np.int32)
    true = truth.forward(PARAMS, TOKENS, CONFIG, segment_ids=ids)
    cache, seen = mmx.init_cache(CONFIG, 3, LENGTH), []
    for piece in (slice(0, 4), slice(4, 8)):
        out = mmx.forward(PARAMS, TOKENS[:, piece], CONFIG, segment_ids=ids[:, piece], cache=cache)
        cache = out.cache
        seen.append(np.asarray(out.logits))
    seen = np.concatenate(seen, axis=1)
    close(seen[ids != 0], true.logits[ids != 0], SAME, "logits")
    close(cache.lightning_states, true.states, SAME * np.abs(true.states).max(), "states")


def test_an_id_that_comes_again_is_another_sample():
    """Whoever numbers the samples of each call from 1 has the same numbers in the cache."""
    ids = np.array([[1, 1, 2, 2], [1, 1, 1, 1], [0, 3, 0, 0]], np.int32)
    again = np.array([[1, 1, 1, 2], [0, 2, 1, 1], [3, 0, 3, 3]], np.int32)
    apart = np.array([[3, 3, 3, 4], [0, 2, 3, 3], [3, 0, 3, 3]], np.int32)  # row 2 carries on
    whole = truth.forward(PARAMS, TOKENS, CONFIG, segment_ids=np.concatenate([ids, apart], axis=1))
    cache = mmx.init_cache(CONFIG, 3, LENGTH)
    cache = mmx.forward(PARAMS, TOKENS[:, :4], CONFIG, segment_ids=ids, cache=cache).cache
    seen = mmx.forward(PARAMS, TOKENS[:, 4:], CONFIG, segment_ids=again, cache=cache).logits
    real = again != 0
    close(seen[real], whole.logits[:, 4:][real], SAME, "logits")


@few
@given(st.permutations(range(3)), st.integers(0, 2**16))
def test_rows_do_not_see_each_other(order, seed):
    whole = _logits(TOKENS)
    close(_logits(TOKENS[list(order)]), whole[list(order)], SAME, "permuted")
    others = random_tokens(CONFIG, TOKENS.shape, seed)
    others[1] = TOKENS[1]
    close(_logits(others)[1], whole[1], SAME, "among others")


def _loss_and_gradients(params, config, remat):
    loss = jax.value_and_grad(mmx.loss, has_aux=True)
    jitted = jax.jit(loss, static_argnames=("config", "remat", "balance_coef"))
    batch = {"tokens": TOKENS}
    (total, _), grads = jitted(params, batch, config=config, remat=remat, balance_coef=0.1)
    return total, grads


def test_remat_and_scan_change_neither_loss_nor_gradients(monkeypatch):
    config = small_config("lsls", num_heads=3, num_kv_heads=1)
    params = random_params(config, 1)
    assert config.num_superblocks == 2
    total, grads = _loss_and_gradients(params, config, "none")
    for remat in ("superblock", "layer"):
        again, same = _loss_and_gradients(params, config, remat)
        close(again, total, SAME, remat)
        for (path, one), true in zip(
            jax.tree_util.tree_leaves_with_path(same), jax.tree.leaves(grads), strict=True
        ):
            bar = SAME * np.abs(np.asarray(true)).max()
            close(one, true, bar, jax.tree_util.keystr(path))

    # The same layers as one superblock, that is, unrolled (gradients of unrolled layers are
    # checked by test_golden): [2, ...] leaves of layer_0 and layer_1
    # become [1, ...] leaves of layer_0 to layer_3. Another bos id makes it another config.
    monkeypatch.setattr(mmx.ModelConfig, "superblock", property(lambda self: self.layer_kinds))
    unrolled = dataclasses.replace(config, bos_token_id=1)
    assert unrolled.num_superblocks == 1

    def unroll(tree):
        blocks = {
            f"layer_{layer}": jax.tree.map(
                lambda leaf, layer=layer: leaf[layer // 2][None],
                tree["blocks"][f"layer_{layer % 2}"],
            )
            for layer in range(4)
        }
        return {**tree, "blocks": blocks}

    loss = jax.jit(mmx.loss, static_argnames="config")
    again, _ = loss(unroll(params), {"tokens": TOKENS}, config=unrolled, balance_coef=0.1)
    close(again, total, SAME, "unrolled")


# ---------------------------------------------------------------- refusals


def test_a_full_cache_raises_and_under_jit_gives_nan():
    cache = mmx.init_cache(CONFIG, 3, LENGTH - 1)
    with pytest.raises(ValueError, match="the cache has 7 slots, 0 of them used; 8 more tokens"):
        mmx.forward(PARAMS, TOKENS, CONFIG, cache=cache)

    @jax.jit
    def twice(tokens):
        out = mmx.forward(PARAMS, tokens, CONFIG, cache=cache)
        again = mmx.forward(PARAMS, tokens, CONFIG, cache=out.cache)
        return out.logits, again.logits, again.cache

    first, second, full = twice(TOKENS[:, :4])
    assert np.isfinite(first).all()
    assert np.isnan(second).all()
    with pytest.raises(ValueError, match="the cache has 7 slots, 8 of them used; 4 more tokens"):
        mmx.forward(PARAMS, TOKENS[:, :4], CONFIG, cache=full)


@pytest.mark.parametrize("wrong", [CONFIG.vocab_size, 2**31 - 1, -1])
def test_a_token_out_of_range_raises_and_under_jit_gives_nan(wrong):
    tokens = TOKENS.copy()
    tokens[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"tokens contain the id {wrong}; ids must be in \[0, "):
        mmx.forward(PARAMS, tokens, CONFIG)
    logits = np.asarray(_under_jit(tokens))
    assert np.isnan(logits[1, 3:]).all()


@jax.jit
def _under_jit(tokens):
    return mmx.forward(PARAMS, tokens, CONFIG).logits


def test_constant_tokens_under_jit():
    # Concrete arrays inside jit: looking at their values must not trace.
    tokens, mask = jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, jnp.int32)
    logits = jax.jit(lambda params: mmx.forward(params, tokens, CONFIG, mask=mask).logits)(PARAMS)
    close(logits, _logits(TOKENS), SAME, "logits")


BAD = [
    (TOKENS[0], {}, r"tokens have shape \(8,\) and dtype int32; they must be integers"),
    (TOKENS[:, :0], {}, r"tokens have shape \(3, 0\)"),
    (TOKENS.astype(np.float32), {}, "and dtype float32; they must be integers"),
    (TOKENS, dict(mask=np.ones((3, 7), int)), r"mask has shape \(3, 7\); tokens have \(3, 8\)"),
    (TOKENS, dict(segment_ids=np.ones((2, 8), int)), r"segment_ids has shape \(2, 8\)"),
    (TOKENS, dict(cache=mmx.init_cache(CONFIG, 2, 9)), "the cache holds 2 rows, tokens have 3"),
    (np.zeros((1, 257), int), {}, "257 tokens are more than max_seq_len=256"),
    (TOKENS, dict(remat="all"), "remat is 'all'; it must be 'none', 'superblock' or 'layer'"),
    (TOKENS, dict(implementation="cuda"), "unknown implementation 'cuda'"),
]


@pytest.mark.parametrize(("tokens", "rest", "message"), BAD)
def test_bad_input_is_refused(tokens, rest, message):
    with pytest.raises(ValueError, match=message):
        mmx.forward(PARAMS, tokens, CONFIG, **rest)


def test_a_cache_beyond_the_longest_sequence_is_refused():
    config = dataclasses.replace(CONFIG, max_seq_len=10)
    cache = dataclasses.replace(mmx.init_cache(config, 3, 20), num_slots=jnp.int32(5))
    with pytest.raises(ValueError, match="max_seq_len=10"):
        mmx.forward(PARAMS, TOKENS, config, cache=cache)


def test_router_statistics_count_tokens_and_no_padding():
    mask = np.array([[1] * 8, [0] * 3 + [1] * 5, [1] * 2 + [0] * 6], np.int32)
    stats = mmx.forward(PARAMS, TOKENS, CONFIG, mask=mask, return_hidden=True).aux
    assert isinstance(stats, RouterStats)
    np.testing.assert_array_equal(stats.num_tokens, [15, 15])
    np.testing.assert_array_equal(stats.tokens_per_expert.sum(axis=1), [30, 30])
    np.testing.assert_allclose(stats.probability_sum.sum(axis=1), 15, rtol=1e-6)
