"""What `benchmarks/two_devices.py` measures, and over which devices."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks import device_trace
from benchmarks.parts import Emit
from mmx.config import ModelConfig
from sharding import MeshConfig, Partition, make_mesh, rules

DEVICES = 2
# Of the training steps on two devices: the mesh, and its rules.
MESHES = {
    "fsdp": (MeshConfig(fsdp=2), rules.FSDP),
    "expert": (MeshConfig(fsdp=1, expert=2), rules.EXPERT),
    "data": (MeshConfig(data=2, fsdp=1), rules.FSDP),
}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      config: of the training steps.
      rows, length, remat, moment, capacity: of a training step: rows a device, tokens a row, what
        is computed again, dtype of AdamW's first moment, room of each expert.
      lasp_length, lasp_heads: tokens, and numbers of heads of which the first that fits is taken.
      ring_length, ring_heads, document: tokens, query and key heads, mean length of a document.
      moe: whose experts; moe_tokens: on each device.
      head_dim: of both attentions.
      seconds: of timing a training step.
      trace: folder for profiles.
    """

    config: ModelConfig
    rows: int
    length: int
    remat: Any
    moment: Any
    capacity: float | None
    lasp_length: int
    lasp_heads: tuple[int, ...]
    ring_length: int
    ring_heads: tuple[int, int]
    document: int
    moe: ModelConfig
    moe_tokens: int
    head_dim: int
    seconds: float
    trace: str


def partition_over(mesh: MeshConfig, chosen: rules.Rules) -> Partition:
    return Partition(make_mesh(mesh, jax.devices()[:DEVICES]), chosen)


def trace(emit: Emit, setting: Setting, name: str, run: Callable[[], Any]) -> None:
    """A row for each GPU of a profile of a call."""
    rows = device_trace.record(Path(setting.trace), name, run)
    for row in rows or [{"left_out": "the profile has no streams of GPUs"}]:
        emit(part="trace", of=name, **row)
