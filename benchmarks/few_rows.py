"""What decoding few rows is made of: skinny products, the experts' mixture, states in place.

    python benchmarks/few_rows.py [--json FILE] [--budget SECONDS] [--only check,products,...]
    python benchmarks/few_rows.py --tiny      the same on small shapes by XLA, on a CPU

    check     relative errors against fp32, for 1 to 64 rows; NaN in what nobody may read; 100
              launches with the same bits
    products  the projections of bench-4b, beside XLA's own product
    experts   the mixture of a layer of bench-4b; beside it the bytes of the experts that are chosen
    int8      qkv alone, and the mixture, with int8 matrices
    states    one token of lightning attention, of one layer among 14

Each is timed as layers of one program, a CUDA graph as in decoding, with matrices of their own, so
that the L2 cache holds nothing of them; `us` is a layer's share and `of_floor` the rate reached, of
a copy's in the same run; `experts` is how many are chosen.
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, copy_bandwidth, milliseconds  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np

from mmx.inference import graphs
from mmx.nn.quantized import quantized
from pallas_kernels import expert_mixture, lightning_decode_step, skinny_matmul

# What goes into the last product and the result of bf16 models are rounded at 2^-9 = 2e-3.
LIMIT = {"products": 2e-6, "experts": 2.5e-3, "states": 2.5e-3}


@dataclass(frozen=True)
class Setting:
    """Sizes of a layer, how many layers, rows, and the implementation."""

    embed: int
    heads: int
    head_dim: int
    experts: int
    hidden: int
    layers: int
    rows: tuple[int, ...]
    implementation: str
    copied: int


FULL = Setting(2048, 16, 128, 8, 4096, 14, (1, 3, 16, 64), "pallas_gpu", 1 << 30)
TINY = Setting(64, 2, 64, 4, 128, 2, (1, 3), "xla", 1 << 20)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def random(shape: tuple[int, ...], seed: int, dtype: Any = jnp.bfloat16, std: float = 1.0):
    return (std * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def weights_of(setting: Setting, rows: int, layers: int) -> jax.Array:
    """Two experts a token, [layers, rows, experts]."""
    rng = np.random.default_rng(rows)
    weights = np.zeros((layers, rows, setting.experts), np.float32)
    for one in weights.reshape(-1, setting.experts):
        one[rng.permutation(setting.experts)[:2]] = rng.uniform(0.1, 0.9, 2)
    return jnp.asarray(weights)


def chosen_of(weights: jax.Array) -> float:
    """The share of the experts that are chosen, of all layers."""
    return float(np.mean(np.any(np.asarray(weights) != 0, axis=1)))


def matrices_of(setting: Setting, layers: int) -> list[jax.Array]:
    """gate, up and down of all layers."""
    wide = (layers, setting.experts, setting.embed, setting.hidden)
    down = (layers, setting.experts, setting.hidden, setting.embed)
    return [
        random(shape, 10 + i, jnp.bfloat16, shape[2] ** -0.5)
        for i, shape in enumerate((wide, wide, down))
    ]


def in_int8(matrices: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Values and scales of matrices whose inputs are the last axis but one."""
    held = [jax.jit(quantized, static_argnums=1)(m, (m.ndim - 2,)) for m in matrices]
    return [h.values for h in held], [h.scale for h in held]


def error(seen: Any, wanted: Any) -> float:
    """Relative, and infinite where one is NaN."""
    seen, wanted = (np.asarray(x).astype(np.float64) for x in (seen, wanted))
    found = float(np.linalg.norm(seen - wanted) / np.linalg.norm(wanted))
    return found if np.isfinite(found) else float("inf")


def repeats(
    report: Report, what: str, rows: int, run: Any, wanted: Any, launches: int, **about: Any
) -> None:
    """A row: the error of a result, and whether other launches give the same bits."""
    first = np.asarray(run())
    alike = all(np.array_equal(first, np.asarray(run())) for _ in range(launches - 1))
    worst = error(first, wanted)
    good = worst <= LIMIT[what] and alike
    report.add(check=what, **about, rows=rows, error=worst, alike=alike, launches=launches,
               verdict="ok" if good else "WRONG")  # fmt: skip


