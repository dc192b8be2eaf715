"""Softmax attention: cuDNN through jax as we call it, torch's SDPA, and our XLA form.

    python benchmarks/attention.py [--json FILE] [--budget SECONDS] [--only check,speed,...]

    check   relative errors against fp32: output, log-sum-exp, gradients, padding, blocks of keys
    speed   forward, and forward with backward: causal, 64 query heads, 8 key heads of 128
    peers   torch's SDPA with cuDNN and with FlashAttention-2 on the same shapes
    packed  documents of mean length 1024, borders traced
    blocks  one block of ring attention: forward with log-sum-exp, and its backward pass
    xla     the XLA form on the first shape

TFLOP/s count the causal half of the matrix: 2 T^2 H D forward, 7 T^2 H D with backward, a batch
row. `of_dense` is the fraction of the rate of an 8192^3 bf16 product in the same run.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, matmul_rate, milliseconds  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import torch_timing
from pallas_kernels.softmax_attention import gpu_cudnn, reference, xla

HEADS, KV_HEADS, DIM = 64, 8, 128
SCALE = 1 / math.sqrt(DIM)
SHAPES = [(16, 4096), (8, 8192), (4, 16384), (1, 65536)]
BLOCK = (1, 16384)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random(shape: tuple[int, ...], seed: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def operands(batch: int, length: int, heads: int = HEADS, kv_heads: int = KV_HEADS):
    """Random q, k, v and gradient of the output."""
    q, grad = (random((batch, length, heads, DIM), seed) for seed in (0, 3))
    k, v = (random((batch, length, kv_heads, DIM), seed) for seed in (1, 2))
    return q, k, v, grad


def both(function):
    """Forward and backward of function(q, k, v) -> (out, lse), the log-sum-exp unused."""

    def run(q, k, v, grad):
        out, pull = jax.vjp(lambda *x: function(*x)[0], q, k, v)
        return out, *pull(grad)

    return jax.jit(run)


def ours(q, k, v, ids=None, *, causal=True):
    return gpu_cudnn.softmax_attention(q, k, v, ids, ids, 0, causal=causal, scale=SCALE)


def plain(function, causal=True):
    """An implementation that wants arrays for every argument, as function(q, k, v, ids)."""

    def run(q, k, v, ids=None):
        q_ids = jnp.ones(q.shape[:2], jnp.int32) if ids is None else jnp.asarray(ids)
        kv_ids = jnp.ones(k.shape[:2], jnp.int32) if ids is None else q_ids
        return function(q, k, v, q_ids, kv_ids, jnp.int32(0), causal=causal, scale=SCALE)

    return run


def packed_ids(batch: int, length: int, mean: int) -> jax.Array:
    """Ids of packed documents with lengths around `mean`, and some padding at the end."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(mean // 2, mean * 3 // 2, (batch, 2 * length // mean + 8))
    ends = np.cumsum(lengths, axis=1)
    ids = 1 + (np.arange(length) >= ends[:, :, None]).sum(axis=1)
    ids[:, length - length // 64 :] = 0
    return jnp.asarray(ids, jnp.int32)


def check_packed(report: Report) -> None:
    """Borders that are traced; ids that cuDNN cannot take must give the same by the XLA form."""
    q, k, v, grad = operands(2, 1024, 8, 2)
    wide = [x.astype(jnp.float32) for x in (q, k, v, grad)]
    packed = np.asarray(packed_ids(2, 1024, 200))
    border = np.roll(packed, -7, axis=1) != packed  # the last tokens of each document
    cases = dict(
        packed=packed,
        gaps=np.where(border, 0, packed),
        one=np.ones_like(packed),
        holes=np.where(np.arange(1024) % 97 < 5, 0, packed),  # inside documents: not by cuDNN
        many=np.broadcast_to(1 + np.arange(1024) // 11, (2, 1024)),  # nor these
        falling=np.where(packed > 0, 20 - packed, 0),
    )
    ours_packed = jax.jit(ours)
    pulled = jax.jit(lambda *x: both(lambda *y: ours(*y, x[4]))(*x[:4]))
    for name, ids in cases.items():
        ids = jnp.asarray(ids, jnp.int32)
        seen = ours_packed(q, k, v, ids)
        truth = functools.partial(plain(reference.softmax_attention), ids=ids)
        wanted = truth(*wide[:3])
        real = np.asarray(ids) > 0
        errors = dict(
            out=relative(seen[0], wanted[0]),
            lse=relative(np.asarray(seen[1])[real], np.asarray(wanted[1])[real]),
            padding=float(jnp.abs(jnp.where(ids[..., None, None] == 0, seen[0], 0)).max()),
        )
        found, expected = pulled(q, k, v, grad, ids), both(truth)(*wide)
        for what, a, b in zip(("dq", "dk", "dv"), found[1:], expected[1:], strict=True):
            errors[what] = relative(a, b)
        report.add(check=f"traced ids: {name}", **errors)


def relative(seen, wanted) -> float:
    seen, wanted = np.asarray(seen, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(seen - wanted) / np.linalg.norm(wanted))


def check(report: Report) -> None:
    q, k, v, grad = operands(2, 512, 8, 2)
    wide = [x.astype(jnp.float32) for x in (q, k, v, grad)]
    ids = np.ones((2, 512), np.int32)
    ids[1, 333:] = 0
    for name, causal, row_ids in (
        ("causal", True, None),
        ("all keys", False, None),
        ("padded", True, ids),
        ("padded, all keys", False, ids),
    ):
        seen = jax.jit(lambda *x, c=causal, i=row_ids: ours(*x, i, causal=c))(q, k, v)
        truth = functools.partial(plain(reference.softmax_attention, causal), ids=row_ids)
        wanted = truth(*wide[:3])
        real = np.ones((2, 512), bool) if row_ids is None else row_ids > 0
        errors = dict(
            out=relative(seen[0], wanted[0]),
            lse=relative(np.asarray(seen[1])[real], np.asarray(wanted[1])[real]),
        )
        if row_ids is not None:
            errors["padding_is_0"] = float(jnp.abs(seen[0][1, 333:]).max())
        found = both(lambda *x, c=causal, i=row_ids: ours(*x, i, causal=c))(q, k, v, grad)
        expected = both(truth)(*wide)
        for what, a, b in zip(("dq", "dk", "dv"), found[1:], expected[1:], strict=True):
            errors[what] = relative(a, b)
        report.add(check=name, **errors)
    check_packed(report)
    check_lse_gradient(report, q, k, v)
    check_blocks(report, q, k, v, grad, wide)


def check_lse_gradient(report: Report, q, k, v) -> None:
    weight = random(q.shape[:3], 9, jnp.float32)
    loss = lambda f, *x: jnp.sum(f(*x)[1] * weight)  # noqa: E731
    seen = jax.jit(jax.grad(functools.partial(loss, ours), (0, 1)))(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    truth = functools.partial(loss, plain(reference.softmax_attention))
    wanted = jax.grad(truth, (0, 1))(*wide)
    errors = [relative(a, b) for a, b in zip(seen, wanted, strict=True)]
    report.add(check="gradient of lse", dq=errors[0], dk=errors[1])


def check_blocks(report: Report, q, k, v, grad, wide) -> None:
    """Second half of the queries over two blocks of keys, merged: must equal one attention."""
    half = q.shape[1] // 2
    expected = both(plain(reference.softmax_attention))(
        *wide[:3], wide[3].at[:, :half].set(0)
    )  # only the second half's gradient
    queries, gradient = q[:, half:], grad[:, half:]
    blocks = [(k[:, :half], v[:, :half], False), (k[:, half:], v[:, half:], True)]
    parts = [ours(queries, keys, values, causal=causal) for keys, values, causal in blocks]
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    out = sum(o.astype(jnp.float32) * jnp.exp(part - lse)[..., None] for o, part in parts)
    out = out.astype(q.dtype)
    for name, module in (("cudnn", gpu_cudnn), ("xla", xla)):
        grads = []
        for keys, values, causal in blocks:
            ids = (None, None, 0)
            if module is xla:
                ones = jnp.ones(queries.shape[:2], jnp.int32)
                ids = (ones, ones, jnp.int32(0))
            arrays = (queries, keys, values, out, lse, gradient, *ids)
            grads.append(module.attention_block_backward(*arrays, causal=causal, scale=SCALE))
        dq = sum(g[0].astype(jnp.float32) for g in grads)
        dk, dv = (jnp.concatenate([g[i] for g in grads], axis=1) for i in (1, 2))
        report.add(
            check=f"blocks of keys, {name}",
            out=relative(out, expected[0][:, half:]),
            dq=relative(dq, expected[1][:, half:]),
            dk=relative(dk, expected[2]),
            dv=relative(dv, expected[3]),
        )


@functools.cache
def dense() -> float:
    return matmul_rate()


def rate(report: Report, shape, what: str, who: str, ms: float, causal: bool = True) -> None:
    batch, length = shape
    products = {"forward": 4, "fwd+bwd": 14, "backward": 10}[what]
    flops = products * batch * HEADS * length**2 * DIM * (0.5 if causal else 1) / 1e9
    report.add(
        batch=batch, length=length, what=what, who=who, ms=ms, tflops=flops / ms,
        of_dense=flops / ms / dense(),
    )  # fmt: skip


def speed(report: Report) -> None:
    for shape in SHAPES:
        q, k, v, grad = operands(*shape)

        def forward(shape=shape, data=(q, k, v)):
            rate(report, shape, "forward", "ours", milliseconds(jax.jit(ours), *data))

        def backward(shape=shape, data=(q, k, v, grad)):
            rate(report, shape, "fwd+bwd", "ours", milliseconds(both(ours), *data))

        report.attempt(f"forward {shape}", forward)
        report.attempt(f"fwd+bwd {shape}", backward)


def packed(report: Report) -> None:
    """Packed documents of mean length 1024 beside one sample a row; rates count whole rows."""
    for shape in SHAPES[1:3]:
        q, k, v, grad = operands(*shape)
        ids = packed_ids(*shape, 1024)

        def forward(shape=shape, data=(q, k, v, ids)):
            rate(report, shape, "forward", "ours, packed", milliseconds(jax.jit(ours), *data))

        def backward(shape=shape, data=(q, k, v, grad, ids)):
            run = jax.jit(lambda *x: both(lambda *y: ours(*y, x[4]))(*x[:4]))
            rate(report, shape, "fwd+bwd", "ours, packed", milliseconds(run, *data))

        report.attempt(f"packed forward {shape}", forward)
        report.attempt(f"packed fwd+bwd {shape}", backward)


def peers(report: Report) -> None:
    if not torch_timing.available():
        print("torch is not here: no peers", flush=True)
        return
    for shape in SHAPES:
        for who, backend in (
            ("torch cudnn", "CUDNN_ATTENTION"),
            ("torch flash", "FLASH_ATTENTION"),
        ):
            report.attempt(
                f"{who} {shape}", functools.partial(torch_peer, report, shape, who, backend)
            )


def torch_peer(report: Report, shape, who: str, backend: str) -> None:
    torch = torch_timing.torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    batch, length = shape
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q = make(batch, length, HEADS, DIM).transpose(1, 2).requires_grad_()
    k, v = (make(batch, length, KV_HEADS, DIM).transpose(1, 2).requires_grad_() for _ in range(2))
    grad = make(batch, length, HEADS, DIM).transpose(1, 2)

    def forward():
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def inference():
        with torch.no_grad():
            forward()

    def all_():
        torch.autograd.grad(forward(), (q, k, v), grad)

    with sdpa_kernel(getattr(SDPBackend, backend)):
        rate(report, shape, "forward", who, torch_timing.milliseconds(inference, batch_ms=60))
        rate(report, shape, "fwd+bwd", who, torch_timing.milliseconds(all_, batch_ms=60))
    del q, k, v, grad
    torch.cuda.empty_cache()


def blocks(report: Report) -> None:
    q, k, v, grad = operands(*BLOCK)
    for causal in (True, False):
        run = jax.jit(functools.partial(ours, causal=causal))
        who = "ours, with lse" + ("" if causal else ", all keys")
        rate(report, BLOCK, "forward", who, milliseconds(run, q, k, v), causal)
        out, lse = run(q, k, v)
        pull = jax.jit(
            lambda *x, c=causal: gpu_cudnn.attention_block_backward(
                *x, None, None, 0, causal=c, scale=SCALE
            )
        )
        ms = milliseconds(pull, q, k, v, out, lse, grad)
        rate(report, BLOCK, "backward", who.replace("with", "given"), ms, causal)


def xla_form(report: Report) -> None:
    shape = SHAPES[0]
    q, k, v, grad = operands(*shape)
    run = plain(xla.softmax_attention)
    rate(report, shape, "forward", "ours, xla form", milliseconds(jax.jit(run), q, k, v))
    rate(report, shape, "fwd+bwd", "ours, xla form", milliseconds(both(run), q, k, v, grad))


PARTS = dict(check=check, packed=packed, blocks=blocks, speed=speed, peers=peers, xla=xla_form)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--budget", type=float, default=200, help="seconds")
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    report = Report(args.budget, args.json)
    for name, part in PARTS.items():
        if name in args.only.split(","):
            report.attempt(name, functools.partial(part, report))
    report.table()


if __name__ == "__main__":
    main()
