"""Rows of one batch, each with its own options, against definitions in float64."""

import jax
import numpy as np
import pytest

from mmx.inference import sampling
from mmx.inference.requests import Sampling
from mmx.inference.sampling import mark_seen, sample_rows, sampling_rows, top_logprobs

LOGITS = np.array([1.3, -0.2, 2.0, 0.4, -1.5, 1.9, 0.4, -0.9, 1.1], np.float32)
VOCAB = len(LOGITS)
SEEN = np.array([0, 1, 1, 0, 0, 0, 1, 0, 0], bool)
BIAS_WIDTH = 4
compiled = jax.jit(sample_rows)


def rows_of(*requests):
    return sampling_rows(requests, bias_width=BIAS_WIDTH)


def choose(logits, requests, *, seen=None, step=0):
    logits = np.asarray(logits, np.float32)
    seen = np.zeros(logits.shape, bool) if seen is None else np.broadcast_to(seen, logits.shape)
    steps = np.broadcast_to(np.asarray(step, np.int32), len(logits))
    tokens, logprobs = compiled(logits, rows_of(*requests), seen, steps)
    return np.asarray(tokens), np.asarray(logprobs)


def expected(option: Sampling, seen=None) -> np.ndarray:
    """The distribution to draw from, filter by filter, in float64."""
    logits = LOGITS.astype(np.float64)
    for token, bias in option.logit_bias.items():
        logits[token] += bias
    for token in np.flatnonzero(np.zeros(VOCAB, bool) if seen is None else seen):
        factor = option.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    scaled = np.exp((logits - logits.max()) / option.temperature)
    order = sorted(range(VOCAB), key=lambda token: (-scaled[token], token))
    kept = order[: option.top_k] if option.top_k else order
    total, running, nucleus = sum(scaled[kept]), 0.0, []
    for token in kept:
        nucleus.append(token)
        running += scaled[token]
        assert abs(running / total - option.top_p) > 1e-4 or option.top_p == 1, "too close to call"
        if running / total >= option.top_p:
            break
    result = np.zeros(VOCAB)
    for token in nucleus:
        if scaled[token] >= option.min_p * scaled[nucleus[0]]:
            result[token] = scaled[token]
    return result / result.sum()


