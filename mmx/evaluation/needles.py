"""Needle retrieval: a fact somewhere in a long text, and the question for it at the end.

The words are those of the generated training text (`mmx.data.facts`), so that a small model
trained on that can be measured too. An answer counts when every token of it is the most likely one
after the tokens before it, which is when greedy generation would give it; so one forward pass tells
what generation would.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from mmx.config import ModelConfig
from mmx.data import tokenizer as bpe
from mmx.data.facts import Ids, draw_facts, fact, filler, line_starts, question, scatter
from mmx.model import Params, backbone, check_tokens, unembed
from mmx.training.agreement import compile_together
from sharding import Partition, constrain


class Prompt(NamedTuple):
    """Ids up to the answer, and those of the answer; `length` tokens together."""

    prompt: Ids
    answer: Ids


@dataclass(frozen=True)
class NeedleResult:
    """What was retrieved from texts of one length.

    Attributes:
      length: tokens of prompt and answer together.
      depths: where the needle was, 0 for the beginning of the text and 1 for its end.
      exact: share of answers of which every token is right, for each depth.
      token_accuracy: share of the answers' tokens that are right, over all depths.
      loss: of the answers' tokens, a mean over them, in nats.
    """

    length: int
    depths: tuple[float, ...]
    exact: tuple[float, ...]
    token_accuracy: float
    loss: float

    @property
    def mean_exact(self) -> float:
        """The mean of `exact` over the depths."""
        return float(np.mean(self.exact))


def needle_prompts(
    tokenizer: Tokenizer,
    *,
    length: int,
    depths: Sequence[float],
    count: int,
    seed: int,
    needles: int = 1,
    haystack: Sequence[int] | np.ndarray | None = None,
) -> list[Prompt]:
    """Prompts that end right before the answer, `count` for each depth, depth by depth.

    Args:
      tokenizer: of the model.
      length: tokens of a prompt and its answer together, so that both fit a model of this length.
      depths: where the needle asked for lies, each in [0, 1]; it goes to the nearest line.
      count: prompts for each depth.
      seed: of all choices.
      needles: facts in each text, 1 to 16; those not asked for lie anywhere.
      haystack: ids of a text to hide them in; None generates sentences.

    Raises:
      ValueError: an argument out of range, or a length or haystack too short for the facts.
    """
    if count < 1 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"count is {count} and depths are {tuple(depths)}; there must be at least one of "
            "each, and depths in [0, 1]"
        )
    draw = random.Random(f"mmx needles {seed}").random  # alike in all Python versions
    # One text for all, from which each prompt takes a stretch of its own.
    if haystack is None:
        text = filler(draw, tokenizer, length + max(1000, length // 4))
    else:
        text = np.asarray(haystack, np.uint32)
    starts = line_starts(tokenizer, text)
    prompts = []
    for depth in depths:
        for _ in range(count):
            facts = draw_facts(draw, needles)
            places = [depth, *(draw() for _ in facts[1:])]
            inserts = [
                (place, bpe.encode(tokenizer, fact(*what) + "\n"))
                for place, what in zip(places, facts, strict=True)
            ]
            asked, answer = _question(tokenizer, *facts[0])
            room = length - len(asked) - len(answer) - sum(len(ids) for _, ids in inserts)
            if not 1 <= room <= len(text):
                raise ValueError(
                    f"length is {length}: {length - room} tokens are facts, question and answer, "
                    f"and the text to hide them in has {len(text)}; choose a length in between"
                )
            # It ends with a line; its beginning may be cut.
            ends = starts[starts >= room]
            end = int(ends[int(draw() * len(ends))]) if len(ends) else len(text)
            first = end - room
            within = starts[(starts >= first) & (starts <= end)] - first
            hidden = scatter(text[first:end], np.append(0, within), inserts)
            prompts.append(Prompt(np.concatenate([hidden, asked]), answer))
    return prompts


def needle_accuracy(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    length: int,
    depths: Sequence[float],
    count: int,
    seed: int,
    batch_size: int,
    needles: int = 1,
    haystack: Sequence[int] | np.ndarray | None = None,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> NeedleResult:
    """How much a model retrieves from texts of `length` tokens.

    One program for each length and batch size. Logits are computed where answers are alone: at a
    million tokens those of all would not fit.

    Args:
      params: as for `mmx.forward`; activations have the dtype of the embedding.
      config: of the model.
      tokenizer: of the model.
      length, depths, count, seed, needles, haystack: as for `needle_prompts`.
      batch_size: prompts at a time.
      implementation: of the kernels; None is the best on this platform.
      partition: over which devices the work is spread, with parameters where `mmx.placement` puts
        them. Of several processes all call this, and all have the result.

    Raises:
      ValueError: `length` is above `config.max_seq_len`, the tokenizer has more tokens than the
        model, sizes that the devices cannot share evenly, or see `needle_prompts`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    prompts = needle_prompts(
        tokenizer,
        length=length,
        depths=depths,
        count=count,
        seed=seed,
        needles=needles,
        haystack=haystack,
    )
    longest = max(len(prompt.answer) for prompt in prompts)
    tokens = np.stack([np.concatenate(prompt) for prompt in prompts]).astype(np.int32)
    check_tokens(tokens, config)
    sizes = np.array([len(prompt.answer) for prompt in prompts])
    asked = np.arange(longest) >= longest - sizes[:, None]
    right, losses = np.zeros(asked.shape, bool), np.zeros(asked.shape, np.float32)
    for first in range(0, len(prompts), batch_size):
        rows = np.arange(first, min(first + batch_size, len(prompts)))
        # The last batch repeats its last row, so that there is one program.
        padded = np.pad(rows, (0, batch_size - len(rows)), mode="edge")
        arguments = params, tokens[padded], config, longest, implementation, partition
        if first == 0:
            compile_together(_score, *arguments)
        found = _score(*arguments)
        right[rows], losses[rows] = (np.asarray(value)[: len(rows)] for value in found)
    exact = np.all(right | ~asked, axis=1).reshape(len(depths), count).mean(axis=1)
    return NeedleResult(
        length=length,
        depths=tuple(float(depth) for depth in depths),
        exact=tuple(float(share) for share in exact),
        token_accuracy=float(right[asked].mean()),
        loss=float(losses[asked].mean(dtype=np.float64)),
    )


