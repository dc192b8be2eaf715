"""Training on one device, beside transformers' MiniMax, in one run.

    python benchmarks/train.py [--json FILE] [--budget SECONDS] [--only step,gradient,...]
    python benchmarks/train.py --smoke      two layers of 'tiny' on short rows, on a CPU

    step      forward, backward and AdamW: bf16 compute, fp32 master and moments, state donated
    gradient  forward and backward of the same loss, parameters in bf16
    peer      transformers' MiniMaxForCausalLM, the same two in bf16: gradient, and with fused AdamW
    long      the step at 8K and at 128K tokens a row, as many tokens a step
    packed    the step on rows of packed documents of mean length 1024

Each part is a process of its own, so that it finds the memory of the device empty and cannot take
the others down. `mfu` counts the model's FLOPs (`mmx.training.flops`) against the data sheet.
`memory` rows are estimates made before compiling: what is saved for the backward pass is counted in
the traced program, in which XLA may still save less. transformers keeps no fp32 master, and neither
clips nor adds a balance loss: its update has less to do than ours.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np

import mmx
from benchmarks import torch_train
from benchmarks.parts import (
    Emit,
    make_parser,
    memory_variables,
    parse,
    run_here,
    run_in_process,
    short,
)
from benchmarks.train_memory import GIGA, compiled_GB, device_limit, estimate, estimate_step
from mmx.config import ModelConfig
from mmx.model import Remat, abstract_params
from mmx.training.flops import peak_flops, train_flops_per_token
from mmx.training.schedule import LearningRate, constant
from mmx.training.state import abstract_state, init_state
from mmx.training.step import StepOptions, make_train_step

RATE = LearningRate((constant(1, 1e-4),))


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      config: of the model.
      rows, length: batch of 'step', 'gradient', 'peer' and 'packed'.
      long_lengths: tokens a row in 'long'; a step has as many tokens as the last of them.
      document: mean length in 'packed'.
      remats: tried in this order until one fits; the last one is run whatever the estimate.
      seconds: spent on timing one thing.
    """

    config: ModelConfig
    rows: int
    length: int
    long_lengths: tuple[int, ...]
    document: int
    remats: tuple[Remat, ...]
    seconds: float


# ---------------------------------------------------------------- data, time, memory


