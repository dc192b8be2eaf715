"""Prefill and decoding on one device, beside floors, an all-softmax twin and transformers.

    python benchmarks/inference.py [--json FILE] [--budget SECONDS] [--only decode,prefill,...]
    python benchmarks/inference.py --smoke      the 'tiny' preset, on a CPU

    ceilings  copy bandwidth and bf16 matmul rate of the device: what the floors are made of
    decode    time a step for 1 to 256 rows at 1K to 4M tokens of context
    prefill   tokens/s of a prompt in chunks
    first     time to the first token of prompts of 1K to 4M tokens, here and of the twin; beyond
              `prompt` it is summed up from chunks timed on the way, which says 'summed'
    engine    requests through `mmx.Engine`, as many as there are rows, all at once: tokens/s
    prefix    the first token of a prompt that hits a kept prefix beside one that does not
    fp8       'decode' with keys and values in fp8
    int8      'decode' with int8 weights
    twin      'decode' of a model of the same size whose layers are all softmax
    slice     one superblock of Text-01 at full width: decode and prefill at 1M and 4M tokens
    share     of a profile of its prefill at 1M: how much of the kernels' time which takes
    peer      transformers' MiniMax: prefill, and generate for 1 and 16 rows

Contexts that would take long to read are filled with random states, keys and values: the time of a
step does not depend on them. Random states also make rows choose different experts. The floor of a
step counts what must be read once: weights outside of experts, the experts that so many rows are
expected to choose, keys and values, states read and written; at the bandwidth of a copy.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, copy_bandwidth, matmul_rate  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device_trace, torch_generate
from benchmarks.inference_setting import Setting, make_setting
from benchmarks.parts import Emit, make_parser, memory_variables, parse, run_here, run_in_process
from benchmarks.random_memory import (
    BF16,
    PAGE,
    random_params,
    random_pool,
    running_rows,
    step_bytes,
)
from mmx.config import ModelConfig
from mmx.inference.cache import kv_bytes_per_token
from mmx.inference.decoding import decode, prefill
from mmx.inference.engine import Engine
from mmx.inference.memory_plan import plan_memory
from mmx.inference.pool import PoolShape
from mmx.inference.requests import Sampling
from mmx.model import Params
from mmx.training.flops import forward_flops_per_token

MOST_KV = 60e9  # bytes of keys and values


# ---------------------------------------------------------------- the parts


def ceilings(emit: Emit, setting: Setting) -> None:
    emit(copy_GBs=copy_bandwidth(setting.copied), matmul_TFLOPs=matmul_rate(setting.matmul))


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_decode(
    emit: Emit, setting: Setting, config: ModelConfig, params: Params, part: str,
    rows: int, context: int, kv_dtype: jnp.dtype = BF16,
) -> None:  # fmt: skip
    """One row of the report: a step of the decode program."""
    if rows * context * kv_bytes_per_token(config, 2) > MOST_KV:
        emit(part=part, rows=rows, context=context, left_out="keys and values above 60 GB")
        return
    ahead = (setting.repeats + 1) * setting.steps
    row_pages = -(-(context + ahead) // PAGE)
    held = [random_pool(config, rows, rows * row_pages, kv_dtype),
            running_rows(config, rows, row_pages, context)]  # fmt: skip

    def run() -> None:
        held[0], held[1], chosen = decode(params, *held, config=config, steps=setting.steps)
        assert bool(chosen.valid.all())

    seconds = median_seconds(run, setting.repeats) / setting.steps
    floor = step_bytes(config, params, rows, context, kv_dtype.itemsize)
    emit(part=part, rows=rows, context=context, ms=1e3 * seconds, tokens_per_s=rows / seconds,
         floor_GB=floor / 1e9, GBs=floor / seconds / 1e9, **peak())  # fmt: skip


def peak() -> dict[str, float]:
    """The most memory that was in use so far."""
    stats = jax.local_devices()[0].memory_stats() or {}
    found = stats.get("peak_bytes_in_use")
    return {"peak_GB": found / 1e9} if found else {}


def decode_part(emit: Emit, setting: Setting) -> None:
    params = random_params(setting.config)
    for rows, context in setting.decode:
        time_decode(emit, setting, setting.config, params, "decode", rows, context)


def fp8_part(emit: Emit, setting: Setting) -> None:
    params, narrow = random_params(setting.config), jnp.dtype(jnp.float8_e4m3fn)
    for rows, context in setting.decode:
        time_decode(emit, setting, setting.config, params, "fp8", rows, context, narrow)


def int8_part(emit: Emit, setting: Setting) -> None:
    from mmx.inference.quantize import quantize

    params = quantize(random_params(setting.config), setting.config)
    for rows, context in setting.decode:
        time_decode(emit, setting, setting.config, params, "int8", rows, context)


def twin(emit: Emit, setting: Setting) -> None:
    """Softmax in every layer: eight times the keys and values, no states."""
    layers = ("softmax",) * setting.config.num_layers
    config = dataclasses.replace(setting.config, layer_kinds=layers)
    params = random_params(config)
    for rows, context in setting.decode:
        time_decode(emit, setting, config, params, "twin", rows, context)
    time_first(emit, setting, config, params, "twin_first")


def time_prefill(
    emit: Emit, setting: Setting, config: ModelConfig, params: Params, part: str,
    start: int, tokens: int,
) -> None:  # fmt: skip
    """One row: so many tokens read in chunks from `start` on."""
    chunk = min(setting.chunk, tokens)
    row_pages = -(-(start + tokens) // PAGE)
    pool = random_pool(config, 1, row_pages)
    page_row = np.arange(row_pages, dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, chunk, dtype=np.int32)

    def run() -> None:
        nonlocal pool
        logits = None
        for place in range(start, start + tokens, chunk):
            numbers = (np.int32(chunk), np.int32(0), page_row, np.int32(place))
            pool, logits = prefill(params, pool, ids, *numbers, config=config)
        jax.block_until_ready(logits)

    repeats = setting.repeats if tokens <= setting.prompt else 1
    seconds = median_seconds(run, min(repeats, 3))
    # The FLOPs of these tokens are those of all minus those of the ones before.
    flops = forward_flops_per_token(config, start + tokens).total * (start + tokens)
    flops -= forward_flops_per_token(config, start).total * start if start else 0
    flops -= 2 * config.embed_dim * config.vocab_size * (tokens - 1)  # logits of the last alone
    emit(part=part, start=start, tokens=tokens, chunk=chunk, seconds=seconds,
         tokens_per_s=tokens / seconds, TFLOPs=flops / seconds / 1e12, **peak())  # fmt: skip


def prefill_part(emit: Emit, setting: Setting) -> None:
    params = random_params(setting.config)
    for tokens in (setting.prompt // 8, setting.prompt, 4 * setting.prompt):
        time_prefill(emit, setting, setting.config, params, "prefill", 0, tokens)


def first_part(emit: Emit, setting: Setting) -> None:
    time_first(emit, setting, setting.config, random_params(setting.config), "first")


def time_first(
    emit: Emit, setting: Setting, config: ModelConfig, params: Params, part: str
) -> None:
    """Rows of the report: seconds from the prompt to its logits."""
    longest = max(n for n in setting.prompts if n * kv_bytes_per_token(config, 2) <= MOST_KV)
    row_pages = -(-longest // PAGE)
    pool = random_pool(config, 1, row_pages)
    page_row = np.arange(row_pages, dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, setting.chunk, dtype=np.int32)

    def read(begin: int, end: int) -> float:
        nonlocal pool
        start, logits = time.perf_counter(), None
        while begin < end:
            size = min(setting.chunk, end - begin)
            numbers = (np.int32(size), np.int32(0), page_row, np.int32(begin))
            pool, logits = prefill(params, pool, ids[:size], *numbers, config=config)
            begin += size
        jax.block_until_ready(logits)
        return time.perf_counter() - start

    seconds, before = 0.0, 0
    for prompt in setting.prompts:
        if prompt > longest:
            emit(part=part, prompt=prompt, left_out="keys and values above 60 GB")
            continue
        measured = prompt <= setting.prompt
        if measured:
            read(0, prompt)
            seconds = read(0, prompt)
        else:
            # A chunk takes longer the more stands before it, by the same for each: the mean of the
            # first and the last is that of all between.
            ends = before, prompt - setting.chunk
            each = statistics.mean(min(read(s, s + setting.chunk) for _ in range(2)) for s in ends)
            seconds += each * (prompt - before) / setting.chunk
        before = prompt
        flops = forward_flops_per_token(config, prompt).total * prompt
        flops -= 2 * config.embed_dim * config.vocab_size * (prompt - 1)  # logits of the last alone
        emit(part=part, prompt=prompt, seconds=seconds, how="measured" if measured else "summed",
             total_TFLOP=flops / 1e12, TFLOPs=flops / seconds / 1e12)  # fmt: skip


def engine_part(emit: Emit, setting: Setting) -> None:
    """As a user would: through the engine, with the host's work in between."""
    config = setting.config
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 64 + PAGE).tolist()
    options = Sampling(max_new_tokens=setting.new, ignore_eos=True)
    for rows in (64, 16, 1):
        pages = rows * (-(-setting.new // PAGE) + 2)
        engine = Engine(config, params, rows=rows, max_seq_len=2 * PAGE + setting.new, pages=pages,
                        chunk=setting.chunk, decode_steps=setting.steps)  # fmt: skip
        prompts = [tokens[i : i + PAGE] for i in range(rows)]
        engine.generate(prompts, options)
        start = time.perf_counter()
        engine.generate([prompt[::-1] for prompt in prompts], options)
        seconds = time.perf_counter() - start
        emit(part="engine", rows=rows, prompt=PAGE, new=setting.new,
             tokens_per_s=rows * setting.new / seconds)  # fmt: skip


def prefix_part(emit: Emit, setting: Setting) -> None:
    """Time to the first token of a prompt that begins like the one before it."""
    config = setting.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, setting.prompt).tolist()
    engine = Engine(config, random_params(config), rows=1, max_seq_len=setting.prompt + PAGE,
                    pages=2 * (setting.prompt // PAGE + 2), chunk=setting.chunk)  # fmt: skip
    for prompt in (tokens, tokens[::-1]):  # of the first, programs are compiled
        miss, hit = (first_token(engine, [*prompt, i]) for i in range(2))
    emit(part="prefix", prompt=setting.prompt, miss_ms=1e3 * miss, hit_ms=1e3 * hit,
         times=miss / hit, hits=engine.snapshots.hits)  # fmt: skip


def first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds to the first token."""
    start = time.perf_counter()
    for _, event in engine.stream([prompt], Sampling(max_new_tokens=2, ignore_eos=True)):
        if event.token is not None:
            break
    return time.perf_counter() - start


def slice_part(emit: Emit, setting: Setting) -> None:
    """Beside each peak what the plan of an engine for that context says."""
    config = setting.slice_config
    params = random_params(config)
    for context in setting.slice_contexts:
        longest = context + (setting.repeats + 1) * setting.steps + setting.chunk
        pages = -(-longest // PAGE)
        shape = PoolShape(1, pages, PAGE, jnp.dtype(jnp.bfloat16))
        plan = plan_memory(config, params, shape, row_pages=pages, snapshots=0,
                           chunk=setting.chunk, decode_steps=setting.steps)  # fmt: skip
        emit(part="plan", context=context, **{k: v / 1e9 for k, v in plan.lines()})
        time_decode(emit, setting, config, params, "slice_decode", 1, context)
        start = context // setting.chunk * setting.chunk
        time_prefill(emit, setting, config, params, "slice_prefill", start, setting.chunk)


def share_part(emit: Emit, setting: Setting) -> None:
    """Where a chunk's time goes, by the names of kernels; lightning attention's share of all."""
    config, start = setting.slice_config, setting.slice_contexts[0] // setting.chunk * setting.chunk
    params = random_params(config)
    row_pages = -(-(start + setting.chunk) // PAGE)
    held = [random_pool(config, 1, row_pages)]
    ids = np.zeros(setting.chunk, np.int32)
    pages = np.arange(row_pages, dtype=np.int32)
    numbers = (np.int32(setting.chunk), np.int32(0), pages, np.int32(start))

    def run() -> Any:
        held[0], logits = prefill(params, held[0], ids, *numbers, config=config)
        return logits

    with tempfile.TemporaryDirectory() as folder:
        for device in device_trace.record(Path(folder), "prefill", run, top=100):
            times = device["largest_ms"]
            lightning = sum(ms for name, ms in times.items() if "lightning_attention" in name)
            largest = dict(list(times.items())[:8])
            emit(part="share", start=start, tokens=setting.chunk, kernels_ms=sum(times.values()),
                 lightning_share=lightning / sum(times.values()), largest_ms=largest)  # fmt: skip


def peer(emit: Emit, setting: Setting) -> None:
    torch_generate.measure(emit, setting.config, prompt=setting.prompt // 8, new=setting.new // 4)


PARTS = {
    "ceilings": ceilings,
    "decode": decode_part,
    "prefill": prefill_part,
    "first": first_part,
    "engine": engine_part,
    "prefix": prefix_part,
    "fp8": fp8_part,
    "int8": int8_part,
    "twin": twin,
    "slice": slice_part,
    "share": share_part,
    "peer": peer,
}


# ---------------------------------------------------------------- the report


def compare(report: Report) -> None:
    """Shares of the ceilings, and ratios to the peer."""
    found = {key: row[key] for row in report.rows for key in ("copy_GBs", "matmul_TFLOPs")
             if key in row}  # fmt: skip
    for row in list(report.rows):
        name = {
            k: row[k] for k in ("part", "rows", "context", "start", "tokens", "prompt") if k in row
        }
        if "GBs" in row and "copy_GBs" in found:
            report.add(of_floor=row["GBs"] / found["copy_GBs"], **name)
        if "TFLOPs" in row and "matmul_TFLOPs" in found:
            report.add(of_matmul=row["TFLOPs"] / found["matmul_TFLOPs"], **name)
    peers = {row["rows"]: row for row in report.rows if row.get("part") == "peer_decode"}
    for row in list(report.rows):
        if row.get("part") == "engine" and row["rows"] in peers:
            times = row["tokens_per_s"] / peers[row["rows"]]["tokens_per_s"]
            report.add(compared="engine", to="peer_decode", rows=row["rows"], times=times)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__, PARTS, budget=480)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a dispatch")
    parser.add_argument("--shapes", help="ROWSxCONTEXT,... of 'decode' and the like")
    return parse(parser, PARTS)


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
