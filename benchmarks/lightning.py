"""Lightning attention: ours, flash-linear-attention and the memory floor, in one run.

    python benchmarks/lightning.py [--json FILE] [--budget SECONDS] [--only check,speed,...]

Prints milliseconds, then relative errors. The floor is the bytes an operation must move at
the copy bandwidth of the same run: 4 tensors forward, 11 forward and backward.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, copy_bandwidth, matmul_rate, milliseconds  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lightning_attention, lightning_decode_step

DIM = 128
SHAPES = [(4, 16384, 64), (1, 65536, 64), (1, 65536, 8)]
FORWARD_TENSORS, BOTH_TENSORS = 4, 11


def slopes(heads: int) -> jax.Array:
    return jnp.asarray(2.0 ** (-8.0 * np.arange(1, heads + 1) / heads), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def random(shape: tuple[int, ...], seed: int) -> jax.Array:
    return (0.3 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(jnp.bfloat16)


def documents(batch: int, length: int, mean: int) -> jax.Array:
    """Segment ids of packed documents of this mean length."""
    rng = np.random.default_rng(1)
    cuts = np.sort(rng.integers(1, length, length // mean))
    ids = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    return jnp.asarray(np.broadcast_to(ids, (batch, length)), jnp.int32)


def both(function):
    """Forward and backward of function(q, k, v) -> (out, state), the state unused."""

    def run(q, k, v, grad):
        out, pull = jax.vjp(lambda *x: function(*x)[0], q, k, v)
        return out, *pull(grad)

    return jax.jit(run)


def relative(ours: jax.Array, truth: jax.Array) -> float:
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


def check(report: Report, implementation: str, only: str) -> None:
    """Everything against the same in fp32 by the XLA form, and bit-identical reruns."""
    names = ("out", "state", "dq", "dk", "dv", "d_initial")
    cases = {
        "plain": dict(shape=(2, 1024, 80, 128)),
        "split": dict(shape=(1, 1024, 64, 128)),
        "segments": dict(shape=(1, 8192, 4, 128)),
        "segments in pieces": dict(shape=(1, 262144, 4, 128)),
        "documents in pieces": dict(shape=(1, 262144, 4, 128), mean=20000, padded=True),
        "state of the end": dict(shape=(1, 16384, 80, 128)),
        "odd length": dict(shape=(2, 1001, 4, 128)),
        "documents": dict(shape=(2, 1000, 80, 128), mean=90),
        "documents in segments": dict(shape=(1, 9000, 4, 128), mean=900, padded=True),
        "padding": dict(shape=(2, 1000, 4, 128), mean=300, padded=True),
        "head size 64": dict(shape=(2, 1024, 80, 64)),
        "head size 96": dict(shape=(1, 512, 4, 96)),
        "head size 256": dict(shape=(1, 512, 4, 256)),
        "T=1": dict(shape=(2, 1, 4, 128)),
    }
    for name, case in cases.items():
        if only and name not in only.split(","):
            continue

        def run(case=case, name=name):
            batch, length, heads, dim = case["shape"]
            q, k, v, grad = (random(case["shape"], 20 + i) for i in range(4))
            state, grad_state = (
                jax.random.normal(jax.random.key(50 + i), (batch, heads, dim, dim))
                for i in range(2)
            )
            ids = documents(batch, length, case["mean"]) if "mean" in case else None
            if "padded" in case:
                rng = np.random.default_rng(3)
                holes = rng.random((batch, length)) < 0.05
                holes[:, : length // 9] |= rng.random((batch, 1)) < 0.7
                holes[:, -length // 7 :] = True
                ids = jnp.where(holes, 0, ids)

            def values(dtype, choice):
                def attend(q, k, v, state):
                    return lightning_attention(
                        q,
                        k,
                        v,
                        slopes(heads) if heads > 4 else jnp.array([0.9, 0.3, 0.03, 0.004]),
                        initial_state=state,
                        segment_ids=ids,
                        implementation=choice,
                    )

                def everything(q, k, v, state, grad, grad_state):
                    outs, pull = jax.vjp(attend, q, k, v, state)
                    return *outs, *pull((grad.astype(dtype), grad_state))

                arrays = (x.astype(dtype) for x in (q, k, v))
                # Tuning the truth's products would take a minute a case.
                call = jax.jit(everything, compiler_options={"xla_gpu_autotune_level": 0})
                return call(*arrays, state, grad, grad_state)

            truth = values(jnp.float32, "xla")
            ours = values(jnp.bfloat16, implementation)
            same = all(
                bool(jnp.array_equal(x, y))
                for x, y in zip(ours, values(jnp.bfloat16, implementation), strict=True)
            )
            errors = {n: relative(a, b) for n, a, b in zip(names, ours, truth, strict=True)}
            report.add(check=name, **errors, identical=same)

        report.attempt(name, run)


def repeated(report: Report, implementation: str) -> None:
    """100 launches of one backward pass, bit for bit."""
    q, k, v, grad = (random((2, 2048, 66, DIM), i) for i in range(4))
    ids = documents(2, 2048, 200)
    call = both(
        lambda q, k, v: lightning_attention(
            q, k, v, slopes(66), segment_ids=ids, implementation=implementation
        )
    )
    first = call(q, k, v, grad)
    same = sum(
        all(bool(jnp.array_equal(x, y)) for x, y in zip(first, call(q, k, v, grad), strict=True))
        for _ in range(100)
    )
    report.add(check="100 launches identical", same=same)


def long_state(report: Report, implementation: str) -> None:
    """1M tokens, the slowest head of MiniMax-Text-01, its state against float64."""
    length, slope = 1 << 20, float(2.0**-8 * (1 - 78 / 79 + 1e-5))
    q, k, v = (random((1, length, 1, DIM), i) for i in range(3))
    weight = np.exp(-slope * np.arange(length - 1, -1, -1.0))[:, None]
    k64, v64 = (np.asarray(x, np.float64)[0, :, 0] for x in (k, v))
    truth = (k64 * weight).T @ v64
    for name, dtype, choice in (
        ("bf16", jnp.bfloat16, implementation),
        ("bf16 xla", jnp.bfloat16, "xla"),
        ("fp32 xla", jnp.float32, "xla"),
    ):
        arrays = (x.astype(dtype) for x in (q, k, v))
        call = jax.jit(
            lambda q, k, v, choice=choice: lightning_attention(
                q, k, v, jnp.full((1,), slope, jnp.float32), implementation=choice
            )[1]
        )
        report.add(
            check=f"state after 1M tokens, {name}", error=relative(call(*arrays)[0, 0], truth)
        )


def speed(report: Report, implementation: str, bandwidth: float) -> None:
    for batch, length, heads in SHAPES:
        tensor = batch * length * heads * DIM * 2 / bandwidth / 1e6  # ms

        def run(batch=batch, length=length, heads=heads, tensor=tensor):
            q, k, v, grad = (random((batch, length, heads, DIM), i) for i in range(4))
            call = functools.partial(
                lightning_attention, decay_slopes=slopes(heads), implementation=implementation
            )
            shape = f"B{batch} T{length} H{heads}"
            floor = FORWARD_TENSORS * tensor
            # Output and final state are launches of their own; XLA drops the one nobody uses.
            ms = milliseconds(jax.jit(lambda q, k, v: call(q, k, v)[0]), q, k, v)
            report.add(forward=shape, ms=ms, floor_ms=floor, times_floor=ms / floor)
            ms = milliseconds(jax.jit(lambda q, k, v: call(q, k, v)), q, k, v)
            report.add(forward_and_state=shape, ms=ms, floor_ms=floor, times_floor=ms / floor)
            ms = milliseconds(both(lambda q, k, v: call(q, k, v)), q, k, v, grad)
            floor = BOTH_TENSORS * tensor
            report.add(forward_backward=shape, ms=ms, floor_ms=floor, times_floor=ms / floor)

        report.attempt(f"{batch, length, heads}", run)


def packed(report: Report, implementation: str) -> None:
    batch, length, heads = SHAPES[0]
    q, k, v, grad = (random((batch, length, heads, DIM), i) for i in range(4))
    plain = None
    for mean in (0, 4096, 1024, 512):
        ids = documents(batch, length, mean) if mean else None
        call = both(
            lambda q, k, v, ids=ids: lightning_attention(
                q, k, v, slopes(heads), segment_ids=ids, implementation=implementation
            )
        )
        ms = milliseconds(call, q, k, v, grad)
        plain = plain or ms
        report.add(packed_forward_backward=mean or "no ids", ms=ms, times_plain=ms / plain)


def million(report: Report, implementation: str, bandwidth: float) -> None:
    shape = (1, 1 << 20, 64, DIM)
    q, k, v = (random(shape, i) for i in range(3))
    call = functools.partial(
        lightning_attention, decay_slopes=slopes(64), implementation=implementation
    )
    ms = milliseconds(jax.jit(lambda q, k, v: call(q, k, v)[0]), q, k, v)
    floor = FORWARD_TENSORS * int(np.prod(shape)) * 2 / bandwidth / 1e6
    report.add(forward="B1 T1048576 H64", ms=ms, floor_ms=floor, times_floor=ms / floor)


def decode(report: Report, bandwidth: float) -> None:
    """One token of many rows; the state is donated, so each step reads and writes it once."""
    step, decay = jax.jit(lightning_decode_step, donate_argnums=(4,)), slopes(64)
    for batch in (64, 256):
        q, k, v = (random((batch, 64, DIM), i) for i in range(3))
        states = [jnp.zeros((batch, 64, DIM, DIM), jnp.float32)]

        def run(q=q, k=k, v=v, states=states):
            out, states[0] = step(q, k, v, decay, states[0])
            return out

        floor = 2 * states[0].nbytes / bandwidth / 1e6
        ms = milliseconds(run)
        report.add(decode_rows=batch, us=1e3 * ms, floor_us=1e3 * floor, times_floor=ms / floor)


def peers(report: Report) -> None:
    """flash-linear-attention's chunked kernel on the same shapes, forward and with backward."""
    prune_autotuner()
    import torch
    from fla.ops.simple_gla import chunk_simple_gla
    from triton.testing import do_bench

    for batch, length, heads in SHAPES:

        def run(batch=batch, length=length, heads=heads):
            shape = (batch, length, heads, DIM)
            q, k, v = (
                (0.3 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)).requires_grad_()
                for _ in range(3)
            )
            decay = -torch.tensor(np.asarray(slopes(heads)), device="cuda")
            grad = torch.randn_like(q)

            def forward():
                return chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0, chunk_size=64)[0]

            name = f"B{batch} T{length} H{heads}"
            with torch.no_grad():
                ms = do_bench(forward, warmup=20, rep=60, return_mode="median")
            report.add(fla_forward=name, ms=ms)
            ms = do_bench(
                lambda: torch.autograd.grad(forward(), (q, k, v), grad),
                warmup=20,
                rep=60,
                return_mode="median",
            )
            report.add(fla_forward_backward=name, ms=ms)
            torch.cuda.empty_cache()

        report.attempt(f"fla {batch, length, heads}", run, seconds=20)