def make_batch(setting: Setting, rows: int, length: int, *, document: int = 0) -> dict[str, Any]:
    """Random tokens [rows, length]; with a mean document length also segment ids."""
    rng = np.random.default_rng(0)
    shape = (rows, length)
    batch = {"tokens": rng.integers(0, setting.config.vocab_size, shape, dtype=np.int32)}
    if document:
        ids = [
            1 + np.searchsorted(np.sort(rng.integers(1, length, length // document)), range(length))
            for _ in range(rows)
        ]
        batch["segment_ids"] = np.stack(ids).astype(np.int32)
    return jax.tree.map(jnp.asarray, batch)


def median_seconds(
    run: Callable[[], Any], wait: Callable[[Any], Any], seconds: float
) -> tuple[float, int]:
    """Median time of a call, and of how many; the first one, which sets up, is not counted."""
    wait(run())
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times), len(times)


def rates(config: ModelConfig, tokens: int, length: int, seconds: float, kind: str) -> dict:
    """Columns that follow from the time of a step."""
    row = {"ms": 1e3 * seconds, "tokens_per_s": tokens / seconds}
    flops = train_flops_per_token(config, length) * tokens / seconds
    peak = peak_flops(kind)
    return row | {"model_TFLOPs": flops / 1e12} | ({"mfu": flops / peak} if peak else {})


def first_that_fits(
    emit: Emit,
    setting: Setting,
    name: str,
    estimated: Callable[[Remat], dict[str, float]],
    compile_: Callable[[Remat], Any],
) -> tuple[Remat, Any, dict[str, float]]:
    """The first remat whose estimate and then whose program fits, its program, and columns."""
    limit = device_limit() / GIGA
    for remat in setting.remats:
        last = remat == setting.remats[-1]
        memory = estimated(remat)
        emit(memory=name, remat=remat, **memory)
        if memory["sum_GB"] > limit and not last:
            continue
        start = time.perf_counter()
        compiled = compile_(remat)
        seconds, needed = time.perf_counter() - start, compiled_GB(compiled)
        if needed <= limit or last:
            return remat, compiled, {"compile_s": seconds, "program_GB": needed}
        emit(memory=name, remat=remat, program_GB=needed)
    raise ValueError("no remat to try; name one of 'none', 'layer', 'superblock'")


# ---------------------------------------------------------------- the parts


def time_step(
    emit: Emit, setting: Setting, name: str, *, rows: int, length: int, document: int = 0
) -> None:
    """One row: a training step on [1, rows, length]."""
    config = setting.config
    batch = make_batch(setting, rows, length, document=document)
    micro_batches = {key: array[None] for key, array in batch.items()}

    def options(remat: Remat) -> StepOptions:
        # One batch again and again is no data to know a spike by.
        return StepOptions(RATE, remat=remat, spike_sigma=math.inf)

    def compile_(remat: Remat) -> Any:
        abstract = abstract_state(config, options(remat).optimizer)
        program = make_train_step(config, options(remat)).program
        return program.lower(abstract, micro_batches, np.int32(1)).compile()

    remat, step, about = first_that_fits(
        emit, setting, name, lambda r: estimate_step(config, batch, options(r)), compile_
    )
    held: list[Any] = [init_state(config, options(remat).optimizer, 0), None]

    def run() -> Any:
        held[0], held[1] = step(held[0], micro_batches, np.int32(1))
        return held[1]

    seconds, calls = median_seconds(run, jax.block_until_ready, setting.seconds)
    loss, skipped = float(held[1]["loss"]), int(held[1]["num_skipped"])
    if not math.isfinite(loss) or skipped:
        raise ValueError(f"{name}: loss {loss}, {skipped} steps skipped: no time of this counts")
    kind = jax.devices()[0].device_kind
    columns = rates(config, rows * length, length, seconds, kind)
    if document:  # FLOPs are known for rows of one sample only
        columns = {key: columns[key] for key in ("ms", "tokens_per_s")}
    emit(part=name, rows=rows, length=length, remat=remat, **columns, calls=calls, loss=loss,
         **about)  # fmt: skip


def step(emit: Emit, setting: Setting) -> None:
    total, active = mmx.count_params(setting.config)
    limit = device_limit()
    row: dict[str, Any] = {"params": total, "active": active}
    emit(**row, **({"device_GB": limit / GIGA} if math.isfinite(limit) else {}))
    time_step(emit, setting, "step", rows=setting.rows, length=setting.length)


def gradient(emit: Emit, setting: Setting) -> None:
    config, rows, length = setting.config, setting.rows, setting.length
    batch = make_batch(setting, rows, length)
    abstract = abstract_params(config, dtype=jnp.dtype(jnp.bfloat16))

    def estimated(remat: Remat) -> dict[str, float]:
        row = estimate(config, abstract, batch, remat)
        return row | {"sum_GB": sum(row.values())}

    def compile_(remat: Remat) -> Any:
        def loss(params, batch):
            return mmx.loss(params, batch, config, remat=remat)[0]

        return jax.jit(jax.value_and_grad(loss)).lower(abstract, batch).compile()

    remat, program, about = first_that_fits(emit, setting, "gradient", estimated, compile_)
    params = mmx.init_params(config, jax.random.key(0), dtype=jnp.dtype(jnp.bfloat16))
    seconds, calls = median_seconds(
        lambda: program(params, batch), jax.block_until_ready, setting.seconds
    )
    columns = rates(config, rows * length, length, seconds, jax.devices()[0].device_kind)
    loss = float(program(params, batch)[0])
    emit(part="gradient", rows=rows, length=length, remat=remat, **columns, calls=calls, loss=loss,
         **about)  # fmt: skip


def long(emit: Emit, setting: Setting) -> None:
    # One remat for all lengths, or the ratio would compare two things.
    setting = dataclasses.replace(setting, remats=setting.remats[-1:])
    tokens = setting.long_lengths[-1]
    for length in setting.long_lengths:
        time_step(emit, setting, f"long_{length}", rows=tokens // length, length=length)


def packed(emit: Emit, setting: Setting) -> None:
    document = setting.document
    time_step(emit, setting, "packed", rows=setting.rows, length=setting.length, document=document)


def peer(emit: Emit, setting: Setting) -> None:
    """transformers' MiniMax, with each way it has to compute the experts."""
    if torch_train.MISSING:
        emit(part="peer", left_out=f"{torch_train.MISSING} is not installed")
        return
    rows, length = setting.rows, setting.length
    tokens = np.asarray(make_batch(setting, rows, length)["tokens"])
    model = torch_train.make_model(setting.config)
    emit(**torch_train.about(model))
    for experts in torch_train.experts(model):
        programs, wait = torch_train.programs(model, tokens)
        for name, run in programs.items():
            try:
                seconds, calls = median_seconds(run, wait, setting.seconds)
                loss = float(run())
            except RuntimeError as error:  # out of memory is one
                emit(part=name, experts=experts, failed=short(error))
                continue
            kind, memory = torch_train.device()
            columns = rates(setting.config, rows * length, length, seconds, kind)
            emit(part=name, experts=experts, rows=rows, length=length, **columns, calls=calls,
                 loss=loss, **memory)  # fmt: skip


PARTS = {"step": step, "gradient": gradient, "peer": peer, "long": long, "packed": packed}


# ---------------------------------------------------------------- the report


def compare(report: Report) -> None:
    """Ratios of tokens/s: ours over the peer's best, the longest rows over the shortest, packed."""
    speeds: dict[str, float] = {}
    for row in report.rows:
        if "tokens_per_s" in row:
            speeds[row["part"]] = max(speeds.get(row["part"], 0.0), row["tokens_per_s"])
    lengths = sorted(
        (name for name in speeds if name.startswith("long_")), key=lambda n: int(n[5:])
    )
    pairs = [("step", "peer_step"), ("gradient", "peer_gradient"), ("packed", "step")]
    for name, base in pairs + ([(lengths[-1], lengths[0])] if len(lengths) > 1 else []):
        if name in speeds and base in speeds:
            report.add(compared=name, to=base, times=speeds[name] / speeds[base])


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__, PARTS, budget=240)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="none,layer", help="tried in this order")
    parser.add_argument("--seconds", type=float, default=3, help="of timing, each")
    options = parse(parser, PARTS)
    wrong = set(options.remat.split(",")) - set(get_args(Remat))
    if wrong:
        parser.error(f"--remat: unknown {', '.join(sorted(wrong))}; use none, layer, superblock")
    return options


def make_setting(options: argparse.Namespace) -> Setting:
    remats = cast(tuple[Remat, ...], tuple(options.remat.split(",")))
    if options.smoke:
        config = dataclasses.replace(mmx.preset("tiny"), layer_kinds=("lightning", "softmax"))
        return Setting(config, 2, 64, (64, 256), 16, remats, 0.2)
    config, lengths = mmx.preset(options.preset), (8192, 131_072)
    return Setting(config, options.rows, options.length, lengths, 1024, remats, options.seconds)


def main() -> int:
    options = parse_options()
    setting = make_setting(options)
    if options.part:
        return run_here(PARTS[options.part], setting, options.cache)
    report = Report(options.budget, options.json)
    with tempfile.TemporaryDirectory() as cache:
        arguments = [*sys.argv[1:], "--cache", cache]
        for part in options.only.split(","):
            variables = memory_variables(part)
            run = functools.partial(run_in_process, report, __file__, part, arguments, variables)
            report.attempt(part, run, seconds=20)
    compare(report)
    report.table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
