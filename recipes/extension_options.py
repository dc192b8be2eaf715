"""The options of `mmx extend`; what cannot be meant is refused by its flag, before any work."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmx.placement import RuleName
from sharding import MeshConfig

_FEWEST_ROWS = 5  # of a stage: its last fifth has other shares


@dataclass(frozen=True)
class Stage:
    """One length."""

    seq_len: int
    """Tokens a row."""
    rope_theta: float
    """RoPE base."""
    steps: int
    """Of this stage."""
    learning_rate: float
    """Constant, after a warm-up over a tenth of the steps."""
    batch_size: int
    """Rows of a micro-batch, over all devices."""
    accumulation: int = 1
    """Micro-batches a step."""
    mix: tuple[float, float, float] = (0.3, 0.3, 0.4)
    """Shares of short, medium and long text."""


@dataclass(frozen=True)
class ExtendContext:
    """Extend the context of a model. What is not given is as in the preset."""

    from_run: Annotated[Path, tyro.conf.arg(name="from")]
    """The run, or the checkpoint folder, to begin with."""
    run_dir: Path
    """Where everything goes; stages found there are continued."""
    corpus: Path | None
    """Shards the model was trained on; none: the standard library of this Python."""
    stages: tuple[Stage, ...]
    """One after the other."""
    documents: int
    """Long documents of each length and kind."""
    short_len: int
    """Tokens a row where the held-out loss of short text is measured."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where needles are, 0 the beginning of the text and 1 its end."""
    needles: int = 8
    """Prompts for each depth."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrices and activations; master parameters are float32."""
    remat: Literal["none", "superblock", "layer"] = "layer"
    """What the backward pass computes again."""
    capacity_factor: float | None = None
    """Tokens an expert takes, as a multiple of its even share; none: no token is dropped."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices along each axis of the mesh; -1 takes what the others leave."""
    rules: RuleName = "long_context"
    """What the axes split."""
    seed: int = 0
    """Of documents, data order and needles."""
    save_every: int = 100
    """Steps between checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases to report to."""


@contextmanager
def flagged(flag: str) -> Iterator[None]:
    """Put the flag before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def check_options(recipe: ExtendContext) -> None:
    """Every option by itself, of the stages too.

    Raises:
      ValueError: one is out of range; the message begins with its flag.
    """
    _require("documents", recipe.documents, recipe.documents >= 1, "at least 1")
    _require("short-len", recipe.short_len, recipe.short_len >= 2, "at least 2")
    _require("needles", recipe.needles, recipe.needles >= 1, "at least 1")
    inside = all(0 <= depth <= 1 for depth in recipe.depths)
    _require("depths", recipe.depths, len(recipe.depths) > 0 and inside, "one or more in [0, 1]")
    factor = recipe.capacity_factor
    _require("capacity-factor", factor, factor is None or 0 < factor < math.inf, "above 0, or None")
    _require("seed", recipe.seed, 0 <= recipe.seed < 1 << 32, "at least 0 and below 2^32")
    _require("save-every", recipe.save_every, recipe.save_every >= 1, "at least 1")
    _require("stages", recipe.stages, len(recipe.stages) > 0, "one or more")
    for number, stage in enumerate(recipe.stages):
        flag = f"stages.{number}"
        for name in ("seq_len", "steps", "batch_size", "accumulation"):
            value = getattr(stage, name)
            _require(f"{flag}.{name.replace('_', '-')}", value, value >= 1, "at least 1")
        rate, base = stage.learning_rate, stage.rope_theta
        _require(f"{flag}.learning-rate", rate, 0 <= rate < math.inf, "finite and at least 0")
        _require(f"{flag}.rope-theta", base, 0 < base < math.inf, "finite and above 0")
        shares = all(0 <= share < math.inf for share in stage.mix) and sum(stage.mix) > 0
        _require(f"{flag}.mix", stage.mix, shares, "shares of at least 0, not all of them 0")
        rows = stage.steps * stage.accumulation * stage.batch_size
        wanted = f"more: the stage has {rows} rows of at least {_FEWEST_ROWS}"
        _require(f"{flag}.steps", stage.steps, rows >= _FEWEST_ROWS, wanted)


def _require(flag: str, value: Any, ok: bool, wanted: str) -> None:
    if not ok:
        shown = " ".join(map(str, value)) or "empty" if isinstance(value, tuple) else value
        raise ValueError(f"--{flag} is {shown}; it must be {wanted}")