DRAWS = 8192
OPTIONS = {
    "plain": dict(),
    "cold": dict(temperature=0.4),
    "hot": dict(temperature=3.0),
    "top_k": dict(top_k=3),
    "top_k at a tie": dict(top_k=5),
    "top_k of more than there are": dict(top_k=2**40),
    "top_p": dict(top_p=0.55),
    "top_p at a tie": dict(top_p=0.9),
    "top_p of nearly nothing": dict(top_p=1e-60),
    "top_p of nearly all": dict(top_p=0.9998),
    "min_p": dict(min_p=0.3),
    "min_p of 1": dict(min_p=1.0),
    "bias": dict(logit_bias={1: 2.5, 5: -100.0, 8: 0.5}),
    "penalty": dict(repetition_penalty=1.7),
    "reward": dict(repetition_penalty=0.5),
    "top_k, then top_p of the rest": dict(top_k=4, top_p=0.8),
    "top_p, then min_p": dict(top_p=0.9, min_p=0.45),
    "all": dict(
        temperature=1.6, top_k=7, top_p=0.85, min_p=0.25, repetition_penalty=1.3,
        logit_bias={0: -0.7, 4: 3.1, 2: 0.4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_draws_follow_the_distribution_of_the_definition(options):
    option = Sampling(**{"temperature": 1.0, "seed": 11, **options})
    wanted = expected(option, SEEN)
    seen, logprobs = choose(np.tile(LOGITS, (DRAWS, 1)), [option] * DRAWS, seen=SEEN,
                            step=np.arange(DRAWS))  # fmt: skip
    counts = np.bincount(seen, minlength=VOCAB)
    assert not counts[wanted == 0].any()
    # Five standard deviations of a binomial count.
    bar = 5 * np.sqrt(DRAWS * wanted * (1 - wanted))
    assert (np.abs(counts - DRAWS * wanted) <= bar).all(), (counts / DRAWS, wanted)
    raw = LOGITS.astype(np.float64)
    truth = raw - np.log(np.exp(raw).sum())
    np.testing.assert_allclose(logprobs, truth[seen], atol=1e-6)


def test_support_is_exact_for_random_options():
    """Every token of the support is drawn from noise alone, and no other, for 200 options."""
    rng = np.random.default_rng(0)
    vocab = 300
    logits = np.round(rng.normal(0, 2, (200, vocab)), 1).astype(np.float32)  # many ties
    values = []
    for _ in range(200):
        top_k = int(rng.integers(0, 40)) * int(rng.integers(2))
        values.append((float(rng.uniform(0.3, 3)), top_k, float(rng.uniform(0.05, 1))))
    masks = support(logits, values)
    for row, (temperature, top_k, top_p) in enumerate(values):
        shares = np.exp(logits[row].astype(np.float64) / np.float32(temperature))
        order = np.argsort(-logits[row].astype(np.float64), kind="stable")
        kept = order[:top_k] if top_k else order
        sums = np.cumsum(shares[kept]) / shares[kept].sum()
        assert np.abs(sums - np.float32(top_p)).min() > 1e-6, "too close to call"
        wanted = kept[: int(np.searchsorted(sums, np.float32(top_p))) + 1]
        np.testing.assert_array_equal(np.flatnonzero(masks[row]), np.sort(wanted))


def support(logits, values):
    """The mask inside `_draw`: where argmax looks, with scores that show it."""
    options = [Sampling(temperature=t, top_k=k, top_p=p) for t, k, p in values]
    seen = []

    def argmax(scores, axis):
        seen.append(scores > -np.inf)
        return jax.numpy.zeros(len(scores), np.int32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.jnp, "argmax", argmax)
        drawing = np.ones(len(logits), bool)
        sampling._draw(logits, rows_of(*options), drawing, np.zeros(len(logits), np.int32))
    return np.asarray(seen[0])


MIXTURE = [
    Sampling(),
    Sampling(temperature=0.9, seed=3),
    Sampling(temperature=0.7, top_p=0.8, seed=4),
    Sampling(temperature=1.2, top_k=20, seed=5),
    Sampling(temperature=2.0, min_p=0.1, seed=6, logit_bias={7: 3.0, 100: -2.0}),
    Sampling(temperature=1.5, repetition_penalty=1.3, seed=7),
    Sampling(temperature=1.1, top_k=50, top_p=0.9, min_p=0.05, seed=2**62 + 8),
    Sampling(temperature=1.3, seed=-9),
]


def test_a_row_chooses_alike_alone_and_anywhere_in_a_batch():
    rng = np.random.default_rng(1)
    vocab, steps = 1003, 24  # no multiple of any vector
    logits = rng.normal(0, 3, (steps, 8, vocab)).astype(np.float32)
    seen = rng.random((8, vocab)) < 0.2
    together = np.stack([choose(logits[i], MIXTURE, seen=seen, step=i)[0] for i in range(steps)])
    assert len({tuple(row) for row in together.T.tolist()}) == 8
    for i in range(steps):
        order = rng.permutation(8)
        turned, _ = choose(logits[i][order], [MIXTURE[r] for r in order], seen=seen[order], step=i)
        np.testing.assert_array_equal(turned, together[i][order])
        for row in range(8):
            alone, _ = choose(logits[i][row : row + 1], [MIXTURE[row]], seen=seen[row], step=i)
            assert alone[0] == together[i, row]


def test_noise_is_the_same_bits_alone_and_in_a_batch():
    """Closer than the test above: no draw of it may ever be decided by a last bit."""
    keys = rows_of(*MIXTURE).keys
    noise = jax.jit(sampling._gumbel, static_argnums=2)
    steps = np.arange(8, dtype=np.int32)
    together = np.asarray(noise(keys, steps, 1003))
    for row in range(8):
        alone = noise(keys[row : row + 1], steps[row : row + 1], 1003)
        np.testing.assert_array_equal(np.asarray(alone)[0], together[row])


def test_noise_is_gumbels():
    count = 1 << 20
    noise = np.asarray(sampling._gumbel(rows_of(Sampling()).keys, np.zeros(1, np.int32), count))
    noise = np.sort(noise[0].astype(np.float64))
    assert np.isfinite(noise).all()
    distance = np.abs(np.exp(-np.exp(-noise)) - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / np.sqrt(count)  # Kolmogorov and Smirnov, one in a thousand
    # Of 24 random bits, thirty of the largest would be there twice.
    assert len(np.unique(noise[-1000:])) > 990


def test_noise_is_finite_for_the_largest_and_smallest_bits(monkeypatch):
    """A token that is left alone must not lose to those that were masked."""
    for word, wanted in [(2**32 - 1, -np.log(24 * np.log(2))), (0, 33 * np.log(2))]:
        monkeypatch.setattr(jax.random, "bits", lambda *_, word=word: np.full(3, word, np.uint32))
        noise = sampling._gumbel(rows_of(Sampling()).keys, np.zeros(1, np.int32), 3)
        np.testing.assert_allclose(noise[0], wanted, rtol=1e-5)


def test_seeds_and_steps_draw_anew_and_repeat():
    hot = [Sampling(temperature=50.0, seed=seed) for seed in (0, 1, 2**32, -1, 2**63 - 1)]
    logits = np.zeros((5, 400), np.float32)
    first = np.stack([choose(logits, hot, step=i)[0] for i in range(20)])
    again = np.stack([choose(logits, hot, step=i)[0] for i in range(20)])
    np.testing.assert_array_equal(first, again)
    for columns in (first, first.T):
        assert len({tuple(line) for line in columns.tolist()}) == len(columns)
    unknown = rows_of(*[Sampling(seed=None)] * 50).keys
    assert len({tuple(key) for key in unknown.tolist()}) == 50


def test_greedy_takes_the_first_of_equals():
    logits = [[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-np.inf, -np.inf, -5.0, -5.0]]
    for temperature in (0.0, 1e-30):
        np.testing.assert_array_equal(choose(logits, [Sampling(temperature)] * 3)[0], [1, 0, 2])
    logits.append([-0.0, 0.0, -1.0, -2.0])  # equal, whatever their bits
    for narrow in (dict(top_k=1), dict(top_p=1e-6)):
        options = [Sampling(temperature=1.0, **narrow)] * 4
        for step in range(5):
            np.testing.assert_array_equal(choose(logits, options, step=step)[0], [1, 0, 2, 0])


def test_greedy_follows_bias_and_penalty_and_no_filter():
    logits = np.tile(np.float32([1.0, 3.0, 2.0, -1.0]), (4, 1))
    seen = np.tile([False, True, False, False], (4, 1))
    options = [
        Sampling(repetition_penalty=2.0),  # 3 becomes 1.5
        Sampling(logit_bias={3: 4.5}),
        Sampling(logit_bias={3: 2.0}, top_k=1, min_p=0.5),
        Sampling(logit_bias={1: 3.0}, repetition_penalty=4.0),  # the bias first: 6 / 4 < 2
    ]
    tokens, logprobs = choose(logits, options, seen=seen)
    np.testing.assert_array_equal(tokens, [2, 3, 1, 2])
    raw = logits[0].astype(np.float64)
    np.testing.assert_allclose(logprobs, (raw - np.log(np.exp(raw).sum()))[tokens], atol=1e-6)


def test_extreme_logits_stay_finite():
    """Tokens that are far behind are never drawn, and nothing overflows."""
    logits = np.array([[3e38, -3e38, 0.0], [88.0, -1e4, -np.inf]], np.float32)
    for options in (
        dict(temperature=1e-5),
        dict(temperature=1.0),
        dict(temperature=1.0, top_p=0.5),
    ):
        tokens, logprobs = choose(logits, [Sampling(**options)] * 2)
        np.testing.assert_array_equal(tokens, [0, 0])
        np.testing.assert_array_equal(logprobs, [0, 0])


def test_a_uniform_vocabulary_is_cut_exactly():
    """Equal probabilities, so exactly ceil(top_p · vocab) tokens, the first ones."""
    for vocab in (7, 1000, 40_001):
        masks = support(np.zeros((2, vocab), np.float32), [(1.0, 0, 0.37), (2.0, 5, 0.61)])
        wanted = [int(np.ceil(0.37 * vocab)), 4]
        np.testing.assert_array_equal(masks.sum(axis=1), wanted)
        for mask, count in zip(masks, wanted, strict=True):
            assert mask[:count].all()


def test_a_row_without_top_p_keeps_its_tail_beside_one_with():
    logits = np.tile(np.float32([0.0, -40.0, -80.0, -1.0]), (2, 1))
    masks = support(logits, [(1.0, 0, 1.0), (1.0, 0, 0.9999)])
    np.testing.assert_array_equal(masks, [[1, 1, 1, 1], [1, 0, 0, 1]])


def test_one_program_serves_every_mixture():
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return sample_rows(*arguments)

    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, 130)).astype(np.float32)
    seen, step = np.zeros((4, 130), bool), np.zeros(4, np.int32)
    for _ in range(10):
        options = [MIXTURE[i] if i < 8 else None for i in rng.integers(0, 9, 4)]
        counted(logits, rows_of(*options), seen, step)
    assert len(traces) == 1


def test_top_logprobs():
    rng = np.random.default_rng(3)
    logits = np.round(rng.normal(0, 3, (5, 60)), 1).astype(np.float32)
    raw = logits.astype(np.float64)
    truth = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    tokens, values = top_logprobs(logits, 20)
    order = np.argsort(-raw, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(values, np.take_along_axis(truth, order, 1), atol=2e-6)
    assert top_logprobs(logits[:, :6], 20)[0].shape == (5, 6)
    assert top_logprobs(logits, 0)[0].shape == (5, 0)


def test_seen_tokens_are_marked():
    before = np.zeros((2, 5), bool)
    before[1, 0] = True
    after = mark_seen(before_on_device := jax.numpy.asarray(before), np.array([[4, 2], [-1, 1]]))
    wanted = before.copy()
    wanted[0, [4, 2]] = wanted[1, 1] = True
    np.testing.assert_array_equal(after, wanted)
    np.testing.assert_array_equal(before_on_device, before)


def test_rows_have_room_for_so_many_biases():
    with pytest.raises(ValueError, match="logit_bias has 5 entries; it must have at most 4"):
        rows_of(Sampling(logit_bias=dict.fromkeys(range(5), 1.0)))
    assert sampling_rows([None] * 3).bias_ids.shape == (3, 300)
