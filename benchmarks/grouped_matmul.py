"""The experts' grouped matmul: ours, torch._grouped_mm and a dense product of equal FLOPs.

    python benchmarks/grouped_matmul.py [--json FILE] [--budget SECONDS] [--only check,speed,...]

    check   relative error of every product against fp32, awkward groups, foreign NaNs, reruns
    speed   forward, both backward products and all together, balanced and skewed groups
    peers   torch._grouped_mm, jax's example kernel and the XLA form on the first shape
    layer   the rest of the experts' layer: gather, SwiGLU, weighted sum
    sweep   tilings of each product on the first shape; only when asked for

`of_dense` is the fraction of the rate of a dense product of the same shape in the same run.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, milliseconds  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import torch_timing
from pallas_kernels.grouped_matmul import gpu_hopper, reference, xla

GROUPS = 32
SHAPES = [(65536, 6144, 9216), (65536, 9216, 6144), (16384, 6144, 9216)]
PRODUCTS = ("forward", "grad_x", "grad_w")
Config = gpu_hopper.Config

SWEEP = [
    Config(*tile, slots=slots, band=band)
    for tile, slots in (((128, 256), 4), ((256, 128), 4), ((128, 192), 4), ((128, 256), 3))
    for band in (8, 16)
]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)).astype(
        jnp.bfloat16
    )


def sizes_of(kind: str, rows: int, groups: int = GROUPS) -> jax.Array:
    """Balanced groups, or shares drawn from a Dirichlet(4) distribution."""
    if kind == "balanced":
        return jnp.full((groups,), rows // groups, jnp.int32)
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(groups, 4.0))), jnp.int32)


def product(name: str, config: Config):
    """One of the three products as a jitted function of (x, w, grad, sizes)."""
    hopper = gpu_hopper

    def run(x, w, grad, sizes):
        if name == "forward":
            return hopper.rows_times_matrices(x, w, sizes, config=config)
        if name == "grad_x":
            return hopper.rows_times_matrices(grad, w, sizes, config=config, transposed=True)
        return hopper.rows_times_rows(x, grad, sizes, config=config)

    return jax.jit(run)


def all_products(function):
    """Forward and both gradients of function(x, w, sizes)."""

    def run(x, w, grad, sizes):
        out, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
        return out, *pull(grad)

    return jax.jit(run)


def relative(ours, truth) -> float:
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


def operands(rows: int, inner: int, outer: int, groups: int = GROUPS):
    return (
        random((rows, inner), 0),
        random((groups, inner, outer), 1, 0.02),
        random((rows, outer), 2),
    )


def check(report: Report) -> None:
    truth = all_products(reference.grouped_matmul)
    ours = all_products(gpu_hopper.grouped_matmul)
    rng = np.random.default_rng(0)
    groups = 8
    shares = rng.dirichlet(np.full(groups, 1.0))
    cases = {
        "ragged": (4096, 512, 768, rng.multinomial(4096, shares)),
        "rows past the end": (4096, 512, 768, rng.multinomial(3319, shares)),
        "tiny groups": (4096, 512, 768, [1, 0, 7, 63, 65, 0, 129, 3]),
        "one group": (4096, 512, 768, [0, 0, 4096, 0, 0, 0, 0, 0]),
        "no group": (4096, 512, 768, np.zeros(groups)),
        "narrow": (1003, 128, 128, rng.multinomial(1003, shares)),
        "narrow and wide": (1003, 128, 384, rng.multinomial(1003, shares)),
        "odd tiles": (1003, 640, 896, rng.multinomial(1003, shares)),
        "few rows": (13, 6144, 9216, [3, 0, 1, 0, 0, 7, 1, 1]),
    }
    for name, (rows, inner, outer, sizes) in cases.items():
        x, w, grad = operands(rows, inner, outer, groups)
        sizes = jnp.asarray(np.asarray(sizes), jnp.int32)
        total = int(sizes.sum())
        # What lies past the last group must not matter, whatever it is.
        found = ours(x.at[total:].set(jnp.nan), w, grad.at[total:].set(jnp.nan), sizes)
        wanted = truth(*(a.astype(jnp.float32) for a in (x, w, grad)), sizes)
        errors = [
            relative(a, b) if total else float(jnp.abs(a).max())
            for a, b in zip(found, wanted, strict=True)
        ]
        ok = max(errors) <= 4e-3 and np.isfinite(errors).all()
        row = dict(zip(PRODUCTS, errors, strict=True))
        report.add(check=name, rows=rows, **row, verdict="ok" if ok else "WRONG")
    same_twice(report)


def same_twice(report: Report) -> None:
    """At full size: bit-identical reruns, and rows of the result against fp32."""
    rows, inner, outer = SHAPES[0]
    x, w, grad = operands(rows, inner, outer)
    sizes = sizes_of("skewed", rows)
    ends = np.cumsum(np.asarray(sizes))
    # The rows around every border and some within; in grad_w, all of one small and one large group.
    chosen = np.unique(np.clip(np.add.outer(ends, np.arange(-5, 5)).ravel(), 0, rows - 1))
    group = np.searchsorted(ends, chosen, side="right")
    for name in PRODUCTS:
        run = product(name, gpu_hopper.DEFAULT)
        first = run(x, w, grad, sizes)
        same = all(bool(jnp.array_equal(first, run(x, w, grad, sizes))) for _ in range(3))
        errors = []
        for g in range(GROUPS):
            if name == "grad_w":
                mine = slice(int(ends[g] - sizes[g]), int(ends[g]))
                truth = fp32_product(x[mine, :512].T, grad[mine, :512])
                errors.append(relative(first[g, :512, :512], truth))
            else:
                mine = chosen[group == g]
                left, right = (x, w[g]) if name == "forward" else (grad, w[g].T)
                errors.append(relative(first[mine], fp32_product(left[mine], right)))
        report.add(check="full size", product=name, reruns_identical=same, worst=max(errors))


def fp32_product(a, b):
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def describe(config: Config) -> str:
    return f"{config.rows}x{config.columns}x{config.depth} s{config.slots} b{config.band}"


@functools.cache
def dense_rate(name: str, rows: int, inner: int, outer: int) -> float:
    """TFLOP/s of the dense product of the same shape, by cuBLAS."""
    x, w, grad = operands(rows, inner, outer, 1)
    run = {
        "forward": lambda x, w, grad: x @ w[0],
        "grad_x": lambda x, w, grad: grad @ w[0].T,
        "grad_w": lambda x, w, grad: x.T @ grad,
    }[name]
    return 2e-9 * rows * inner * outer / milliseconds(jax.jit(run), x, w, grad, batch_ms=150)


def rate(report: Report, shape, name: str, ms: float, **row) -> None:
    flops = 2e-9 * np.prod(np.float64(shape))
    if name == "all":
        dense = 3 * flops / sum(flops / dense_rate(p, *shape) for p in PRODUCTS)
        flops *= 3
    else:
        dense = dense_rate(name, *shape)
    report.add(
        rows=shape[0],
        inner=shape[1],
        outer=shape[2],
        product=name,
        **row,
        ms=ms,
        tflops=flops / ms,
        dense=dense,
        of_dense=flops / ms / dense,
    )


def speed(report: Report) -> None:
    for shape in SHAPES:
        x, w, grad = operands(*shape)
        for kind in ("balanced", "skewed"):
            sizes = sizes_of(kind, shape[0])
            for name in PRODUCTS:

                def one(name=name, kind=kind, sizes=sizes, shape=shape, data=(x, w, grad)):
                    run = product(name, gpu_hopper.DEFAULT)
                    ms = milliseconds(run, *data, sizes, batch_ms=150)
                    rate(report, shape, name, ms, who="ours", groups=kind)

                report.attempt(f"{name} {shape}", one)

        def together(sizes=sizes, shape=shape, data=(x, w, grad)):
            ms = milliseconds(all_products(gpu_hopper.grouped_matmul), *data, sizes, batch_ms=150)
            rate(report, shape, "all", ms, who="ours", groups="skewed")

        report.attempt(f"all {shape}", together)


def peers(report: Report) -> None:
    shape = SHAPES[0]
    for kind in ("balanced", "skewed"):
        sizes = sizes_of(kind, shape[0])
        if torch_timing.available():
            report.attempt("torch", functools.partial(torch_peer, report, shape, kind, sizes))
        report.attempt("example", functools.partial(example_peer, report, shape, kind, sizes))

    def plain():
        x, w, grad = operands(*shape)
        ms = milliseconds(all_products(xla.grouped_matmul), x, w, grad, sizes_of(kind, shape[0]))
        rate(report, shape, "all", ms, who="ours, xla form", groups=kind)

    report.attempt("xla", plain, seconds=30)


def torch_peer(report: Report, shape, kind: str, sizes) -> None:
    torch = torch_timing.torch
    rows, inner, outer = shape
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, w, grad = make(rows, inner), make(GROUPS, inner, outer) * 0.02, make(rows, outer)
    ends = torch.tensor(np.cumsum(np.asarray(sizes)), dtype=torch.int32, device="cuda")
    runs = {
        "forward": lambda: torch._grouped_mm(x, w, offs=ends),
        "grad_x": lambda: torch._grouped_mm(grad, w.transpose(1, 2), offs=ends),
        "grad_w": lambda: torch._grouped_mm(x.t(), grad, offs=ends),
    }
    for name, run in runs.items():

        def one(name=name, run=run):
            rate(report, shape, name, torch_timing.milliseconds(run), who="torch", groups=kind)

        report.attempt(f"torch {name}", one)
    del x, w, grad
    torch.cuda.empty_cache()


def example_peer(report: Report, shape, kind: str, sizes) -> None:
    """The example kernel that jax ships, with the best of the tilings tried before."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    tiling = dict(block_m=128, block_n=192, block_k=64, max_concurrent_steps=4, grid_block_n=8)
    run = jax.jit(lambda x, w, sizes: ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, **tiling))
    x, w, _ = operands(*shape)
    rate(report, shape, "forward", milliseconds(run, x, w, sizes), who="jax example", groups=kind)


