"""Paged attention as an engine calls it: decode steps and chunks of a prompt.

    python benchmarks/paged_attention.py [--json FILE] [--budget SECONDS] [--only check,decode,...]
    python benchmarks/paged_attention.py --tiny      the same on small shapes by XLA, on a CPU

    check    relative errors against the definition in fp32, NaN wherever no row may read; repeats
    decode   one query a row: 64 query heads, 8 key heads of 128, pages of 256 tokens
    prefill  8192 queries of one row that begin at some position
    fp8      the same from pages of fp8, of which the bytes and the floor are then
    xla      the XLA form on some of these

Decode steps are timed as layers of one program, each with pages of its own, so that the L2 cache
holds nothing of them; a layer's share is reported. `floor_us` is the time of reading its keys and
values at the copy bandwidth of the same run, `of_floor` how much of that rate was reached, `GBps`
the rate. TFLOP/s of prefill count what the causal mask leaves; `of_dense` is the fraction of the
rate of an 8192^3 bf16 product in the same run.
"""

import argparse
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, copy_bandwidth, matmul_rate, milliseconds  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import reference

KI, MI = 1 << 10, 1 << 20
MAX_LAYERS = 32
# bf16 rounds at 2^-9 = 2e-3: the weights, and the result or those of blocks.
LIMIT = 5e-3


def spans(length: int, *rows: tuple[int, int]) -> list[list[int]]:
    """Positions of (start, count) of each row, and padding."""
    return [[*range(start, start + count), *[-1] * (length - count)] for start, count in rows]


