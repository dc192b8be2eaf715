import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from random_models import random_params, random_tokens, small_config

import mmx
from mmx.inference import decoding, generation
from mmx.placement import make_partition, param_shardings
from sharding import MeshConfig

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
    first = _generate()[:, 0]
    seen = _generate(stop_ids=tuple(first.tolist()))
    np.testing.assert_array_equal(seen[:, 0], first)
    np.testing.assert_array_equal(seen[:, 1:], -1)


def test_seeds_repeat_and_differ():
    options = dict(temperature=1.5)
    first = _generate(seed=0, **options)
    np.testing.assert_array_equal(_generate(seed=0, **options), first)
    assert (_generate(seed=1, **options) != first).any()
    assert len({tuple(step) for step in first.T.tolist()}) > 1  # each step draws anew


def test_row_i_draws_with_the_seed_plus_i():
    same = np.repeat(PROMPTS[:1], 3, axis=0)
    last = 2**63 - 1  # the seed after the largest is the smallest
    for seed in (7, last):
        rows = _generate(same, seed=seed, temperature=1.5)
        assert len({tuple(row) for row in rows.tolist()}) == 3
        for row in range(3):
            one = (seed + row + 2**63) % 2**64 - 2**63
            alone = _generate(same, seed=one, temperature=1.5)
            np.testing.assert_array_equal(alone[0], rows[row])


def test_more_prompts_than_decode_together(monkeypatch):
    many = random_tokens(CONFIG, (7, 5), 6)
    wanted = [_generate(many[rows]) for rows in ([0, 1, 2], [3, 4, 5], [6, 6, 6])]
    monkeypatch.setattr(generation, "_ROWS", 3)
    np.testing.assert_array_equal(_generate(many), np.concatenate(wanted)[:7])


def test_parameters_over_eight_devices():
    """As the training loop has them: but for the norm over all heads no array is whole anywhere."""
    partition = make_partition(MeshConfig(), "fsdp", CONFIG)
    assert partition is not None
    spread = jax.device_put(PARAMS, param_shardings(CONFIG, partition))
    assert sum(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread)) == 1
    seen = mmx.generate(spread, PROMPTS, CONFIG, max_new_tokens=NEW)
    np.testing.assert_array_equal(seen, _generate())


def test_no_program_is_compiled_for_other_tokens_options_and_lengths_of_a_page():
    _generate()
    before = decoding.prefill._cache_size(), decoding.decode._cache_size()
    _generate(random_tokens(CONFIG, (3, 9), 1), temperature=0.7, top_k=3, stop_ids=(1,), seed=4)
    mmx.generate(PARAMS, PROMPTS, CONFIG, max_new_tokens=NEW + 30)
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == before


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
    (dict(max_new_tokens=0), "max_new_tokens is 0; it must be an integer from 1 to 256"),
    (dict(temperature=-0.1), "temperature is -0.1; it must be a number from 0 to 100"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_p=0.0), "top_p is 0.0; it must be more than 0 and at most 1"),
    (dict(top_p=1.1), "top_p is 1.1"),
    (dict(top_k=-1), "top_k is -1; it must be an integer of 0 or more"),
    (dict(stop_ids=(3, 23)), "stop_ids is 23; it must be an integer from 0 to 22"),
    (dict(stop_ids=range(17)), "stop_ids has 17 entries; it must have at most 16"),
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
