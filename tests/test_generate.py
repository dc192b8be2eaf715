import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from random_models import random_params, random_tokens, small_config

import mmx
from mmx.inference.sampling import sample

CONFIG = small_config("ls", vocab_size=23)
PARAMS = random_params(CONFIG, 5)
PROMPTS = random_tokens(CONFIG, (3, 5), 5)
NEW = 9


def _generate(prompts=PROMPTS, **options) -> np.ndarray:
    return np.asarray(mmx.generate(PARAMS, prompts, CONFIG, max_new_tokens=NEW, **options))


def test_greedy_is_the_most_likely_token_of_the_truth():
    seen = _generate()
    assert seen.shape == (3, NEW)
    assert seen.dtype == np.int32
    whole = np.concatenate([PROMPTS, seen], axis=1)
    logits = truth.forward(PARAMS, whole, CONFIG).logits[:, PROMPTS.shape[1] - 1 : -1]
    best = -np.sort(-logits, axis=-1)
    assert (best[..., 0] - best[..., 1]).min() > 1e-3, "choose another seed: too close to call"
    np.testing.assert_array_equal(seen, logits.argmax(axis=-1))


def test_bf16_chooses_what_the_truth_finds_nearly_best():
    params = random_params(CONFIG, 5, jnp.bfloat16)
    seen = np.asarray(mmx.generate(params, PROMPTS, CONFIG, max_new_tokens=NEW))
    whole = np.concatenate([PROMPTS, seen], axis=1)
    logits = truth.forward(params, whole, CONFIG).logits[:, PROMPTS.shape[1] - 1 : -1]
    chosen = np.take_along_axis(logits, seen[..., None], axis=-1)[..., 0]
    # Two bf16 logits may each be off by 5 % of their spread.
    assert (logits.max(axis=-1) - chosen).max() <= 0.1 * logits.std()


def test_a_row_ends_with_the_first_stop_id_and_others_go_on():
    free = _generate()
    stops = (int(free[0, 2]), int(free[1, 5]))
    seen = _generate(stop_ids=stops)
    for row in range(3):
        at = [i for i, token in enumerate(free[row]) if token in stops]
        end = at[0] + 1 if at else NEW
        np.testing.assert_array_equal(seen[row, :end], free[row, :end])
        np.testing.assert_array_equal(seen[row, end:], -1)
    assert (seen == -1).any()


def test_all_rows_stopped_at_once():
    first = _generate()[:1, 0]
    one = PROMPTS[:1]
    seen = _generate(one, stop_ids=tuple(first.tolist()))
    np.testing.assert_array_equal(seen[0], [first[0], *[-1] * (NEW - 1)])


def test_a_tie_goes_to_the_first():
    logits = jnp.asarray([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    options = dict(top_p=1.0, top_k=0)
    greedy = sample(logits, jax.random.key(0), temperature=0.0, **options)
    np.testing.assert_array_equal(greedy, [1, 0])
    for narrow in (dict(top_p=1.0, top_k=1), dict(top_p=1e-6, top_k=0)):
        drawn = sample(logits, jax.random.key(0), temperature=1.0, **narrow)
        np.testing.assert_array_equal(drawn, [1, 0])


LOGITS = np.array([1.3, -0.2, 2.0, 0.4, -1.5, 1.9], np.float32)


def _expected(temperature, top_p, top_k) -> np.ndarray:
    """The distribution to draw from, by the definition in `sample`."""
    probabilities = truth.softmax(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-probabilities)
    kept = order[:top_k] if top_k else order
    shares = probabilities[kept] / probabilities[kept].sum()
    enough = int(np.searchsorted(np.cumsum(shares), top_p - 1e-9)) + 1
    result = np.zeros(len(LOGITS))
    result[kept[:enough]] = shares[:enough] / shares[:enough].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 1.0, 3), (1.0, 0.6, 0), (1.0, 0.75, 4), (1.0, 0.9, 99)],
)
def test_draws_follow_the_distribution(temperature, top_p, top_k):
    draws = 20_000
    seen = sample(
        jnp.broadcast_to(LOGITS, (draws, len(LOGITS))),
        jax.random.key(1),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    wanted = _expected(temperature, top_p, top_k)
    counts = np.bincount(np.asarray(seen), minlength=len(LOGITS))
    assert not counts[wanted == 0].any()
    # Five standard deviations of a binomial count.
    bar = 5 * np.sqrt(draws * wanted * (1 - wanted))
    assert (np.abs(counts - draws * wanted) <= bar).all(), (counts / draws, wanted)


def test_seeds_repeat_and_differ():
    options = dict(temperature=1.5)
    first = _generate(seed=0, **options)
    np.testing.assert_array_equal(_generate(seed=0, **options), first)
    assert (_generate(seed=1, **options) != first).any()
    assert len({tuple(step) for step in first.T.tolist()}) > 1  # each step draws anew


def test_narrow_sampling_is_greedy():
    greedy = _generate()
    np.testing.assert_array_equal(_generate(temperature=1.0, top_k=1), greedy)
    np.testing.assert_array_equal(_generate(temperature=1e-4), greedy)


def test_one_new_token_and_a_full_sequence():
    config = dataclasses.replace(CONFIG, max_seq_len=6)
    one = mmx.generate(PARAMS, PROMPTS, config, max_new_tokens=1)
    np.testing.assert_array_equal(one, _generate()[:, :1])
    with pytest.raises(ValueError, match=r"5 tokens and max_new_tokens=2 are 7 .* max_seq_len=6"):
        mmx.generate(PARAMS, PROMPTS, config, max_new_tokens=2)


BAD = [
    (dict(max_new_tokens=0), "max_new_tokens is 0; it must be at least 1"),
    (dict(temperature=-0.1), "temperature is -0.1; it must be 0 or more"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_p=0.0), r"top_p is 0.0; it must be in \(0, 1\]"),
    (dict(top_p=1.1), "top_p is 1.1"),
    (dict(top_k=-1), "top_k is -1; it must be 0"),
    (dict(stop_ids=(3, 23)), "stop_ids is 23; it must be below 23"),
    (dict(mask=np.array([[1] * 5, [0] * 5, [1] * 5])), "row 1 of mask has no token"),
    (dict(mask=np.ones((3, 4), int)), r"mask has shape \(3, 4\); tokens have \(3, 5\)"),
    (dict(tokens=PROMPTS + 23), r"ids must be in \[0, vocab_size=23\)"),
    (dict(tokens=PROMPTS[0]), r"tokens have shape \(5,\)"),
    (dict(implementation="cuda"), "unknown implementation 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change, message):
    arguments = dict(tokens=PROMPTS, max_new_tokens=NEW) | change
    with pytest.raises(ValueError, match=message):
        mmx.generate(PARAMS, arguments.pop("tokens"), CONFIG, **arguments)