@functools.partial(jax.jit, static_argnames=("config", "last", "implementation", "partition"))
def _score(
    params: Params,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    last: int,
    implementation: str | None,
    partition: Partition | None = None,
) -> tuple[Bool[Array, "B last"], Float[Array, "B last"]]:
    """For the last tokens: whether each is the most likely one, and its -log probability."""
    with jax.named_scope("needles"):
        tokens = constrain(tokens, "batch", "seq", partition=partition)
        x, _, _, _ = backbone(
            params, tokens, config, implementation=implementation, partition=partition
        )
        # The token at t is predicted at t - 1.
        logits = unembed(params, x[:, -last - 1 : -1], config)
        logits = constrain(logits, None, None, None, partition=partition)
        answers = tokens[:, -last:]
        chosen = jnp.take_along_axis(logits, answers[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        right = constrain(jnp.argmax(logits, axis=-1) == answers, None, None, partition=partition)
        return right, constrain(losses, None, None, partition=partition)


def _question(tokenizer: Tokenizer, place: str, number: int) -> tuple[Ids, Ids]:
    """The question's ids up to the number, and those of the number.

    Encoded as one text: a tokenizer may put the number's first digit and the space before it into
    one token, which then belongs to the answer.
    """
    before = question(place)
    tokenizer.encode_special_tokens = True
    encoding = tokenizer.encode(f"{before}{number}.", add_special_tokens=False)
    begin, end = len(before), len(before) + len(str(number))
    answer = [i for i, (a, b) in enumerate(encoding.offsets) if b > begin and a < end]
    ids = np.array(encoding.ids, np.uint32)
    return ids[: answer[0]], ids[answer[0] : answer[-1] + 1]
