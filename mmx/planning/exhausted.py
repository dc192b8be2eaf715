"""When memory runs out on a machine that is there: the same table, and what would help most."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax

from mmx.config import ModelConfig
from mmx.planning.chips import CHIPS, Chip
from mmx.planning.topology import Topology
from sharding import Partition, rules
from sharding.mesh import AXES

if TYPE_CHECKING:
    from mmx.planning.programs import Request
    from mmx.training.plan import Plan as TrainingPlan


class MemoryExhausted(ValueError):
    """A device has too little memory; what a plan says of it has been printed."""


@contextmanager
def explained(ask: Callable[[], "Request"]) -> Iterator[None]:
    """Turn memory that runs out within into a table on stderr and one line.

    Args:
      ask: makes the request of what was running; called then only.

    Raises:
      MemoryExhausted: instead of the runtime's error.
    """
    try:
        yield
    except MemoryExhausted:
        raise
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:
        # jaxlib raises a ValueError where an array cannot be made, and C++ has its own MemoryError.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = (str(error).strip() or "no memory").splitlines()[0]
        who = "this process" if isinstance(error, MemoryError) else "a device"
        raise MemoryExhausted(f"{who} has too little memory ({first}){_explain(ask)}") from error


def _explain(ask: Callable[[], "Request"]) -> str:
    """Print table and settings; the end of the message."""
    from rich.console import Console

    from mmx.planning.advice import advise
    from mmx.planning.report import make_plan, render_memory

    try:
        request = ask()
        plan = make_plan(request)
        advice = advise(plan, engine=request.mode != "train")
    except (ValueError, NotImplementedError, MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"; it could not be planned: {reason}"
    Console(stderr=True).print(render_memory(plan, advice))
    # What fits by the estimate comes first, but the estimate has been too low.
    most = 0.9 * plan.total
    helpful = [setting for setting, total, _ in advice if total < most]
    return "; see the table above" + (f": try {helpful[0]}" if helpful else "")


def of_training(plan: "TrainingPlan", partition: Partition | None) -> "Request":
    """The request that a training run is."""
    options = plan.options
    return _request(
        plan.config,
        "train",
        partition,
        seq=plan.seq_len,
        batch=plan.rows,
        accumulation=plan.batches.max_accumulation,
        remat=options.remat,
        optimizer_dtype=options.optimizer.first_moment_dtype,
        capacity_factor=options.capacity_factor,
        dtype=options.compute_dtype,
    )


def of_engine(
    config: ModelConfig,
    params: Any,
    *,
    rows: int,
    tokens: int,
    partition: Partition | None = None,
) -> "Request":
    """The request that an engine is: a step of all its rows.

    Args:
      config, params: of the model.
      rows: sequences that decode together.
      tokens: there is room for, of all of them.
      partition: its devices; None for one.
    """
    from mmx.nn.quantized import is_quantized

    dtype = str(params["embed"]["embedding"].dtype)
    return of_checkpoint(
        config, dtype, int8=is_quantized(params), rows=rows, tokens=tokens, partition=partition
    )


def of_checkpoint(
    config: ModelConfig,
    dtype: str,
    *,
    int8: bool,
    rows: int,
    tokens: int,
    partition: Partition | None = None,
) -> "Request":
    """The same of parameters that are not there yet: in a dtype, their matrices in int8 or not."""
    each = max(1, min(tokens // rows, config.max_seq_len))
    weights = "int8" if int8 else "bf16"
    return _request(config, "decode", partition, seq=each, batch=rows, weights=weights, dtype=dtype)


def _request(config: ModelConfig, mode: Any, partition: Partition | None, **fields: Any):
    from mmx.planning.programs import Request

    mesh: dict[str, int] = {axis: 1 for axis in AXES}
    if partition is not None:
        mesh |= {axis: size for axis, size in partition.mesh.shape.items()}
    chosen = rules.FSDP if partition is None else partition.rules
    topology = _machine(math.prod(mesh.values()))
    return Request("the model", config, mode, topology, mesh, chosen, **fields)


def _machine(devices: int) -> Topology:
    """The devices of this process' kind, as many as are used."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    known = {chip.device_kind.lower(): chip for chip in CHIPS.values()}
    kind = device.device_kind.lower()
    chip: Chip = next((chip for name, chip in known.items() if name in kind), CHIPS["h200"])
    limit = int(stats.get("bytes_limit", chip.hbm_bytes // chip.devices))
    # What jax may take of a device is what counts, and its rates are not asked for.
    chip = dataclasses.replace(chip, name=device.device_kind, devices=1, hbm_bytes=limit)
    return Topology(chip, (devices, *(1,) * (max(chip.torus, 1) - 1)))
