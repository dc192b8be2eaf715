"""`mmx.generate`: a batch of prompts to a batch of tokens, by an engine of its own."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mmx.config import ModelConfig
from mmx.inference.engine import Engine
from mmx.inference.requests import Sampling
from mmx.model import Params, Tokens, check_tokens
from mmx.planning.exhausted import explained, of_engine

FINISHED = -1
_ROWS = 64  # sequences that decode together at most
_PAGE = 256  # tokens
_SHORT = 1024  # up to here chunks of 256 cost little, and need the fewest programs


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
    left, on the right or in between. Nor does the batch: a row gives what it would give alone, as
    far as products of other sizes round alike.

    Args:
      tokens, mask: prompts, and 1 where there is a token; every row needs at least one.
      max_new_tokens: length of the result.
      temperature, top_p, top_k: see `Sampling`; temperature 0 is greedy.
      seed: of the random draws; row i draws with seed + i, so equal rows differ.
      stop_ids: a row ends with the first of these it produces, which is included; at most 16. The
        end token of the config is none of them unless it is given.
      implementation: of the kernels; None is the best on this platform.

    Returns:
      int32 token ids; -1 after the end of a row that met a stop id.

    Raises:
      ValueError: arguments out of range, an empty row, more tokens than `config.max_seq_len`.
    """
    check_tokens(tokens, config, mask=mask)
    sampling = Sampling(
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=int(top_k),
        seed=int(seed),
        stop_ids=tuple(int(i) for i in stop_ids),
        max_new_tokens=int(max_new_tokens),
        ignore_eos=True,
    )
    sampling.check(config)
    batch, width = tokens.shape
    if width + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"a prompt of {width} tokens and max_new_tokens={max_new_tokens} are "
            f"{width + max_new_tokens} tokens, more than max_seq_len={config.max_seq_len}"
        )
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask) != 0
    if not real.any(axis=1).all():
        row = int(real.any(axis=1).argmin())
        raise ValueError(f"row {row} of mask has no token; every prompt needs at least one")
    rows = min(batch, _ROWS)
    pages = -(-(width + max_new_tokens) // _PAGE)
    with explained(lambda: of_engine(config, params, rows=rows, tokens=rows * pages * _PAGE)):
        engine = Engine(
            config,
            params,
            rows=rows,
            pages=rows * pages,
            page_size=_PAGE,
            max_seq_len=pages * _PAGE,
            chunk=256 if width <= _SHORT else 2048,
            snapshots=0,
            implementation=implementation,
        )
        prompts = [row[here] for row, here in zip(np.asarray(tokens), real, strict=True)]
        results = engine.generate(prompts, [_of_row(sampling, row) for row in range(batch)])
    out = np.full((batch, max_new_tokens), FINISHED, np.int32)
    for row, result in zip(out, results, strict=True):
        row[: len(result.tokens)] = result.tokens
    return jnp.asarray(out)


def _of_row(sampling: Sampling, row: int) -> Sampling:
    """The options of a row: the next seed for each, as signed 64-bit integers count."""
    assert sampling.seed is not None
    seed = (sampling.seed + row + 2**63) % 2**64 - 2**63
    return dataclasses.replace(sampling, seed=seed)
