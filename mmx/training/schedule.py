"""Schedules as data: the learning rate and the size of the batch as functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Shape = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Piece:
    """One piece of a learning rate: from `start` to `end` in `steps` steps.

    The step with number s of the piece, counted from 0, stands at the fraction f = (s + 1) / steps,
    so that the last step of a piece has exactly `end` and a warm-up from 0 never takes a step of 0.

        linear       start + (end - start) f
        cosine       end + (start - end) (1 + cos(pi f)) / 2
        exponential  start (end / start)^f

    Attributes:
      steps: at least 1.
      start, end: learning rates; both above 0 when exponential.
      shape: how it goes from one to the other; a constant is linear with start = end.

    Raises:
      ValueError: a field out of range.
    """

    steps: int
    start: float
    end: float
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps < 1 << 31:
            raise ValueError(f"Piece: steps is {self.steps!r}; it must be at least 1, below 2^31")
        if self.shape not in get_args(Shape):
            raise ValueError(
                f"Piece: shape is {self.shape!r}; it must be one of {', '.join(get_args(Shape))}"
            )
        for name in ("start", "end"):
            value = getattr(self, name)
            least = "above" if self.shape == "exponential" else "at least"
            if not (0 <= value < math.inf) or (least == "above" and value == 0):
                raise ValueError(f"Piece: {name} is {value!r}; it must be finite and {least} 0")

    def at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The fp32 rate at a step of this piece, clamped to the piece."""
        # Integers are exact; the fraction is the first number that is rounded.
        place = jnp.clip(step + 1, 0, self.steps)
        fraction = place.astype(jnp.float32) / jnp.float32(self.steps)
        if self.shape == "linear":
            value = self.start + (self.end - self.start) * fraction
        elif self.shape == "cosine":
            value = self.end + (self.start - self.end) * (1 + jnp.cos(jnp.pi * fraction)) / 2
        else:
            value = self.start * jnp.exp(math.log(self.end / self.start) * fraction)
        return jnp.where(place == self.steps, jnp.float32(self.end), value)


def warm_up(steps: int, peak: float) -> Piece:
    """Linear from 0: the first step has peak / steps, the last one `peak`."""
    return Piece(steps, 0.0, peak)


def constant(steps: int, value: float) -> Piece:
    """The same rate for `steps` steps."""
    return Piece(steps, value, value)


@dataclass(frozen=True)
class LearningRate:
    """A learning rate, piece after piece; after the last piece it stays at that piece's end.

    Hashable and a pure function of the step: nothing of it is in a checkpoint, and a run resumed at
    step s goes on as one that was never stopped.

    Raises:
      ValueError: no piece at all, or 2^31 steps and more.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self.pieces))
        if not self.pieces:
            raise ValueError("LearningRate: there are no pieces; give at least one")
        if self.num_steps >= 1 << 31:
            raise ValueError(f"LearningRate: {self.num_steps} steps; there must be below 2^31")

    @property
    def num_steps(self) -> int:
        """Steps of all pieces together."""
        return sum(piece.steps for piece in self.pieces)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The fp32 learning rate of a step, the first of which is 0; works under jit."""
        step = jnp.asarray(step, jnp.int32)
        rate, begin = jnp.float32(self.pieces[0].start), 0
        for piece in self.pieces:
            rate = jnp.where(step >= begin, piece.at(step - begin), rate)
            begin += piece.steps
        return rate


