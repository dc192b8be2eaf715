"""Choosing the next token of each row from fp32 logits, every row by its own options."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from mmx.inference.requests import MAX_BIAS, Sampling

# Smaller temperatures are 0: a quotient by one could overflow, and would be greedy anyway.
_GREEDY_BELOW = 1e-5
Values = jax.Array | np.ndarray
_LARGEST_UNIFORM = np.float32(1 - 2**-24)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The options of R rows as arrays, so that one program serves every mixture of requests.

    Attributes:
      temperature: fp32; 0 takes the most likely token.
      top_p, min_p, repetition_penalty: fp32; see `Sampling`.
      top_k: int32; 0 keeps all tokens.
      keys: the seed of each row as its high and low word, the data of a threefry key.
      bias_ids: int32; the tokens of `logit_bias`, none twice in a row; an id of vocab_size or more
        is an unused entry.
      bias_values: fp32; what is added to their logits.
    """

    temperature: Float[Values, "R"]
    top_p: Float[Values, "R"]
    top_k: Int[Values, "R"]
    min_p: Float[Values, "R"]
    repetition_penalty: Float[Values, "R"]
    keys: UInt32[Values, "R 2"]
    bias_ids: Int[Values, "R W"]
    bias_values: Float[Values, "R W"]


def sampling_rows(
    requests: Sequence[Sampling | None], *, bias_width: int = MAX_BIAS
) -> SamplingRows:
    """The options of requests that were checked, one a row, as arrays of numpy.

    Args:
      requests: None is a row nobody uses; it is greedy.
      bias_width: entries of `logit_bias` there is room for, alike for all rows of an engine.

    Raises:
      ValueError: a request has more entries of `logit_bias`.
    """
    options = [Sampling() if request is None else request for request in requests]
    ids = np.full((len(options), bias_width), np.iinfo(np.int32).max, np.int32)
    values = np.zeros((len(options), bias_width), np.float32)
    for row, option in enumerate(options):
        count = len(option.logit_bias)
        if count > bias_width:
            raise ValueError(f"logit_bias has {count} entries; it must have at most {bias_width}")
        ids[row, :count] = list(option.logit_bias)
        values[row, :count] = list(option.logit_bias.values())

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(option, name) for option in options], np.float32)

    temperature = floats("temperature")
    return SamplingRows(
        temperature=np.where(temperature < _GREEDY_BELOW, np.float32(0), temperature),
        top_p=floats("top_p"),
        top_k=np.array([min(option.top_k, 2**31 - 1) for option in options], np.int32),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        keys=np.array([_key(option.seed) for option in options], np.uint32).reshape(-1, 2),
        bias_ids=ids,
        bias_values=values,
    )


