"""Training steps on one device and on two, with the same rows on each, and their memory."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parts import Emit, short
from benchmarks.sharded_setting import DEVICES, MESHES, Setting, partition_over, trace
from benchmarks.train_memory import GIGA, compiled_GB
from mmx.training.flops import peak_flops, train_flops_per_token
from mmx.training.optimizer import OptimizerOptions
from mmx.training.placement import put_batch, state_shardings, with_shardings
from mmx.training.schedule import LearningRate, constant
from mmx.training.state import abstract_state, init_state
from mmx.training.step import StepOptions, make_train_step
from sharding import MeshConfig, rules

# So low that routers stay as they were drawn, and alike in all parts: taught by one batch again and
# again they drift apart, and how even the experts' work is decides what spreading them can give.
RATE = LearningRate((constant(1, 1e-9),))


def queued_ms(run: Callable[[], Any], seconds: float) -> float:
    """Median over three batches of queued calls, of the time a call."""
    times, result = [], None
    for calls in (1, 1, 0, 0, 0):
        calls = calls or max(2, min(50, round(seconds * 1e3 / 3 / times[1])))
        start = time.perf_counter()
        for _ in range(calls):
            result = None  # or it would cut the room for what the next call makes in two
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times[2:])


def train(emit: Emit, setting: Setting, name: str) -> None:
    """A training step with the same rows on each device, and what it took of the memory."""
    config, partition = setting.config, None
    if name in MESHES:
        partition = partition_over(*MESHES[name])
    devices = 1 if partition is None else DEVICES
    options = StepOptions(
        RATE,
        optimizer=OptimizerOptions(first_moment_dtype=setting.moment),
        remat=setting.remat,
        capacity_factor=setting.capacity,
        spike_sigma=math.inf,  # one batch again and again is no data to know a spike by
    )
    rows = np.random.default_rng(0).integers(
        0, config.vocab_size, (1, setting.rows, setting.length), dtype=np.int32
    )
    batch = put_batch({"tokens": np.tile(rows, (1, devices, 1))}, partition)
    batch = jax.tree.map(jnp.asarray, batch)
    shardings = state_shardings(config, options.optimizer, partition)
    shapes = with_shardings(abstract_state(config, options.optimizer), shardings)
    start = time.perf_counter()
    program = make_train_step(config, options, partition=partition).program
    step = program.lower(shapes, batch, np.int32(1)).compile()
    compile_s = time.perf_counter() - start
    held: list[Any] = [init_state(config, options.optimizer, 0, shardings=shardings), None]

    def run() -> Any:
        held[1] = None
        held[0], held[1] = step(held[0], batch, np.int32(1))
        return held[1]

    loss = float(run()["loss"])
    ms = queued_ms(run, setting.seconds)
    if not math.isfinite(float(held[1]["loss"])) or int(held[1]["num_skipped"]):
        raise ValueError(f"{name}: loss {held[1]['loss']}, steps skipped: no time of this counts")
    tokens = devices * setting.rows * setting.length
    speed, flops = 1e3 * tokens / ms, train_flops_per_token(config, setting.length)
    peak = peak_flops(jax.devices()[0].device_kind)
    about = {"mfu": flops * speed / devices / peak} if peak else {}
    emit(part=name, devices=devices, rows=setting.rows, length=setting.length, remat=setting.remat,
         moment=setting.moment, ms=ms, tokens_per_s=speed, **about, loss=loss,
         capacity=setting.capacity, dropped=float(np.mean(held[1]["dropped_tokens"])),
         router_load=float(np.max(held[1]["router_load"])), compile_s=compile_s)  # fmt: skip
    emit(memory=name, compiled_GB=compiled_GB(step), **measured_GB(devices))
    if setting.trace and name in ("fsdp", "expert"):
        trace(emit, setting, name, run)


def measured_GB(devices: int) -> dict[str, float]:
    """The most that arrays took on any of the devices, as the runtime counts."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()[:devices]]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return {"runtime_GB": max(peaks) / GIGA} if peaks else {}


def plan(emit: Emit, setting: Setting) -> None:
    """Of each step a row: bytes of a device, and products without those computed again."""
    try:
        from mmx.planning.programs import request
        from mmx.planning.report import make_plan
        from mmx.planning.topology import parse_topology
    except ImportError as error:
        emit(part="plan", left_out=short(error))
        return
    for name, (mesh, chosen) in {"one": (MeshConfig(fsdp=1), rules.FSDP), **MESHES}.items():
        devices = 1 if name == "one" else DEVICES
        ask = request(
            name=name,
            config=setting.config,
            mode="train",
            topology=parse_topology(f"h100:{devices}x1"),
            mesh=mesh,
            chosen_rules=chosen.name,
            seq=setting.length,
            batch=devices * setting.rows,
            remat=setting.remat,
            optimizer_dtype=setting.moment,
            capacity_factor=setting.capacity,
        )
        found = make_plan(ask)
        flops = devices * (sum(part.flops for part in found.bound.parts) - found.flops_again)
        tokens = devices * setting.rows * setting.length
        counted = tokens * train_flops_per_token(setting.config, setting.length)
        emit(plan=name, planned_GB=found.total / GIGA, planned_TFLOP=flops / 1e12,
             analytic_TFLOP=counted / 1e12)  # fmt: skip
