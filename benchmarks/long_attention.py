"""Causal attention of 128K tokens, the heads of bench-4b, in one call of cuDNN and in several.

    python benchmarks/long_attention.py [--json FILE] [--budget SECONDS]
    python benchmarks/long_attention.py --tiny      the same cuts of XLA's form, on a CPU

L2 does not hold the keys and values of such rows. Each of `halvings` takes the halves of a row as
rows of their own and the second half's queries to the first half's keys; `calls_by_heads` are for
one key head each, or for one query head. `difference` is that of the last tokens' results from
those of one call, relative. TFLOP/s count the causal half of the matrix: 2 T^2 H D forward,
5 T^2 H D backward.
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, milliseconds  # isort: skip
import jax
import jax.numpy as jnp

from benchmarks.attention import DIM, SCALE, operands, relative
from pallas_kernels.softmax_attention import gpu_cudnn, xla


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      length, heads, kv_heads: of the one row.
      form: the implementation.
      batch_ms: how long the calls are that are timed together.
    """

    length: int = 1 << 17
    heads: int = 16
    kv_heads: int = 4
    form: ModuleType = gpu_cudnn
    batch_ms: float = 500

    def attend(self, q, k, v, *, causal: bool = True):
        """Output and log-sum-exp."""
        ids = (None, None) if self.form is gpu_cudnn else ones(q, k)
        return self.form.softmax_attention(q, k, v, *ids, 0, causal=causal, scale=SCALE)

    def backward(self, q, k, v, out, lse, grad, *, causal: bool = True):
        """Gradients of queries, keys and values."""
        ids = (None, None) if self.form is gpu_cudnn else ones(q, k)
        arrays = (q, k, v, out, lse, grad, *ids, 0)
        return self.form.attention_block_backward(*arrays, causal=causal, scale=SCALE)


TINY = Setting(length=1 << 9, form=xla, batch_ms=1)


def ones(*arrays):
    return [jnp.ones(x.shape[:2], jnp.int32) for x in arrays]


def half(x, which: int):
    return jnp.split(x, 2, axis=1)[which]


def by_halves(arrays, halvings: int, whole, rectangle, add):
    """`whole` of the halves as rows, to which `add` adds the second half with the first's keys."""
    if not halvings:
        return whole(*arrays)
    rows = [x.reshape(2 * x.shape[0], x.shape[1] // 2, *x.shape[2:]) for x in arrays]
    own = by_halves(rows, halvings - 1, whole, rectangle, add)
    own = [x.reshape(*arrays[0].shape[:2], *x.shape[2:]) for x in own]
    return add(own, rectangle(*arrays))


def forward(setting: Setting, halvings: int, q, k, v):
    def rectangle(q, k, v):
        return setting.attend(half(q, 1), half(k, 0), half(v, 0), causal=False)

    def add(own, before):
        (out, lse), (more, more_lse) = own, before
        total = jnp.logaddexp(half(lse, 1), more_lse)
        shares = [jnp.exp(x - total)[..., None] for x in (half(lse, 1), more_lse)]
        second = half(out, 1) * shares[0] + more * shares[1]  # in fp32
        out = jnp.concatenate([half(out, 0), second.astype(out.dtype)], axis=1)
        return out, jnp.concatenate([half(lse, 0), total], axis=1)

    return by_halves((q, k, v), halvings, setting.attend, rectangle, add)


def backward(setting: Setting, halvings: int, *arrays):
    def rectangle(q, k, v, *of_queries):
        queries = (half(x, 1) for x in of_queries)
        return setting.backward(half(q, 1), half(k, 0), half(v, 0), *queries, causal=False)

    def add(own, more):
        middle = more[0].shape[1]
        targets = (slice(middle, None), slice(middle), slice(middle))
        parts = zip(own, targets, more, strict=True)
        return [x.at[:, target].add(extra.astype(x.dtype)) for x, target, extra in parts]

    return by_halves(arrays, halvings, setting.backward, rectangle, add)


def by_heads(calls: int, function, *arrays):
    """The function for some of the heads at a time; for fewer than share a key head, too."""
    pieces = zip(*(_heads_of_calls(x, calls) for x in arrays), strict=True)
    results = zip(*(function(*piece) for piece in pieces), strict=True)
    return tuple(jnp.concatenate(x, axis=2) for x in results)


def _heads_of_calls(x, calls: int):
    """Those of each call; a head of which there are fewer than calls is in several."""
    shared = max(1, calls // x.shape[2])
    return [part for part in jnp.split(x, calls // shared, axis=2) for _ in range(shared)]


def key_heads(results, kv_heads: int):
    """With the gradients of the calls that had the same key head added up."""

    def add(x):
        parts = x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])
        return jnp.sum(parts, axis=3, dtype=jnp.float32).astype(x.dtype)

    return results[0], *map(add, results[1:])


def measure(report: Report, setting: Setting) -> None:
    length, heads, kv_heads = setting.length, setting.heads, setting.kv_heads
    q, k, v, grad = operands(1, length, heads, kv_heads)
    whole = jax.jit(setting.attend)(q, k, v)
    cases = (("forward", forward, 2, (q, k, v)), ("backward", backward, 5, (q, k, v, *whole, grad)))
    first = {}

    def one(name, function, products, arrays, halvings: int, calls: int) -> None:
        def called(*arrays):
            results = by_heads(calls, functools.partial(function, setting, halvings), *arrays)
            return key_heads(results, kv_heads) if name == "backward" else results

        run = jax.jit(called)
        last = [x[:, -length // 64 :] for x in run(*arrays)]
        errors = map(relative, last, first.setdefault(name, last))
        ms = milliseconds(run, *arrays, batch_ms=setting.batch_ms)
        tflops = products * length**2 * heads * DIM / ms / 1e9
        report.add(what=name, length=length, heads=heads, kv_heads=kv_heads, halvings=halvings,
                   calls_by_heads=calls, difference=max(errors), ms=ms, tflops=tflops)  # fmt: skip

    for calls in (1, kv_heads, heads):
        for halvings in (0, 1, 2):
            for case in cases:
                name = f"{case[0]}, {halvings} halvings, {calls} calls"
                report.attempt(name, functools.partial(one, *case, halvings, calls))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--budget", type=float, default=200, help="seconds")
    parser.add_argument("--tiny", action="store_true", help="everything, by XLA")
    args = parser.parse_args(arguments)
    gpu_cudnn.WHOLE = sys.maxsize  # rows are cut here and nowhere else
    report = Report(args.budget, args.json)
    report.attempt("measure", functools.partial(measure, report, TINY if args.tiny else Setting()))
    report.table()


if __name__ == "__main__":
    main()