RAGGED = [[-1], [0], [63], [64], [-1], [5000], [255], [256], [70_000], [-1]]
CHECKS = (
    ("decode, ragged", 0, RAGGED, 64, 8, 128, 256),
    ("decode, ragged, bench-4b", 0, RAGGED, 16, 4, 128, 256),
    ("decode, pages of 16", 0, RAGGED, 8, 2, 64, 16),
    ("decode, pages of 32", 0, RAGGED, 8, 1, 64, 32),
    ("decode, heads of 256", 0, RAGGED, 8, 8, 256, 64),
    ("decode, 64 rows", 0, [[97 * i] for i in range(64)], 64, 8, 128, 256),
    ("8 queries a row", 0, spans(8, (0, 8), (9000, 8), (0, 0), (700, 3)), 64, 8, 128, 256),
    ("queries in no order", 0, [[900, 3, -1, 17], [-1, -1, 5, 4]], 64, 8, 128, 256),
    ("chunk from 0", 1, spans(512, (0, 512)), 64, 8, 128, 256),
    ("chunk at 3328", 1, spans(512, (3328, 500)), 64, 8, 128, 256),
    ("chunk at 70,000, in blocks", 1, spans(256, (70_000, 256)), 16, 4, 128, 256),
    ("chunks of many rows", 1, spans(64, (0, 64), (999, 64), (0, 0), (31, 1)), 16, 4, 128, 16),
    ("a chunk that is no chunk", 1, [[*range(300, 200, -1)]], 16, 4, 128, 256),
)


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      heads, kv_heads, dim, page: of decode and prefill.
      page_dtype: of keys and values.
      lengths: keys of each row of a decode step, by name.
      chunk, starts: of prefill.
      fp8: which of the cases pages of fp8 are read in.
      layer_bytes: of keys and values that the layers of one program read together, at least.
      kernels: implementations of decode and prefill.
      xla: which of the cases the XLA form is timed on.
      checks: name, which of the kernels, positions, query heads, key heads, head size, page.
      floors: whether to compare with the rates of the device.
      batch_ms: how long the calls are that are timed together.
    """

    heads: int = 64
    kv_heads: int = 8
    dim: int = 128
    page: int = 256
    page_dtype: Any = jnp.bfloat16
    lengths: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("1 x 1K", (KI,)),
        ("1 x 32K", (32 * KI,)),
        ("1 x 1M", (MI,)),
        ("1 x 4M", (4 * MI,)),
        ("64 x 4K", (4 * KI,) * 64),
        ("64 x 32K", (32 * KI,) * 64),
        ("63 x 4K and 1M", (*(4 * KI,) * 63, MI)),
    )
    chunk: int = 8192
    starts: tuple[int, ...] = (0, 32 * KI, MI)
    layer_bytes: int = 256 * MI
    kernels: tuple[str, str] = ("pallas_gpu", "cudnn")
    fp8: tuple[str, ...] = ("1 x 32K", "1 x 1M", "1 x 4M", "64 x 4K", "64 x 32K", "32768")
    xla: tuple[str, ...] = ("1 x 1K", "1 x 32K", "64 x 4K", "0", "32768")
    checks: tuple[tuple[Any, ...], ...] = CHECKS
    floors: bool = True
    batch_ms: float = 100


FULL = Setting()
TINY = Setting(
    heads=4,
    kv_heads=2,
    dim=16,
    page=16,
    lengths=(("3 x 4 and 500", (4, 4, 4, 500)),),
    chunk=32,
    starts=(100,),
    layer_bytes=64 * KI,
    kernels=("xla", "xla"),
    fp8=("3 x 4 and 500", "100"),
    xla=("100",),
    checks=(
        ("decode", 0, [[-1], [0], [63], [64], [700]], 4, 2, 16, 16),
        ("chunks", 1, spans(40, (0, 40), (99, 33), (0, 0)), 4, 2, 16, 16),
    ),
    floors=False,
    batch_ms=1,
)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random(shape: tuple[int, ...], seed: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def pool(number: int, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """So many pages of keys and of values, which repeat: gigabytes take long to draw."""
    some = min(number, 256)
    shape = (some, setting.page, setting.kv_heads, setting.dim)
    drawn = (random(shape, seed).astype(setting.page_dtype) for seed in (1, 2))
    return tuple(x[jnp.arange(number) % some] for x in drawn)


def token_bytes(setting: Setting) -> int:
    """Of the keys and values of a token, of one layer."""
    return 2 * setting.kv_heads * setting.dim * jnp.dtype(setting.page_dtype).itemsize


def tables(lengths: tuple[int, ...], page: int, layers: int, width: int) -> tuple[np.ndarray, int]:
    """Page tables [layers, B, width] of scattered pages, and how many pages there are."""
    counts = -(-np.asarray(lengths) // page)
    number = layers * int(counts.sum())
    order = np.random.default_rng(0).permutation(number)
    out = np.full((layers, len(lengths), width), -1, np.int32)
    for layer in range(layers):
        for row, count in enumerate(counts):
            out[layer, row, :count], order = order[:count], order[count:]
    return out, number


# ---------------------------------------------------------------- check


def relative(seen, wanted) -> float:
    seen, wanted = np.asarray(seen, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(seen - wanted) / np.linalg.norm(wanted))


def case(
    positions, heads: int, kv_heads: int, dim: int, page: int, page_dtype: Any = jnp.bfloat16
) -> tuple[jax.Array, ...]:
    """Arguments for these positions; NaN in slots that no row may read, tables that end wild."""
    positions = np.asarray(positions, np.int32)
    lengths = positions.max(axis=1) + 1
    width = -(-int(lengths.max()) // page) + 3
    table, number = tables(tuple(lengths), page, 1, width)
    used = np.zeros((number, page), bool)
    for row, length in enumerate(lengths):
        place = np.arange(length)
        used[table[0, row, place // page], place % page] = True
    pages = (random((number, page, kv_heads, dim), seed) for seed in (1, 2))
    held = (jnp.where(used[..., None, None], x, jnp.nan) for x in pages)
    keys, values = (x.astype(page_dtype) for x in held)
    q = random((*positions.shape, heads, dim), 0)
    return q, keys, values, jnp.asarray(table[0]), jnp.asarray(positions)


def check(report: Report, setting: Setting) -> None:
    """Errors against the definition in fp32; equal bits in 20 runs; padding exactly 0."""
    for name, which, *numbers in setting.checks:
        kernel = setting.kernels[which]
        report.attempt(name, functools.partial(check_one, report, name, kernel, *numbers))
        narrow = (f"fp8: {name}", kernel, *numbers, jnp.float8_e4m3fn)
        report.attempt(narrow[0], functools.partial(check_one, report, *narrow))


def check_one(report: Report, name: str, kernel: str, *numbers: Any) -> None:
    q, *rest = case(*numbers)
    run = jax.jit(functools.partial(paged_attention, implementation=kernel))
    seen = run(q, *rest)
    wide = jax.jit(functools.partial(reference.paged_attention, scale=q.shape[3] ** -0.5))
    error = relative(seen, wide(q.astype(jnp.float32), *rest))
    padding = float(jnp.abs(jnp.where(rest[-1][..., None, None] < 0, seen, 0)).max())
    same = all(bool(jnp.array_equal(run(q, *rest), seen)) for _ in range(20))
    good = error < LIMIT and padding == 0 and same
    report.add(
        check=name, who=kernel, error=error, padding=padding, same_bits=same, verdict="ok"
        if good else "WRONG",
    )  # fmt: skip


# ---------------------------------------------------------------- speed


@functools.cache
def bandwidth() -> float:
    return copy_bandwidth()


@functools.cache
def dense() -> float:
    return matmul_rate()


def layers_of(setting: Setting, lengths: tuple[int, ...]) -> int:
    size = sum(lengths) * token_bytes(setting)
    return min(max(setting.layer_bytes // size, 1), MAX_LAYERS)


def decode_one(
    report: Report, setting: Setting, name: str, lengths: tuple[int, ...], kernel: str
) -> None:
    """All layers of a decode step in one program."""
    layers = layers_of(setting, lengths)
    table, number = tables(lengths, setting.page, layers, -(-max(lengths) // setting.page))
    shape = (len(lengths), 1, setting.heads, setting.dim)
    queries = [random(shape, seed) for seed in range(layers)]
    positions = jnp.asarray(lengths, jnp.int32)[:, None] - 1

    @jax.jit
    def step(queries, keys, values, table, positions):
        attend = functools.partial(paged_attention, implementation=kernel)
        return [attend(q, keys, values, t, positions) for q, t in zip(queries, table, strict=True)]

    arrays = (queries, *pool(number, setting), [jnp.asarray(t) for t in table], positions)
    ms = milliseconds(step, *arrays, batch_ms=setting.batch_ms) / layers
    size = sum(lengths) * token_bytes(setting)
    row = dict(us=ms * 1e3, MB=size / 1e6, GBps=size / ms / 1e6)
    if setting.floors:
        floor = size / bandwidth() / 1e3
        row |= dict(floor_us=floor, of_floor=floor / row["us"])
    report.add(decode=name, who=kernel, pages=str(jnp.dtype(setting.page_dtype)), layers=layers,
               **row)  # fmt: skip


def prefill_one(report: Report, setting: Setting, start: int, kernel: str) -> None:
    """A chunk of one row, whose table reaches no further."""
    length = start + setting.chunk
    table, number = tables((length,), setting.page, 1, -(-length // setting.page))
    q = random((1, setting.chunk, setting.heads, setting.dim), 0)
    positions = start + jnp.arange(setting.chunk, dtype=jnp.int32)[None]
    run = jax.jit(functools.partial(paged_attention, implementation=kernel))
    arrays = (q, *pool(number, setting), jnp.asarray(table[0]), positions)
    ms = milliseconds(run, *arrays, batch_ms=setting.batch_ms)
    seen = setting.chunk * start + setting.chunk * (setting.chunk + 1) / 2
    tflops = 4 * setting.heads * setting.dim * seen / ms / 1e9
    row = dict(of_dense=tflops / dense()) if setting.floors else {}
    report.add(prefill=start, chunk=setting.chunk, who=kernel,
               pages=str(jnp.dtype(setting.page_dtype)), ms=ms, tflops=tflops, **row)  # fmt: skip


def decode(report: Report, setting: Setting) -> None:
    for name, lengths in setting.lengths:
        one = functools.partial(decode_one, report, setting, name, lengths, setting.kernels[0])
        report.attempt(f"decode {name}", one)


def prefill(report: Report, setting: Setting) -> None:
    for start in setting.starts:
        one = functools.partial(prefill_one, report, setting, start, setting.kernels[1])
        report.attempt(f"prefill {start}", one)


def only(setting: Setting, cases: tuple[str, ...], **changes: Any) -> Setting:
    return dataclasses.replace(
        setting,
        lengths=tuple(x for x in setting.lengths if x[0] in cases),
        starts=tuple(x for x in setting.starts if str(x) in cases),
        **changes,
    )


def fp8(report: Report, setting: Setting) -> None:
    for kernels in dict.fromkeys((setting.kernels, ("xla", "xla"))):
        narrow = only(setting, setting.fp8, kernels=kernels, page_dtype=jnp.float8_e4m3fn)
        decode(report, narrow)
        prefill(report, narrow)


def xla_form(report: Report, setting: Setting) -> None:
    plain = only(setting, setting.xla, kernels=("xla", "xla"))
    decode(report, plain)
    prefill(report, plain)


PARTS = dict(check=check, decode=decode, prefill=prefill, fp8=fp8, xla=xla_form)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--budget", type=float, default=300, help="seconds")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="everything, by XLA")
    args = parser.parse_args(arguments)
    report = Report(args.budget, args.json)
    setting = TINY if args.tiny else FULL
    for name, part in PARTS.items():
        if name in args.only.split(","):
            report.attempt(name, functools.partial(part, report, setting))
    report.table()


if __name__ == "__main__":
    main()
