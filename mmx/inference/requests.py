"""What one request asks of generation, and what it gets: plain values, checked before use.

Everything here may come from somebody else's JSON, so types are checked as well as ranges.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from mmx.config import ModelConfig

MAX_BIAS = 300  # entries of logit_bias
MAX_LOGPROBS = 20
MAX_STOPS = 16  # stop ids, and stop strings
MAX_STOP_LENGTH = 256  # characters of a stop string
FinishReason = Literal["stop", "length", "cancelled", "error"]


class BadOption(ValueError):
    """A field of `Sampling` that is not what it must be; others may say so in words of their own.

    Attributes:
      name, value, wanted: "name is value; it must be wanted".
    """

    def __init__(self, name: str, value: object, wanted: str):
        super().__init__(f"{name} is {_shown(value)}; it must be {wanted}")
        self.name, self.value, self.wanted = name, value, wanted


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and when it ends; `check` before use.

    The filters apply in the order of `mmx.inference.sampling.sample_rows`.

    Attributes:
      temperature: 0 to 100; 0 takes the most likely token, and so does anything below 1e-5.
      top_p: keep the fewest tokens whose probability together reaches this; in (0, 1].
      top_k: keep this many of the most likely tokens; 0 keeps all.
      min_p: keep tokens at least this times as likely as the most likely one; in [0, 1].
      repetition_penalty: for tokens of the prompt and of the output: positive logits are divided by
        it, negative ones multiplied; 0.01 to 100, 1 changes nothing.
      seed: of the random draws, a signed 64-bit integer; None takes one nobody knows.
      logit_bias: token id -> what is added to its logit, -100 to 100; at most 300 entries.
      logprobs: None for none; 0 to 20 gives the log-probability of each chosen token and of as many
        of the most likely ones.
      stop_ids: the request ends with the first of these, which is included; at most 16.
      stop: the text ends before the first of these; at most 16 of 1 to 256 characters.
      max_new_tokens: tokens at most.
      ignore_eos: the end token of the config does not end the request.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 16
    ignore_eos: bool = False

    def check(self, config: ModelConfig) -> None:
        """Refuse what no row can be made of.

        Raises:
          ValueError: a field of the wrong type or out of range (`BadOption`); names the field, the
            value seen and the value wanted.
        """
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        _require(self.top_p > 0, "top_p", self.top_p, "more than 0 and at most 1")
        _integer("top_k", self.top_k, 0, None)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("max_new_tokens", self.max_new_tokens, 1, config.max_seq_len)
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        self._check_bias(config)
        self._check_stops(config)

    def end_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """The ids that end the request: its own, and the end tokens of the config."""
        return self.stop_ids if self.ignore_eos else (*self.stop_ids, *config.end_token_ids)

    def _check_bias(self, config: ModelConfig) -> None:
        mapping = isinstance(self.logit_bias, Mapping)
        _require(mapping, "logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        _count("logit_bias", self.logit_bias, MAX_BIAS)
        for token, bias in self.logit_bias.items():
            _integer("a token of logit_bias", token, 0, config.vocab_size - 1)
            _number(f"logit_bias of token {token}", bias, -100, 100)

    def _check_stops(self, config: ModelConfig) -> None:
        _require(
            isinstance(self.stop_ids, tuple), "stop_ids", self.stop_ids, "a tuple of token ids"
        )
        _count("stop_ids", self.stop_ids, MAX_STOPS)
        for token in self.stop_ids:
            _integer("a token of stop_ids", token, 0, config.vocab_size - 1)
        _require(isinstance(self.stop, tuple), "stop", self.stop, "a tuple of strings")
        _count("stop", self.stop, MAX_STOPS)
        for text in self.stop:
            fits = isinstance(text, str) and 1 <= len(text) <= MAX_STOP_LENGTH
            _require(
                fits, "an entry of stop", text, f"a string of 1 to {MAX_STOP_LENGTH} characters"
            )


class TokenLogprob(NamedTuple):
    """Natural log-probabilities of one step, of the model itself: before any filter.

    Attributes:
      token, logprob: the chosen one.
      top: the most likely tokens, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """One token of one request, or its end.

    Attributes:
      request: its number.
      token: None where the request ended without another one.
      logprob: of the token, where asked for.
      text: what became certain with this token, of an engine with a tokenizer; all texts together
        are the answer, without the stop string or the stop id that ended it.
      finish_reason: of the last event; see `Result`.
      error: why it ended, with finish_reason 'error'; one line.
    """

    request: int
    token: int | None
    logprob: TokenLogprob | None = None
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """What a request got.

    Attributes:
      tokens: ids; a stop id that ended the request is the last.
      logprobs: one entry a token, or None where they were not asked for.
      finish_reason: 'stop' for a stop id, the end token or a stop string; 'length' for
        max_new_tokens; 'cancelled'; 'error' where the tokenizer failed on a token.
      text: without the stop string or stop id that ended it; None without a tokenizer.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    text: str | None


def result_of(events: Sequence[Event], *, text: bool) -> Result:
    """All events of a request that has ended as one; `text` is whether there was a tokenizer."""
    tokens = tuple(e.token for e in events if e.token is not None)
    logprobs = tuple(e.logprob for e in events if e.logprob)
    reason = events[-1].finish_reason
    assert reason is not None
    return Result(
        tokens, logprobs or None, reason, "".join(e.text for e in events) if text else None
    )


def check_prompt(tokens: Sequence[int] | np.ndarray, config: ModelConfig) -> np.ndarray:
    """The ids of a prompt as int32.

    Raises:
      ValueError: none, something else than integers, or one out of range.
    """
    prompt = np.asarray(tokens)
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError("the prompt is empty; it needs at least one token")
    if prompt.dtype.kind not in "iu":
        # Integers that numpy has no type for, alone or together.
        for token in tokens if all(type(token) is int for token in tokens) else ():
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"the prompt holds the id {_shown(token)}; ids are 0 to {config.vocab_size - 1}"
                )
        raise ValueError(f"the prompt holds {prompt.dtype}; it must be integer token ids")
    low, high = prompt.min(), prompt.max()
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"the prompt holds the id {wrong}; ids are 0 to {config.vocab_size - 1}")
    return prompt.astype(np.int32)


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise BadOption(name, value, wanted)


def _integer(name: str, value: Any, low: int, high: int | None) -> None:
    wanted = f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and low <= value and (high is None or value <= high), name, value, wanted)


def _number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN is not between any two numbers.
    _require(number and low <= value <= high, name, value, f"a number from {low} to {high}")


def _count(name: str, entries: Sized, most: int) -> None:
    count = len(entries)
    if count > most:
        raise ValueError(f"{name} has {count} entries; it must have at most {most}")


def _shown(value: object) -> str:
    """A value as one short line, whatever it is: an integer of a million digits has no repr."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."