def prune_autotuner() -> None:
    """Keep the likely configurations of Triton's autotuners; all of them take minutes."""
    from triton.runtime import autotuner

    original = autotuner.Autotuner.__init__

    def pruned(self, fn, names, configs, *args, **options):
        likely = [
            c
            for c in configs
            if c.num_stages in (2, 3)
            and c.num_warps in (2, 4)
            and all(c.kwargs.get(x, 64) >= 64 for x in ("BK", "BV"))
        ]
        original(self, fn, names, likely or configs, *args, **options)

    autotuner.Autotuner.__init__ = pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--budget", type=float, default=500, help="seconds")
    parser.add_argument("--implementation", default="pallas_gpu")
    parser.add_argument("--only", default="speed,peers,packed,decode,million,repeated,long,check")
    parser.add_argument("--cases", default="", help="which cases to check; all when empty")
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    report = Report(options.budget, options.json)
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    report.add(copy_GBps=bandwidth, matmul_TFLOPs=rate)
    ours = options.implementation
    steps = {
        "speed": lambda: speed(report, ours, bandwidth),
        "peers": lambda: peers(report),
        "packed": lambda: packed(report, ours),
        "decode": lambda: decode(report, bandwidth),
        "million": lambda: million(report, ours, bandwidth),
        "repeated": lambda: repeated(report, ours),
        "long": lambda: long_state(report, ours),
        "check": lambda: check(report, ours, options.cases),
    }
    for name, step in steps.items():
        if name in wanted:
            report.attempt(name, step)
    report.table()


if __name__ == "__main__":
    main()
