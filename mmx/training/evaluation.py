"""What a run measures of itself while it trains: held-out loss, and text it writes."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from mmx.config import ModelConfig
from mmx.data.batches import Batches
from mmx.data.shards import write_atomic
from mmx.inference.generation import generate
from mmx.model import Params
from mmx.training.agreement import compile_together
from mmx.training.losses import loss_parts
from mmx.training.placement import put_batch
from mmx.training.step import ComputeDtype, compute_params
from sharding import Partition

TEMPERATURE = 0.8  # of samples: greedy text of a young model is one word again and again


class HeldOut:
    """The loss on a fixed set of held-out batches, a mean over their targets."""

    def __init__(
        self,
        batches: Batches,
        number: int,
        config: ModelConfig,
        *,
        compute_dtype: ComputeDtype,
        partition: Partition | None = None,
        implementation: str | None = None,
    ):
        """Take the first `number` batches; fewer when the held-out text ends before.

        Raises:
          ValueError: there is no held-out batch.
        """
        found = []
        for batch in batches:
            found.append({name: batch[name] for name in ("tokens", "segment_ids")})
            if len(found) == number:
                break
        if not found:
            raise ValueError("the held-out split has no batch; build a larger corpus")
        self._batches = [
            put_batch({name: array[None] for name, array in batch.items()}, partition)
            for batch in found
        ]
        self._loss = functools.partial(
            _summed_loss,
            config=config,
            dtype=compute_dtype,
            implementation=implementation,
            partition=partition,
        )

    def loss(self, params: Params) -> float:
        """Nats a target."""
        compile_together(_summed_loss, params, self._batches[0], **self._loss.keywords)
        sums = [self._loss(params, batch) for batch in self._batches]
        total, targets = np.sum([jax.device_get(pair) for pair in sums], axis=0, dtype=np.float64)
        return float(total / max(targets, 1))


@functools.partial(jax.jit, static_argnames=("config", "dtype", "implementation", "partition"))
def _summed_loss(params, batch, *, config, dtype, implementation, partition):
    """(summed cross entropy, targets) of one batch [1, b, T]."""
    _, parts = loss_parts(
        compute_params(params, config, dtype),
        {name: array[0] for name, array in batch.items()},
        config,
        implementation=implementation,
        statistics=False,
        partition=partition,
    )
    return jnp.sum(parts.token_losses), parts.num_targets


def write_samples(
    file: Path,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int,
    end_id: int,
    compute_dtype: ComputeDtype,
    seed: int = 0,
) -> str:
    """Continue each prompt at temperature 0.8; write the text and return it."""
    compute = compute_params(params, config, compute_dtype)
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    length = max(map(len, encoded))
    padded = np.array([[0] * (length - len(ids)) + ids for ids in encoded], np.int32)
    mask = np.array([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded], np.int32)
    out = generate(
        compute,
        padded,
        config,
        mask=mask,
        max_new_tokens=tokens,
        temperature=TEMPERATURE,
        seed=seed,
        stop_ids=(end_id,),
    )
    parts = []
    for prompt, row in zip(prompts, np.asarray(out), strict=True):
        text = tokenizer.decode([int(i) for i in row if i >= 0 and i != end_id])
        parts.append(f"--- {prompt!r}\n{prompt}{text}\n")
    text = "\n".join(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.encode())
    return text