def check(report: Report, setting: Setting) -> None:
    how, launches = {"implementation": setting.implementation}, 100 if setting is FULL else 2
    for rows in setting.rows:
        x = random((rows, setting.embed), 1)
        matrix = random((setting.embed, 3 * setting.embed), 2)
        wanted = jnp.dot(*(a.astype(jnp.float32) for a in (x, matrix)), precision="highest")
        call = jax.jit(lambda x, m: skinny_matmul(x, m, **how)[0])
        repeats(report, "products", rows, functools.partial(call, x, matrix), wanted, launches)
        (values,), (scale,) = in_int8([matrix])
        exact = values * scale
        wanted = jnp.dot(x.astype(jnp.float32), exact, precision="highest")
        call = jax.jit(lambda x, m, s: skinny_matmul(x, m, scales=[s[0]], **how)[0])
        run = functools.partial(call, x, values, scale)
        repeats(report, "products", rows, run, wanted, launches, weights="int8")

        weights, matrices = weights_of(setting, rows, 1)[0], matrices_of(setting, 1)
        unread = np.flatnonzero(np.asarray(weights).sum(0) == 0)
        spoilt = [m[0].at[unread].set(jnp.nan) if unread.size else m[0] for m in matrices]
        clean = [m[0].astype(jnp.float32) for m in matrices]
        wanted = exact_mixture(x.astype(jnp.float32), weights, *clean)
        call = jax.jit(lambda *a: expert_mixture(*a, **how))
        run = functools.partial(call, x, weights, *spoilt)
        repeats(report, "experts", rows, run, wanted, launches)
        values, scales = in_int8([m[0] for m in matrices])
        clean = [v * s for v, s in zip(values, scales, strict=True)]
        wanted = exact_mixture(x.astype(jnp.float32), weights, *clean)
        spoilt = [s.at[unread].set(jnp.nan) if unread.size else s for s in scales]
        call = jax.jit(lambda s, *a: expert_mixture(*a, scales=s, **how))
        run = functools.partial(call, spoilt, x, weights, *values)
        repeats(report, "experts", rows, run, wanted, launches, weights="int8")

        q, k, v = (random((rows, setting.heads, setting.head_dim), 3 + i) for i in range(3))
        shape = (2, rows, setting.heads, setting.head_dim, setting.head_dim)
        states, slopes = random(shape, 7, jnp.float32), jnp.geomspace(1e-5, 1.0, setting.heads)
        one = [a.astype(jnp.float32) for a in (q, k, v)]
        wanted = lightning_decode_step(*one, slopes, states[1], implementation="xla")[0]
        call = jax.jit(lambda *a: lightning_decode_step(*a, layer=1, **how)[0])
        run = functools.partial(call, q, k, v, slopes, states.at[0].set(jnp.nan))
        repeats(report, "states", rows, run, wanted, launches)


def exact_mixture(x, weights, gate, up, down):
    dot = functools.partial(jnp.einsum, precision="highest")
    hidden = jax.nn.silu(dot("nd,edf->enf", x, gate)) * dot("nd,edf->enf", x, up)
    return dot("ne,enf,efd->nd", weights, hidden, down)


def timed(report: Report, setting: Setting, step: Any, carry: Any, layers: Any, size: float,
          bandwidth: float, **about: Any) -> None:  # fmt: skip
    """A row: a layer's share of all of them one after the other, and of its bytes' time."""

    @functools.partial(jax.jit, compiler_options=graphs.BETWEEN_CONDITIONALS)
    def run(carry, layers):
        for layer in layers:
            carry = step(carry, layer)
        return carry

    # Arrays of their own: what is cut out of a stacked one may be copied before it is read.
    layers = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(setting.layers)]
    us = 1e3 * milliseconds(run, carry, layers) / setting.layers
    report.add(**about, us=us, GBps=size / us / 1e3, of_floor=size / us / 1e3 / bandwidth)


