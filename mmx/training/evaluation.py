"""What a run measures of itself while it trains: held-out loss, and text it writes."""

import dataclasses
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
from mmx.inference.generation import FINISHED, generate
from mmx.inference.requests import Sampling
from mmx.inference.sampling import sample_rows, sampling_rows
from mmx.model import Params, backbone, check_tokens, unembed
from mmx.placement import length_unit
from mmx.training.agreement import compile_together
from mmx.training.losses import loss_parts
from mmx.training.placement import put_batch
from mmx.training.step import ComputeDtype, compute_params
from sharding import Partition, constrain

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
        # One at a time, as in `_continued`.
        sums = [jax.device_get(self._loss(params, batch)) for batch in self._batches]
        total, targets = np.sum(sums, axis=0, dtype=np.float64)
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
    partition: Partition | None = None,
) -> str:
    """Continue each prompt at temperature 0.8; process 0 writes the text, and all return it.

    Args:
      params: master parameters; with a partition, where training has them.
      tokens: at most so many of each continuation, which ends at `end_id`, or where the longest
        prompt and its continuation are `config.max_seq_len` tokens.
      partition: over which devices the work is spread; the same draws with it and without.

    Raises:
      ValueError: a prompt leaves no room for a token.
    """
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    width = max(map(len, encoded))
    tokens = max(1, min(tokens, config.max_seq_len - width))
    padded = np.array([[0] * (width - len(ids)) + ids for ids in encoded], np.int32)
    mask = np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], np.int32)
    if partition is None:
        out = generate(
            compute_params(params, config, compute_dtype),
            padded,
            config,
            mask=mask,
            max_new_tokens=tokens,
            temperature=TEMPERATURE,
            seed=seed,
            stop_ids=(end_id,),
        )
    else:
        out = _continued(
            params,
            padded,
            mask,
            tokens,
            seed,
            config=config,
            dtype=compute_dtype,
            partition=partition,
        )
    parts = []
    for prompt, row in zip(prompts, np.asarray(out).tolist(), strict=True):
        ids = row[: row.index(end_id)] if end_id in row else row
        text = tokenizer.decode([i for i in ids if i != FINISHED])
        parts.append(f"--- {prompt!r}\n{prompt}{text}\n")
    text = "\n".join(parts)
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text.encode())
    return text


def _continued(
    params: Params,
    prompts: np.ndarray,
    mask: np.ndarray,
    count: int,
    seed: int,
    *,
    config: ModelConfig,
    dtype: ComputeDtype,
    partition: Partition,
) -> np.ndarray:
    """int32 [B, count] tokens after the prompts [B, T], of which `mask` tells the padding.

    Every token is read anew for each that is written: an engine has other rules than training, and
    parameters would move to where it wants them. Samples are short, so this costs less than that.
    """
    batch, width = prompts.shape
    parts, unit = partition.devices_of("batch"), length_unit(config, partition)
    shape = (-(-batch // parts) * parts, -(-(width + count) // unit) * unit)
    text, real = np.zeros(shape, np.int32), np.ones(shape, np.int32)
    source = np.arange(len(text)) % batch  # rows to spare repeat the prompts
    text[:, :width], real[:, :width] = prompts[source], mask[source]
    check_tokens(text[:, : width + count], config)
    options = Sampling(temperature=TEMPERATURE)
    seeds = [dataclasses.replace(options, seed=seed + int(row)) for row in source]
    rows = sampling_rows(seeds, bias_width=0)
    how = dict(config=config, dtype=dtype, partition=partition)
    where = partition.sharding(("batch", "seq"), shape)
    tokens, drawn = jax.make_array_from_callback(shape, where, lambda at: text[at]), []
    for number in range(count):
        arguments = params, tokens, real, rows, np.int32(width + number), np.int32(number)
        if number == 0:
            compile_together(_with_next, *arguments, **how)
        tokens, latest = _with_next(*arguments, **how)
        # One at a time: on CPU the messages of several programs that are under way can keep all
        # threads of two processes waiting for each other.
        drawn.append(jax.device_get(latest))
    return np.stack(drawn, axis=1)[:batch]


@functools.partial(
    jax.jit, static_argnames=("config", "dtype", "partition"), donate_argnames="tokens"
)
def _with_next(params, tokens, mask, rows, place, number, *, config, dtype, partition):
    """[R, T] tokens with the one at `place` drawn, the `number`-th that is; and that, [R]."""
    computing = compute_params(params, config, dtype)
    x, _, _, _ = backbone(computing, tokens, config, mask=mask, partition=partition)
    last = jax.lax.dynamic_slice_in_dim(x, place - 1, 1, axis=1)
    logits = constrain(unembed(computing, last, config)[:, 0], None, None, partition=partition)
    # No penalty asks what was seen.
    steps = jnp.full(len(logits), number)
    drawn, _ = sample_rows(logits, rows, jnp.zeros(logits.shape, bool), steps)
    tokens = constrain(tokens.at[:, place].set(drawn), "batch", "seq", partition=partition)
    return tokens, constrain(drawn, None, partition=partition)
