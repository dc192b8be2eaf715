"""Shares of the sources, and rows planned from lengths."""

import itertools

import numpy as np
import pytest

from mmx.data.mixing import Weights
from mmx.data.packing import Planner, Terms, best_fit, shuffled

RNG = np.random.default_rng(7)
NAMES = ("books", "code", "web")
# Mean lengths that differ by a factor of twenty: shares of documents are not shares of tokens.
LENGTHS = [np.exp(RNG.normal(mean, 1.2, 3000)).astype(np.uint32) + 1 for mean in (8.0, 6.5, 5.0)]


def sampled(weights, *, seq_len, samples, first=0, max_epochs=(None,) * 3):
    """Tokens by source of each row, from sample `first` on."""
    planner = Planner(NAMES, LENGTHS, seed=3)
    cursor, rows = planner.start(), []
    while len(rows) < first + samples:
        window = planner.window(cursor, Terms(seq_len, weights, max_epochs))
        cursor = window.after
        for row in window.rows:
            counts = np.zeros(3)
            for piece in row:
                counts[piece.source] += piece.length
            rows.append(counts)
    return np.array(rows[first : first + samples])


# ---------------------------------------------------------------- weights


def test_weights_are_linear_between_stages():
    stages = ((0, {"a": 3.0, "b": 1.0}), (1000, {"b": 1.0, "c": 4.0}))
    weights = Weights(stages, transition=200)
    before, after = np.array([0.75, 0.25, 0.0]), np.array([0.0, 0.2, 0.8])
    for sample, part in [(0, 0), (999, 0), (1000, 0), (1050, 0.25), (1200, 1), (10**9, 1)]:
        at = weights.at(sample)
        assert sorted(at) == ["a", "b", "c"]
        want = (1 - part) * before + part * after
        np.testing.assert_allclose([at[s] for s in "abc"], want, rtol=0, atol=1e-15)
    assert Weights.from_json(weights.to_json()) == weights


def test_weights_change_at_once_without_transition():
    weights = Weights(((0, {"a": 1}), (10, {"b": 1})))
    assert weights.at(9) == {"a": 1.0, "b": 0.0}
    assert weights.at(10) == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    ("stages", "transition", "message"),
    [
        ((), 0, "must be 0 and increase"),
        (((5, {"a": 1}),), 0, "must be 0 and increase"),
        (((0, {"a": 1}), (9, {"a": 1}), (9, {"a": 1})), 0, "must be 0 and increase"),
        (((0, {"a": 1}), (9, {"a": 0.0, "b": 0})), 0, "from sample 9 sum to zero"),
        (((0, {}),), 0, "sum to zero"),
        (((0, {"a": -1, "b": 2}),), 0, "'a': -1"),
        (((0, {"a": float("nan")}),), 0, "nan"),
        (((0, {"a": 1}), (10, {"b": 1}), (15, {"a": 1})), 6, "no longer than"),
        (((0, {"a": 1}),), -1, ">= 0"),
    ],
)
def test_bad_weights_are_refused(stages, transition, message):
    with pytest.raises(ValueError, match=message) as caught:
        Weights(stages, transition)
    assert "\n" not in str(caught.value)


def test_unknown_source_suggests_the_nearest():
    with pytest.raises(ValueError, match="'stdlib_code'; did you mean 'stdlib-code'"):
        Weights.constant({"stdlib_code": 1}).check_sources(("pydoc-topics", "stdlib-code"))
    Weights.constant({"a": 1}).check_sources(("a", "b"))


# ---------------------------------------------------------------- the mixture

STAGES = ((0, {"books": 0.6, "code": 0.3, "web": 0.1}), (5000, {"books": 0.1, "web": 0.9}))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_mixture_at_any_point_of_a_transition(part):
    """Weights frozen at that point: shares of 10,000 samples within 0.5 % of the target."""
    target = (1 - part) * np.array([0.6, 0.3, 0.1]) + part * np.array([0.1, 0.0, 0.9])
    weights = Weights.constant(dict(zip(NAMES, target, strict=True)))
    counts = sampled(weights, seq_len=512, samples=10_000).sum(0)
    np.testing.assert_allclose(counts / counts.sum(), target, rtol=0, atol=0.005)


def test_mixture_follows_a_transition():
    """10,000 samples from any place of a running transition, against the mean target there."""
    weights = Weights(STAGES, transition=20_000)
    rows = sampled(weights, seq_len=512, samples=30_000)
    for first in (0, 3000, 8000, 15_000, 20_000):
        at = np.arange(first, first + 10_000)
        part = np.clip((at - 5000) / 20_000, 0, 1)[:, None]
        target = ((1 - part) * [0.6, 0.3, 0.1] + part * [0.1, 0.0, 0.9]).mean(0)
        counts = rows[first : first + 10_000].sum(0)
        np.testing.assert_allclose(counts / counts.sum(), target, rtol=0, atol=0.005)


def test_a_source_that_ends_leaves_its_share_in_proportion():
    """Books end after one epoch; code and web go on at 3 : 1, exactly as they were."""
    weights = Weights.constant({"books": 0.6, "code": 0.3, "web": 0.1})
    rows = sampled(weights, seq_len=4096, samples=10_000, max_epochs=(1, None, None))
    assert rows[:, 0].sum() == LENGTHS[0].sum()
    rest = rows[-2000:].sum(0)
    np.testing.assert_allclose(rest / rest.sum(), [0, 0.75, 0.25], rtol=0, atol=0.005)


# ---------------------------------------------------------------- order and packing


@pytest.mark.parametrize("count", [1, 2, 5, 257, 1000])
def test_every_epoch_is_another_permutation(count):
    epochs = [
        [shuffled(e * count + i, count=count, seed=1, name="a") for i in range(count)]
        for e in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 100:
        orders = [*epochs, [shuffled(i, count=count, seed=2, name="a") for i in range(count)],
                  [shuffled(i, count=count, seed=1, name="b") for i in range(count)]]  # fmt: skip
        for one, other in itertools.combinations(orders, 2):
            # Two random permutations agree in one place on average; 12 has odds of 1e-9.
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 12
        # Neighbours are no neighbours any more: a shift or a stride would keep a difference.
        steps = np.diff(epochs[0]) % count
        assert np.unique(steps).size > 0.5 * count


def test_best_fit_by_hand():
    assert best_fit([3, 10, 7, 5, 5, 1], 10) == [[1], [2, 0], [3, 4], [5]]
    # 6 + 4 and 7 + 3; first fit would put the 3 to the 6.
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


def test_packing_is_full_at_8k():
    """On lengths like those of text: log-normal, median 400, some far beyond the row."""
    rows = sampled(Weights.constant({"books": 1, "code": 1, "web": 1}), seq_len=8192, samples=3000)
    assert rows.sum(1).max() <= 8192
    assert rows.sum() / (len(rows) * 8192) >= 0.97


def test_rows_of_a_window_are_shuffled():
    """Best fit puts long pieces first; where a row stands must not tell how many it holds."""
    planner = Planner(NAMES, LENGTHS, seed=3)
    terms = Terms(2048, Weights.constant({"books": 1, "code": 1, "web": 1}), (None,) * 3)
    pieces = np.array([len(row) for row in planner.window(planner.start(), terms).rows])
    place = np.arange(len(pieces))
    # Of independent ranks the correlation has standard deviation 1/sqrt(256) = 0.06.
    assert abs(np.corrcoef(place, pieces)[0, 1]) < 0.25