def sweep(report: Report) -> None:
    shape = SHAPES[0]
    x, w, grad = operands(*shape)
    sizes = sizes_of("balanced", shape[0])
    for config in SWEEP:
        for name in PRODUCTS:

            def one(name=name, config=config):
                ms = milliseconds(product(name, config), x, w, grad, sizes, batch_ms=100)
                rate(report, shape, name, ms, who=describe(config))

            report.attempt(f"{name} {config}", one)


def layer(report: Report) -> None:
    """What the experts do beside their products: gather, SwiGLU, weighted sum of the choices."""
    tokens, per_token, (_, inner, outer) = 32768, 2, SHAPES[0]
    experts = jax.random.randint(jax.random.key(5), (tokens * per_token,), 0, GROUPS)
    order = jnp.argsort(experts)
    x, gate, up = random((tokens, inner), 0), *(random((2 * tokens, outer), i) for i in (1, 2))
    weights = jnp.full((tokens, per_token, 1), 0.5)
    runs = {
        "gather": lambda x, order, *_: x[order // per_token],
        "swiglu": lambda x, order, gate, up, *_: (
            jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
        ),
        "combine": lambda x, order, gate, up, rows, weights: jnp.sum(
            rows[jnp.argsort(order)].reshape(tokens, per_token, inner).astype(jnp.float32)
            * weights,
            axis=1,
        ).astype(x.dtype),
    }
    rows = random((tokens * per_token, inner), 4)
    for name, run in runs.items():
        ms = milliseconds(jax.jit(run), x, order, gate, up, rows, weights)
        report.add(beside_the_products=name, tokens=tokens, experts_per_token=per_token, ms=ms)


PARTS = dict(check=check, layer=layer, speed=speed, peers=peers, sweep=sweep)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--budget", type=float, default=200, help="seconds")
    parser.add_argument("--only", default="check,layer,speed,peers")
    args = parser.parse_args()
    report = Report(args.budget, args.json)
    for name, part in PARTS.items():
        if name in args.only.split(","):
            report.attempt(name, functools.partial(part, report))
    report.table()


if __name__ == "__main__":
    main()