def sample_rows(
    logits: Float[Array, "R vocab"],
    rows: SamplingRows,
    seen: Bool[Array, "R vocab"],
    step: Int[Array, "R"],
) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """Choose a token a row, each by its own options.

    In this order: `logit_bias` is added; tokens that were `seen` are penalised; the logits are
    divided by the temperature; of the tokens, the `top_k` most likely are kept; of those the
    fewest whose probability together reaches `top_p`; of those the ones at least `min_p` times as
    likely as the most likely. One of them is drawn. With temperature 0 the filters have no say and
    the most likely token is taken. The first of equals wins everywhere.

    The draw of a row depends on its logits, options, seed and step alone: what lies in other rows,
    how many there are and at which place it is change no token. To that end nothing that decides
    between tokens is a floating-point sum over the vocabulary, whose order could change: the noise
    is added token by token, and probabilities are summed as integers.

    Args:
      logits: of the model; fp32.
      rows: see `sampling_rows`.
      seen: tokens of the prompt and the output so far; see `mark_seen`.
      step: tokens the row has chosen before; the draws of a seed are numbered by it.

    Returns:
      int32 tokens, and fp32 natural log-probabilities of them under the unmodified logits.
    """
    logits = logits.astype(jnp.float32)
    adjusted = _adjusted(logits, rows, seen)
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    drawing = rows.temperature > 0
    tokens = jax.lax.cond(
        jnp.any(drawing),
        lambda: jnp.where(drawing, _draw(adjusted, rows, drawing, step), greedy),
        lambda: greedy,
    )
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(
    logits: Float[Array, "R vocab"], n: int
) -> tuple[Int[Array, "R n"], Float[Array, "R n"]]:
    """The n most likely tokens of each row, likeliest first, and their natural log-probabilities.

    The first of equals comes first. A vocabulary of fewer tokens gives as many as it has.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, tokens = jax.lax.top_k(logprobs, min(n, logits.shape[-1]))
    return tokens.astype(jnp.int32), values


def mark_seen(seen: Bool[Array, "R vocab"], tokens: Int[Array, "R T"]) -> Bool[Array, "R vocab"]:
    """`seen` with these tokens of each row; negative ids are no tokens."""
    # An index below zero would count from the end; one past the end is dropped.
    index = jnp.where(tokens < 0, seen.shape[1], tokens)
    row = jnp.arange(seen.shape[0])[:, None]
    return seen.at[row, index].set(True, mode="drop")


def _key(seed: int | None) -> tuple[int, int]:
    word = secrets.randbits(64) if seed is None else seed % 2**64
    return word >> 32, word & 0xFFFFFFFF


def _adjusted(logits: Array, rows: SamplingRows, seen: Array) -> Array:
    """Logits with bias and penalty; bits of rows without either do not change."""
    row = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[row, rows.bias_ids].add(rows.bias_values, mode="drop")
    penalty = rows.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _draw(adjusted: Array, rows: SamplingRows, drawing: Values, step: Array) -> Array:
    """A token a row with the probabilities that the filters leave (Gumbel's maximum)."""
    vocab = adjusted.shape[-1]
    temperature = jnp.where(drawing, rows.temperature, 1)[:, None]
    # The best is exactly 0, so no quotient overflows upwards and the best is never masked.
    scaled = (adjusted - jnp.max(adjusted, axis=-1, keepdims=True)) / temperature
    scores = scaled + _gumbel(rows.keys, step, vocab)
    counted = drawing & (rows.top_k > 0) & (rows.top_k < vocab)
    weighed = drawing & (rows.top_p < 1)

    # Masks alone come out of the branches: a row has the same scores whichever the others need.
    def first_k() -> Array:
        target = jnp.where(counted, rows.top_k, vocab).astype(jnp.float32)
        return _first(_descending(scaled), jnp.ones_like(scaled, jnp.uint32), target)

    keep = jax.lax.cond(jnp.any(counted), first_k, lambda: jnp.ones_like(scaled, bool))

    def nucleus() -> Array:
        scale = 2.0 ** (2 * _limb_bits(vocab))
        weights = jnp.where(keep, (jnp.exp(scaled) * scale).astype(jnp.uint32), 0)
        target = jnp.maximum(rows.top_p * _total(weights), 1)  # at least the most likely token
        return keep & (_first(_descending(scaled), weights, target) | ~weighed[:, None])

    keep = jax.lax.cond(jnp.any(weighed), nucleus, lambda: keep)
    keep &= scaled >= jnp.log(rows.min_p)[:, None]
    return jnp.argmax(jnp.where(keep, scores, -jnp.inf), axis=-1).astype(jnp.int32)


def _gumbel(keys: Values, step: Array, vocab: int) -> Array:
    """Gumbel noise, a draw a row and step: fp32 [R, vocab].

    From all 32 bits, so that of 200,000 tokens hardly two share the most: with 24 bits every
    hundredth draw would be a tie, and go to the first.
    """

    def bits(key: Array, number: Array) -> Array:
        typed = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(typed, number), (vocab,), jnp.uint32)

    uniform = (jax.vmap(bits)(jnp.asarray(keys), step).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, _LARGEST_UNIFORM)))


def _descending(values: Array) -> Array:
    """uint32 in the order of fp32 values: larger for larger ones."""
    values = jnp.where(values == 0, 0.0, values)  # -0 is not less than 0
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _first(order: Array, weights: Array, target: Array) -> Array:
    """Mask of the fewest tokens, largest `order` first, whose weights together reach a target.

    The place of the last one is found bit by bit: 32 sums over the vocabulary cost less than
    sorting it. Tokens of equal order, and so equal weight, count from the first.

    Args:
      order: uint32 [R, vocab].
      weights: uint32 [R, vocab], each at most 2^(2 `_limb_bits`).
      target: fp32 [R], more than 0 and at most the sum of the weights.
    """

    def bit(i: Array, place: Array) -> Array:
        further = place | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        inside = jnp.where(order >= further[:, None], weights, 0)
        return jnp.where(_total(inside) >= target, further, place)

    place = jax.lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))[:, None]
    above, tied = order > place, order == place
    each = jnp.max(jnp.where(tied, weights, 0), axis=-1).astype(jnp.float32)
    missing = jnp.ceil((target - _total(jnp.where(above, weights, 0))) / each)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= missing[:, None]))


def _limb_bits(vocab: int) -> int:
    """Bits of which a vocabulary of terms can be summed in 32 (14 for 200,064 tokens)."""
    return min(14, 32 - vocab.bit_length())


def _total(weights: Array) -> Array:
    """Sum of uint32 weights over the vocabulary as fp32: the same in any order of the terms."""
    bits = _limb_bits(weights.shape[-1])
    high = jnp.sum(weights >> bits, axis=-1, dtype=jnp.uint32)
    low = jnp.sum(weights & ((1 << bits) - 1), axis=-1, dtype=jnp.uint32)
    return high.astype(jnp.float32) * 2.0**bits + low.astype(jnp.float32)
