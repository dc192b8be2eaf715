"""Generation as two compiled programs: one prefill, one loop of decode steps."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mmx.config import ModelConfig
from mmx.inference.cache import Cache, init_cache
from mmx.inference.sampling import sample
from mmx.model import Params, Tokens, backbone, check_tokens, unembed

FINISHED = -1


def generate(
    params: Params,
    tokens: Tokens,
    config: ModelConfig,
    *,
    mask: Tokens | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    implementation: str | None = None,
) -> Int[Array, "B max_new_tokens"]:
    """Continue each row of a batch of prompts.

    Padding does not matter: a row continues as its unpadded prompt would, whether padded on the
    left, on the right or in between.

    Args:
      tokens, mask: prompts, and 1 where there is a token; every row needs at least one.
      max_new_tokens: length of the result.
      temperature, top_p, top_k: see `mmx.inference.sampling.sample`; temperature 0 is greedy.
      seed: of the random draws; the same seed gives the same tokens.
      stop_ids: a row ends with the first of these it produces, which is included.
      implementation: of the kernels; None is the best on this platform.

    Returns:
      int32 token ids; -1 after the end of a row that met a stop id.

    Raises:
      ValueError: arguments out of range, an empty row, more tokens than `config.max_seq_len`.
    """
    check_tokens(tokens, config, mask=mask)
    _check_sampling(config, max_new_tokens, temperature, top_p, top_k, seed, stop_ids)
    length = tokens.shape[1] + max_new_tokens
    if length > config.max_seq_len:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} tokens and max_new_tokens={max_new_tokens} are "
            f"{length} tokens, more than max_seq_len={config.max_seq_len}"
        )
    if mask is not None and not np.all(np.any(np.asarray(mask) != 0, axis=1)):
        row = int(np.argmin(np.any(np.asarray(mask) != 0, axis=1)))
        raise ValueError(f"row {row} of mask has no token; every prompt needs at least one")
    tokens = jnp.asarray(tokens, jnp.int32)
    cache, logits = _prefill(params, tokens, mask, config, length, implementation)
    top_k = min(int(top_k), config.vocab_size)
    options = (float(temperature), float(top_p), top_k, tuple(int(i) for i in stop_ids))
    key = jax.random.key(int(seed))
    out, _ = _decode(params, cache, logits, key, config, max_new_tokens, options, implementation)
    return out


@functools.partial(jax.jit, static_argnames=("config", "max_slots", "implementation"))
def _prefill(params, tokens, mask, config, max_slots, implementation):
    """Fill a cache with the prompts; the logits after the last real token of each row."""
    dtype = params["embed"]["embedding"].dtype
    cache = init_cache(config, tokens.shape[0], max_slots, dtype)
    x, cache, _, _ = backbone(
        params, tokens, config, mask=mask, cache=cache, implementation=implementation
    )
    last = tokens.shape[1] - 1
    if mask is not None:
        index = jnp.arange(tokens.shape[1])
        last = jnp.max(jnp.where(mask != 0, index, 0), axis=1)
    x = x[jnp.arange(tokens.shape[0]), last]
    return cache, unembed(params, x[:, None], config)[:, 0]


@functools.partial(
    jax.jit,
    static_argnames=("config", "max_new_tokens", "options", "implementation"),
    donate_argnames=("cache",),
)
def _decode(
    params: Params,
    cache: Cache,
    logits: Array,
    key: Array,
    config: ModelConfig,
    max_new_tokens: int,
    options: tuple[Any, ...],
    implementation: str | None,
) -> tuple[Int[Array, "B max_new_tokens"], Cache]:
    """Sample and step until every row has ended or the result is full.

    The cache is returned so that its memory is the donated one, not a second copy.
    """
    temperature, top_p, top_k, stop_ids = options
    batch = logits.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)

    def unfinished(carry):
        i, _, _, running, _ = carry
        return (i < max_new_tokens) & jnp.any(running)

    def step(carry):
        i, cache, logits, running, out = carry
        chosen = sample(
            logits,
            jax.random.fold_in(key, i),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        out = jax.lax.dynamic_update_slice(
            out, jnp.where(running, chosen, FINISHED)[:, None], (0, i)
        )
        running &= ~jnp.any(chosen[:, None] == stops, axis=1)
        x, advanced, _, _ = backbone(
            params, chosen[:, None], config, cache=cache, implementation=implementation
        )
        assert advanced is not None
        return i + 1, advanced, unembed(params, x, config)[:, 0], running, out

    out = jnp.full((batch, max_new_tokens), FINISHED, jnp.int32)
    carry = (jnp.int32(0), cache, logits, jnp.ones((batch,), bool), out)
    _, cache, _, _, out = jax.lax.while_loop(unfinished, step, carry)
    return out, cache


def _check_sampling(config, max_new_tokens, temperature, top_p, top_k, seed, stop_ids) -> None:
    def require(ok: bool, name: str, value: object, wanted: str) -> None:
        if not ok:
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")

    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(0 <= temperature < float("inf"), "temperature", temperature, "0 or more")
    require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
    require(top_k >= 0, "top_k", top_k, "0 (all tokens) or more")
    require(-(2**63) <= seed < 2**63, "seed", seed, "a 64-bit integer")
    for stop in stop_ids:
        require(0 <= stop < config.vocab_size, "stop_ids", stop, f"below {config.vocab_size}")