def products(report: Report, setting: Setting, bandwidth: float) -> None:
    inner = setting.heads * setting.head_dim
    for name, widths in (("qkv and gate", (3 * inner, inner)), ("out", (setting.embed,))):
        matrices = [
            random((setting.layers, setting.embed, n), i, jnp.bfloat16, setting.embed**-0.5)
            for i, n in enumerate(widths)
        ]
        for rows in setting.rows:
            for implementation in dict.fromkeys((setting.implementation, "xla")):

                def step(x, layer, implementation=implementation):
                    results = skinny_matmul(x, *layer, implementation=implementation)
                    # All columns are read: XLA would leave out the others.
                    joined = jnp.concatenate(results, axis=1).reshape(x.shape[0], -1, x.shape[1])
                    return jnp.sum(joined, axis=1).astype(x.dtype)

                x = random((rows, setting.embed), 1)
                size = sum(m.nbytes for m in matrices) / setting.layers
                timed(report, setting, step, x, matrices, size, bandwidth, products=name,
                      rows=rows, implementation=implementation)  # fmt: skip


def experts(report: Report, setting: Setting, bandwidth: float) -> None:
    matrices = matrices_of(setting, setting.layers)
    for rows in setting.rows:
        weights = weights_of(setting, rows, setting.layers)

        def step(x, layer):
            out = expert_mixture(x, *layer, implementation=setting.implementation)
            return x + (0.1 * out).astype(x.dtype)

        chosen = chosen_of(weights)
        size = chosen * sum(m.nbytes for m in matrices) / setting.layers
        x = random((rows, setting.embed), 1)
        timed(report, setting, step, x, (weights, *matrices), size, bandwidth,
              experts=chosen * setting.experts, rows=rows)  # fmt: skip


def int8(report: Report, setting: Setting, bandwidth: float) -> None:
    inner, how = setting.heads * setting.head_dim, {"implementation": setting.implementation}
    wide = random((setting.layers, setting.embed, 3 * inner), 1)
    held, scale = in_int8([wide])
    matrices, scales = in_int8(matrices_of(setting, setting.layers))
    for rows in setting.rows:
        x, weights = random((rows, setting.embed), 1), weights_of(setting, rows, setting.layers)

        def product(x, layer):
            (out,) = skinny_matmul(x, layer[0], scales=[layer[1][0]], **how)
            return jnp.sum(out.reshape(x.shape[0], -1, x.shape[1]), axis=1).astype(x.dtype)

        timed(report, setting, product, x, (*held, *scale), held[0].nbytes / setting.layers,
              bandwidth, products="qkv", weights="int8", rows=rows, **how)  # fmt: skip

        def mixture(x, layer):
            weights, matrices, scales = layer
            out = expert_mixture(x, weights, *matrices, scales=scales, **how)
            return x + (0.1 * out).astype(x.dtype)

        chosen = chosen_of(weights)
        size = chosen * sum(m.nbytes for m in matrices) / setting.layers
        timed(report, setting, mixture, x, (weights, matrices, scales), size, bandwidth,
              experts=chosen * setting.experts, weights="int8", rows=rows)  # fmt: skip


def states(report: Report, setting: Setting, bandwidth: float) -> None:
    for rows in setting.rows:
        shape = (setting.layers, rows, setting.heads, setting.head_dim, setting.head_dim)
        held, slopes = jnp.zeros(shape, jnp.float32), jnp.full(setting.heads, 0.1)

        def step(carry, layer, slopes=slopes):
            x, held = carry
            out, held = lightning_decode_step(
                x, x, x, slopes, held, layer=layer, implementation=setting.implementation
            )
            return 1e-3 * out, held

        x = random((rows, setting.heads, setting.head_dim), 1)
        layers = jnp.arange(setting.layers)
        timed(report, setting, step, (x, held), layers, 2 * held.nbytes / setting.layers,
              bandwidth, states=rows)  # fmt: skip


PARTS = dict(check=check, products=products, experts=experts, int8=int8, states=states)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--budget", type=float, default=120, help="seconds")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="everything, by XLA")
    args = parser.parse_args(arguments)
    report, setting = Report(args.budget, args.json), TINY if args.tiny else FULL
    bandwidth = copy_bandwidth(setting.copied)
    report.add(copy_GBs=bandwidth)
    for name in args.only.split(","):
        part: Any = PARTS[name]
        rate = () if part is check else (bandwidth,)
        report.attempt(name, functools.partial(part, report, setting, *rate))
    report.table()


if __name__ == "__main__":
    main()