@dataclass(frozen=True)
class BatchSchedule:
    """How many micro-batches make a step: batch warm-up as a function of the step.

    A stage lasts until the tokens seen before a step reach the next stage's threshold. Tokens are
    counted as `batch` tokens a step, padding included, so the count is a function of the step
    alone: no state, nothing to restore.

    Attributes:
      micro_batch_tokens: rows x length of one micro-batch.
      stages: (tokens seen, tokens a batch) with rising tokens seen, the first of them 0; batches
        are multiples of `micro_batch_tokens`.

    Raises:
      ValueError: a field out of range.
    """

    micro_batch_tokens: int
    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        stages = tuple((int(seen), int(batch)) for seen, batch in self.stages)
        object.__setattr__(self, "stages", stages)
        if self.micro_batch_tokens < 1:
            raise ValueError(
                f"BatchSchedule: micro_batch_tokens is {self.micro_batch_tokens}; at least 1"
            )
        thresholds = [seen for seen, _ in stages]
        if not stages or thresholds[0] != 0 or sorted(set(thresholds)) != thresholds:
            raise ValueError(
                f"BatchSchedule: stages begin at {thresholds} tokens; they must rise from 0"
            )
        for _, batch in stages:
            if batch < 1 or batch % self.micro_batch_tokens:
                raise ValueError(
                    f"BatchSchedule: a batch of {batch} tokens is no multiple of "
                    f"micro_batch_tokens={self.micro_batch_tokens}"
                )

    @property
    def max_accumulation(self) -> int:
        """The largest count of any stage: the leading axis of every batch."""
        return max(batch for _, batch in self.stages) // self.micro_batch_tokens

    def accumulation(self, step: int) -> int:
        """Micro-batches of this step, the first of which is 0."""
        return self._place(step)[1] // self.micro_batch_tokens

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before this one, padding included."""
        return self._place(step)[0]

    def steps_until(self, tokens: int) -> int:
        """The first step before which at least so many tokens have been seen."""
        step = seen = 0
        ends = [*(threshold for threshold, _ in self.stages[1:]), tokens]
        for (_, batch), end in zip(self.stages, ends, strict=True):
            steps = max(0, -(-(min(end, tokens) - seen) // batch))
            step, seen = step + steps, seen + steps * batch
        return step

    def _place(self, step: int) -> tuple[int, int]:
        """(tokens seen before the step, tokens of its batch)."""
        seen, left = 0, step
        for (_, batch), (end, _) in zip(self.stages, self.stages[1:], strict=False):
            steps = max(0, -(-(end - seen) // batch))
            if left < steps:
                return seen + left * batch, batch
            seen, left = seen + steps * batch, left - steps
        return seen + left * self.stages[-1][1], self.stages[-1][1]


def minimax_batches(micro_batch_tokens: int) -> BatchSchedule:
    """MiniMax-01's batches: 16M tokens, 32M from 69B on, 64M from 790B, 128M from 4.7T.

    Paper, section 4.2. M is taken as 2^20 (16M = 2,048 sequences of 8,192), which it does not say.
    """
    sizes = ((0, 16), (69 * 10**9, 32), (790 * 10**9, 64), (4_700 * 10**9, 128))
    return BatchSchedule(micro_batch_tokens, tuple((seen, size << 20) for seen, size in sizes))


def minimax_learning_rate(batches: BatchSchedule) -> LearningRate:
    """MiniMax-01's learning rate over 11.4T tokens, in steps of these batches.

    Linear warm-up of 500 steps to 2e-4, constant until 7.2T tokens, 1.3e-4 for the next 3.2T,
    exponential decay to 3e-5 over the last 1T (paper, section 4.2). Sure: the four rates, 500
    steps, 7.2T, 3.2T and 1T. A reading: that the 7.2T count from the start, warm-up included.
    The drop to 1.3e-4 was an answer to gradient norms out of the ordinary, not a plan.
    """
    stable, lower, end = (batches.steps_until(t * 10**9) for t in (7_200, 10_400, 11_400))
    return LearningRate(
        (
            warm_up(500, 2e-4),
            constant(max(1, stable - 500), 2e-4),
            constant(max(1, lower - stable), 1.3e-4),
            Piece(max(1, end - lower), 1.3e-4, 3e-5, "exponential"),
        )
    )


def warm_up_stable_decay(
    steps: int, peak: float, end: float, *, warm_up_steps: int, decay_steps: int, shape: Shape
) -> LearningRate:
    """Warm-up, constant, decay in `steps` steps altogether.

    Raises:
      ValueError: warm-up and decay that leave no step between them, or are below 1.
    """
    stable = steps - warm_up_steps - decay_steps
    if stable < 1:
        raise ValueError(
            f"{steps} steps leave none between {warm_up_steps} of warm-up and {decay_steps} of "
            "decay; train longer or shorten them"
        )
    return LearningRate(
        (
            warm_up(warm_up_steps, peak),
            constant(stable, peak),
            Piece(decay_steps, peak, end, shape),
        )
    )
