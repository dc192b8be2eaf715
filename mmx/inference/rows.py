"""The batch of the decode program as arrays: what runs in each row, and how it chooses."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmx.config import ModelConfig
from mmx.inference import graphs
from mmx.inference.requests import MAX_LOGPROBS, Sampling
from mmx.inference.sampling import SamplingRows, sample_rows, sampling_rows, top_logprobs

MAX_STOP_IDS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The batch of the decode program: R places for sequences.

    Attributes:
      tokens: the last token of each sequence, which the next step reads.
      positions: where it stands.
      active: whether there is a sequence that goes on.
      generated: tokens chosen so far.
      limits: of `generated`.
      stop_ids: tokens that end the sequence; -1 where there is none.
      page_table: the pages of each row in order; past its length any number.
      sampling: how to choose.
      seen: which tokens the sequence holds, prompt included.
      wants_top: whether its most likely tokens are asked for.
    """

    tokens: Int[Array, "R"]
    positions: Int[Array, "R"]
    active: Bool[Array, "R"]
    generated: Int[Array, "R"]
    limits: Int[Array, "R"]
    stop_ids: Int[Array, "R 16"]
    page_table: Int[Array, "R N"]
    sampling: SamplingRows
    seen: Bool[Array, "R vocab"]
    wants_top: Bool[Array, "R"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """What decoding has chosen.

    Attributes:
      tokens: of each step and row.
      logprobs: of these tokens, before temperature and filters.
      valid: where a sequence was running.
      running: whether it goes on after that.
      top_tokens, top_logprobs: the 20 most likely tokens, where any row wants them; else zeros.
    """

    tokens: Int[Array, "steps R"]
    logprobs: Float[Array, "steps R"]
    valid: Bool[Array, "steps R"]
    running: Bool[Array, "steps R"]
    top_tokens: Int[Array, "steps R 20"]
    top_logprobs: Float[Array, "steps R 20"]


def choose(rows: Rows, logits: Float[Array, "R vocab"]) -> tuple[Rows, Chosen]:
    """The next token of each running row, and the rows after it."""
    tokens, logprobs = sample_rows(logits, rows.sampling, rows.seen, rows.generated)
    was = rows.active
    generated = rows.generated + was
    stopped = jnp.any(tokens[:, None] == rows.stop_ids, axis=1) | (generated >= rows.limits)
    place = jnp.where(was, tokens, rows.seen.shape[1])
    width = min(MAX_LOGPROBS, logits.shape[1])
    shape = (was.size, width)
    top = jax.lax.cond(
        jnp.any(was & rows.wants_top),
        lambda: top_logprobs(logits, width),
        lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)),
    )
    chosen = Chosen(tokens, logprobs, was, was & ~stopped, *top)
    after = Rows(
        tokens=jnp.where(was, tokens, rows.tokens),
        positions=rows.positions + was,
        active=chosen.running,
        generated=generated,
        limits=rows.limits,
        stop_ids=rows.stop_ids,
        page_table=rows.page_table,
        sampling=rows.sampling,
        seen=rows.seen.at[jnp.arange(place.size), place].set(True, mode="drop"),
        wants_top=rows.wants_top,
    )
    return after, chosen


def nothing_chosen(steps: int, rows: int, vocab: int) -> Chosen:
    """`Chosen` of steps that were not taken."""
    no = jnp.zeros((steps, rows), bool)
    width = (steps, rows, min(MAX_LOGPROBS, vocab))
    return Chosen(
        tokens=jnp.zeros((steps, rows), jnp.int32),
        logprobs=jnp.zeros((steps, rows), jnp.float32),
        valid=no,
        running=no,
        top_tokens=jnp.zeros(width, jnp.int32),
        top_logprobs=jnp.zeros(width, jnp.float32),
    )


def empty_rows(config: ModelConfig, rows: int, row_pages: int) -> Rows:
    """A batch in which nothing runs."""
    return Rows(
        tokens=jnp.zeros(rows, jnp.int32),
        positions=jnp.zeros(rows, jnp.int32),
        active=jnp.zeros(rows, bool),
        generated=jnp.zeros(rows, jnp.int32),
        limits=jnp.zeros(rows, jnp.int32),
        stop_ids=jnp.full((rows, MAX_STOP_IDS), -1, jnp.int32),
        page_table=jnp.zeros((rows, row_pages), jnp.int32),
        sampling=jax.tree.map(jnp.asarray, sampling_rows([None] * rows)),
        seen=jnp.zeros((rows, config.vocab_size), bool),
        wants_top=jnp.zeros(rows, bool),
    )


def new_row(
    prompt: np.ndarray, sampling: Sampling, config: ModelConfig, page_row: Int[np.ndarray, "N"]
) -> Rows:
    """A batch of one row: a request whose prompt was read and that has chosen nothing."""
    stops = np.full((1, MAX_STOP_IDS), -1, np.int32)
    ends = sampling.end_ids(config)
    stops[0, : len(ends)] = ends
    seen = np.zeros((1, config.vocab_size), bool)
    seen[0, prompt] = True
    # Of numpy: arrays of jax would be a transfer each, before the program that takes them all.
    fields: Any = dict(
        tokens=prompt[-1:],
        positions=np.array([prompt.size - 1], np.int32),
        active=np.ones(1, bool),
        generated=np.zeros(1, np.int32),
        limits=np.array([sampling.max_new_tokens], np.int32),
        stop_ids=stops,
        page_table=page_row[None],
        sampling=sampling_rows([sampling]),
        seen=seen,
        wants_top=np.array([bool(sampling.logprobs)]),
    )
    return Rows(**fields)


@functools.partial(jax.jit, donate_argnames="rows", compiler_options=graphs.WHOLE)
def begin_row(
    rows: Rows, number: int, row: Rows, logits: Float[Array, "vocab"]
) -> tuple[Rows, Chosen]:
    """The batch with a batch of one at this number, after the choice of its first token.

    What was chosen is one step of one row.
    """
    after, chosen = choose(row, logits[None])
    rows = jax.tree.map(lambda batch, one: batch.at[number].set(one[0]), rows, after)
    return rows, jax.tree.map(lambda x: x[None], chosen)


@jax.jit
def get_row(rows: Rows, number: int) -> Rows:
    """What the batch has at this number, without a batch axis."""
    return jax.tree.map(lambda x: x[number], rows)


@functools.partial(jax.jit, donate_argnames="rows")
def set_row(rows: Rows, number: int, row: Rows) -> Rows:
    """The batch with a row, without a batch axis, at this number."""
    return jax.tree.map(lambda batch, one: batch.at[number].set(one), rows, row)


@functools.partial(jax.jit, donate_argnames="rows")
def set_pages(rows: Rows, number: int, page_row: np.ndarray) -> Rows:
    """The batch with other pages for one row."""
    return dataclasses.replace(rows, page_table=rows.page_table.at[number].set(page_row))


@functools.partial(jax.jit, donate_argnames="rows")
def deactivate(rows: Rows, number: int) -> Rows:
    """The batch with one row that does not run."""
    return dataclasses.replace(rows, active=rows.active.at[number].set(False))


def warm_up(rows: Rows) -> Rows:
    """The same batch; compiled is what changes a row that runs: more pages, leave and return."""
    first = jax.device_get(get_row(rows, 0))
    return set_pages(set_row(rows, 0, first), 0, first.page_table)
