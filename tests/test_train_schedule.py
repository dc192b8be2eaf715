import math

import jax
import numpy as np
import pytest

from mmx.training.schedule import (
    BatchSchedule,
    LearningRate,
    Piece,
    constant,
    minimax_batches,
    minimax_learning_rate,
    warm_up,
    warm_up_stable_decay,
)

# Two or three roundings of fp32, of an exponential a few more.
RELATIVE = 1e-6


def rates(schedule: LearningRate, steps) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(schedule))(np.asarray(steps, np.int32)))


def test_pieces_follow_their_formulas():
    pieces = (
        warm_up(4, 8e-4),
        constant(3, 8e-4),
        constant(2, 5e-4),
        Piece(5, 5e-4, 1e-4, "linear"),
        Piece(6, 1e-4, 4e-5, "cosine"),
        Piece(7, 4e-5, 1e-6, "exponential"),
    )
    wanted = [2e-4, 4e-4, 6e-4, 8e-4] + [8e-4] * 3 + [5e-4] * 2
    wanted += [4.2e-4, 3.4e-4, 2.6e-4, 1.8e-4, 1e-4]
    wanted += [4e-5 + 6e-5 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(1, 7)]
    wanted += [4e-5 * (1 / 40) ** (i / 7) for i in range(1, 8)]
    wanted += [1e-6] * 5  # it stays where it ended
    seen = rates(LearningRate(pieces), range(len(wanted)))
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, wanted, rtol=RELATIVE)
    assert seen[26] == np.float32(1e-6)  # the end is reached exactly
    eager = [float(LearningRate(pieces)(step)) for step in (0, 3, 12, 18, 26)]
    np.testing.assert_allclose(eager, np.array(wanted)[[0, 3, 12, 18, 26]], rtol=RELATIVE)


def test_steps_far_beyond_fp32_integers_are_told_apart():
    begin = 2**30
    schedule = LearningRate((constant(begin, 1.0), Piece(2, 1.0, 0.0)))
    np.testing.assert_array_equal(
        rates(schedule, [begin - 1, begin, begin + 1, 2**31 - 1]), [1.0, 0.5, 0.0, 0.0]
    )


def test_warm_up_stable_decay():
    schedule = warm_up_stable_decay(100, 1.0, 0.1, warm_up_steps=10, decay_steps=20, shape="linear")
    assert schedule.num_steps == 100
    seen = rates(schedule, [0, 9, 10, 79, 80, 99])
    np.testing.assert_allclose(seen, [0.1, 1, 1, 1, 1 - 0.9 / 20, 0.1], rtol=RELATIVE)


def simulated(schedule: BatchSchedule, steps: int):
    """Accumulation and tokens before each step, one step after the other."""
    seen = 0
    for _ in range(steps):
        batch = [size for threshold, size in schedule.stages if threshold <= seen][-1]
        yield batch // schedule.micro_batch_tokens, seen
        seen += batch


@pytest.mark.parametrize(
    "stages",
    [
        ((0, 4),),
        ((0, 2), (7, 4), (16, 8)),
        ((0, 8), (3, 4), (9, 2)),  # the second threshold is passed within the first batch
        ((0, 2), (100, 6)),
        ((0, 16), (2, 2), (5, 4)),  # a stage of no step at all
    ],
)
def test_batches_grow_at_their_thresholds(stages):
    schedule = BatchSchedule(2, stages)
    for step, (accumulation, seen) in enumerate(simulated(schedule, 70)):
        assert schedule.accumulation(step) == accumulation, step
        assert schedule.tokens_before(step) == seen, step
        assert schedule.steps_until(seen) <= step
        assert schedule.steps_until(seen + 1) == step + 1
    assert schedule.max_accumulation == max(size for _, size in stages) // 2


def test_minimax_batches_and_learning_rate():
    micro = 8 * 8192
    batches = minimax_batches(micro)
    steps = [batches.steps_until(t * 10**9) for t in (69, 790, 4_700, 7_200, 10_400, 11_400)]
    assert steps[0] == math.ceil(69e9 / 2**24)
    counts = [batches.accumulation(s + off) * micro // 2**20 for s in steps[:3] for off in (-1, 0)]
    assert counts == [16, 32, 32, 64, 64, 128]
    assert batches.max_accumulation == 2**27 // micro
    # Each threshold is met to within one batch.
    for step, tokens in zip(steps[3:], (7.2e12, 10.4e12, 11.4e12), strict=True):
        assert 0 <= batches.tokens_before(step) - tokens < 2**27
    schedule = minimax_learning_rate(batches)
    assert schedule.num_steps == steps[5]
    at = [0, 249, 499, 500, steps[3] - 1, steps[3], steps[4] - 1, steps[5] - 1, steps[5] + 10**6]
    wanted = [4e-7, 1e-4, 2e-4, 2e-4, 2e-4, 1.3e-4, 1.3e-4, 3e-5, 3e-5]
    np.testing.assert_allclose(rates(schedule, at), wanted, rtol=RELATIVE)
    middle = (steps[4] + steps[5]) // 2
    halfway = math.sqrt(1.3e-4 * 3e-5)
    np.testing.assert_allclose(rates(schedule, [middle]), [halfway], rtol=1e-3)  # odd step count


BAD = [
    (lambda: Piece(0, 1, 1), "steps is 0; it must be at least 1"),
    (lambda: Piece(1, 1, 1, "step"), "shape is 'step'; it must be one of linear, cosine"),  # pyright: ignore
    (lambda: Piece(1, -1, 1), "start is -1; it must be finite and at least 0"),
    (lambda: Piece(1, 1, float("nan")), "end is nan"),
    (lambda: Piece(1, 1, 0, "exponential"), "end is 0; it must be finite and above 0"),
    (lambda: LearningRate(()), "there are no pieces"),
    (lambda: LearningRate((constant(2**31 - 1, 1), constant(1, 1))), "must be below 2\\^31"),
    (lambda: BatchSchedule(3, ((0, 7),)), "a batch of 7 tokens is no multiple of .*=3"),
    (lambda: BatchSchedule(0, ((0, 7),)), "micro_batch_tokens is 0"),
    (lambda: BatchSchedule(1, ((1, 7),)), "they must rise from 0"),
    (lambda: BatchSchedule(1, ((0, 7), (9, 8), (9, 9))), r"\[0, 9, 9\] tokens; they must rise"),
    (
        lambda: warm_up_stable_decay(9, 1.0, 0.1, warm_up_steps=4, decay_steps=5, shape="linear"),
        "9 steps leave none between 4 of warm-up and 5 of decay",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
