"""`mmx generate`: continue a prompt with a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a checkpoint."""

    path: tyro.conf.Positional[Path]
    """The checkpoint folder."""
    prompt: str | None = None
    """Text to continue; needs a tokenizer.json in the folder."""
    tokens: str | None = None
    """Token ids to continue, as 1,2,3; prints ids."""
    max_new_tokens: int = 32
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability together reaches this."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    seed: int = 0
    """Of the random draws."""
    dtype: Literal["as-stored", "fp32", "bf16"] = "as-stored"
    """Of parameters and activations; state, router and logits are fp32 always."""


def main(arguments: Sequence[str]) -> int:
    """Print the continuation."""
    options = tyro.cli(Generate, prog="mmx generate", args=arguments)
    if (options.prompt is None) == (options.tokens is None):
        raise ValueError("give either --prompt TEXT or --tokens 1,2,3")
    from mmx.inference import text

    tokenizer = None
    if options.prompt is not None:
        from mmx.convert.load import load_config

        wanted = "no such file; give --tokens 1,2,3 instead of --prompt"
        tokenizer = text.load_tokenizer(options.path, missing=wanted)
        ids = text.encode(tokenizer, options.prompt, load_config(options.path))
    else:
        assert options.tokens is not None
        ids = _parse_ids(options.tokens)
    if not ids:
        raise ValueError("the prompt is empty; it needs at least one token")

    import jax.numpy as jnp
    import numpy as np

    import mmx
    from mmx.inference.generation import FINISHED

    dtype = {"as-stored": None, "fp32": jnp.float32, "bf16": jnp.bfloat16}[options.dtype]
    config, params = mmx.load(options.path, dtype=dtype)
    generated = mmx.generate(
        params,
        np.array([ids], np.int64),
        config,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop_ids=() if config.eos_token_id is None else (config.eos_token_id,),
    )
    new = [int(token) for token in generated[0] if token != FINISHED]
    print(",".join(map(str, new)) if tokenizer is None else text.decode(tokenizer, new))
    return 0


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        shown = text if len(text) < 60 else text[:60] + "..."
        raise ValueError(f"--tokens is {shown!r}; it must be integers, as 1,2,3") from None
    for i in ids:
        if not -(2**63) <= i < 2**63:
            raise ValueError(f"--tokens contains {i}; it must be ids of the vocabulary")
    return ids
