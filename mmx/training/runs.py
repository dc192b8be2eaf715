"""A run folder seen from outside: its last parameters, to generate with, convert or train on."""

from pathlib import Path
from typing import Any

import jax

from mmx.config import ModelConfig
from mmx.model import Params, abstract_params
from mmx.training.checkpoint import complete_steps, read_config, restore_params

CHECKPOINTS = "checkpoints"


def run_config(folder: Path) -> tuple[int, ModelConfig]:
    """The last complete step of a run and the config of its model.

    Raises:
      ValueError: no complete checkpoint, a damaged one, or one of a config that is not valid.
    """
    steps = complete_steps(folder / CHECKPOINTS)
    if not steps:
        raise ValueError(
            f"{folder}: no complete checkpoint; train on, or see `mmx verify {folder}`"
        )
    fields = read_config(folder / CHECKPOINTS, steps[-1]).get("model")
    try:
        return steps[-1], ModelConfig(**fields)  # pyright: ignore[reportCallIssue]
    except TypeError:
        raise ValueError(f"{folder}: step {steps[-1]} holds no model config") from None


def load_run(folder: Path, *, dtype: Any | None = None) -> tuple[ModelConfig, Params]:
    """The parameters of the last complete step, every byte of them checked.

    Args:
      folder: of the run.
      dtype: of the parameters; None keeps fp32. Router weights are fp32 always.

    Raises:
      ValueError: as `run_config`; DamagedCheckpoint names the file.
    """
    step, config = run_config(folder)
    wanted = abstract_params(config, dtype=dtype)
    return config, jax.tree.map(
        jax.numpy.asarray, restore_params(folder / CHECKPOINTS, step, wanted)
    )
