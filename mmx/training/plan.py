"""What a training run is: everything but its data, and how it is shown before it begins."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.filesize import decimal

from mmx.config import ModelConfig
from mmx.model import count_params
from mmx.training.flops import peak_flops, train_flops_per_token
from mmx.training.schedule import BatchSchedule
from mmx.training.state import Initialisation
from mmx.training.step import StepOptions
from sharding import Partition


@dataclass(frozen=True)
class Plan:
    """Everything a run is, apart from its data.

    Attributes:
      config, options: of the model and of the step.
      batches: micro-batches of each step.
      seq_len: tokens a row.
      steps: where to stop; the learning rate has a schedule of its own.
      seed, initialisation: of the parameters, unless `params` are given to `train`.
      save_every, keep: checkpoints; see `Checkpoints`. One is always saved at the end.
      heldout_every, heldout_batches: measure the held-out loss so often, on so much.
      sample_every, sample_tokens, prompts: let the model write so often; 0 never, here and there.
      max_skipped: stop after so many skipped steps in a row.
      tensorboard, wandb: where metrics go beside metrics.jsonl; wandb is the project's name.

    Raises:
      ValueError: a number out of range.
    """

    config: ModelConfig
    options: StepOptions
    batches: BatchSchedule
    seq_len: int
    steps: int
    seed: int = 0
    initialisation: Initialisation = "xavier"
    save_every: int = 100
    keep: int = 3
    heldout_every: int = 100
    heldout_batches: int = 8
    sample_every: int = 0
    sample_tokens: int = 64
    prompts: tuple[str, ...] = ()
    max_skipped: int = 20
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        least = dict(steps=1, heldout_every=0, heldout_batches=1, sample_every=0, sample_tokens=1)
        for name, smallest in (least | dict(max_skipped=1)).items():
            value = getattr(self, name)
            if value < smallest:
                raise ValueError(f"{name} is {value}; it must be at least {smallest}")

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all processes."""
        return self.batches.micro_batch_tokens // self.seq_len

    def describe(self) -> dict[str, Any]:
        """The plan as JSON, for people and for checkpoints; the model's config is 'model'."""
        about = dataclasses.asdict(self)
        about["model"] = about.pop("config")
        return json.loads(json.dumps(about))


def opening_rows(
    plan: Plan, folder: Path, step: int, partition: Partition | None = None
) -> list[tuple[str, str]]:
    """What a person sees first: (name, value) of a table."""
    total, active = count_params(plan.config)
    accumulated = plan.batches.max_accumulation > 1
    # fp32 parameter and two moments, gradient in the compute dtype, its copy; fp32 sums.
    narrow = 2 if plan.options.compute_dtype == "bfloat16" else 4
    per_parameter = 12 + 2 * narrow + 4 * (1 + accumulated)
    kinds = "".join(kind[0].upper() for kind in plan.config.layer_kinds)
    devices = jax.devices()
    mesh = []
    if partition is not None:
        sizes = [f"{axis} {size}" for axis, size in partition.mesh.shape.items() if size > 1]
        mesh = [("mesh", f"{' x '.join(sizes)}, rules {partition.rules.name!r}")]
    return [
        ("run folder", f"{folder}{f', going on after step {step}' if step else ''}"),
        ("devices", f"{len(devices)} x {devices[0].device_kind}"),
        *mesh,
        ("layers", f"{plan.config.num_layers}: {kinds[:32]}{'...' if len(kinds) > 32 else ''}"),
        ("parameters", f"{total:,} ({active:,} a token, without embedding and head)"),
        ("width, experts", f"{plan.config.embed_dim}, {plan.config.num_experts} x "
                           f"{plan.config.expert_dim}, {plan.config.num_experts_per_tok} a token"),
        ("memory without activations", f"about {decimal(per_parameter * total)} in all"),
        ("sequence, micro-batch", f"{plan.seq_len:,} tokens, {plan.rows} rows, at most "
                                  f"{plan.batches.max_accumulation} a step"),
        ("steps", f"{plan.steps:,}, saved every {plan.save_every:,}"),
    ]  # fmt: skip


def device_numbers(plan: Plan, tokens_per_second: float) -> dict[str, Any]:
    """Share of the devices' peak and memory, where they are known."""
    device = jax.devices()[0]
    numbers: dict[str, Any] = {}
    peak = peak_flops(device.device_kind)
    if peak is not None:
        flops = train_flops_per_token(plan.config, plan.seq_len) * tokens_per_second
        numbers["mfu"] = flops / (peak * jax.device_count())
    memory: Mapping[str, int] = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    if "peak_bytes_in_use" in memory:
        numbers["peak_memory_bytes"] = memory["peak_bytes_in_use"]
    return numbers
