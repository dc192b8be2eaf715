"""Products of few rows: both forms against float64, the kernel in jax's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import interpreted_hopper
from kernel_cases import FP32, check_close

from pallas_kernels import platform, skinny_matmul, skinny_matmul_supported
from pallas_kernels.skinny_matmul import gpu_hopper

# What the kernel does not copy of a block of 64 rows is NaN there, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


@pytest.fixture
def interpreted(monkeypatch):
    with interpreted_hopper(monkeypatch, cores=3, detect_races=False):
        yield


def operands(rows: int, inner: int, widths: tuple[int, ...], dtype):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, inner)), dtype)
    return x, [jnp.asarray(rng.standard_normal((inner, n)), dtype) for n in widths]


def in_int8(rows: int, inner: int, widths: tuple[int, ...]):
    """bf16 rows, int8 matrices with all values there are, and scales from 1e-4 to 1."""
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, inner)), jnp.bfloat16)
    matrices = [jnp.asarray(rng.integers(-128, 128, (inner, n)), jnp.int8) for n in widths]
    return x, matrices, [jnp.asarray(10 ** rng.uniform(-4, 0, n), jnp.float32) for n in widths]


def check_int8(results, x, matrices, scales) -> None:
    for result, matrix, scale in zip(results, matrices, scales, strict=True):
        assert result.dtype == jnp.float32
        product = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
        # Divided by the scale: else only columns with the largest would count.
        check_close(result / scale, product, FP32, "product")


def check(results, x, matrices) -> None:
    for i, (result, matrix) in enumerate(zip(results, matrices, strict=True)):
        assert result.dtype == jnp.float32
        truth = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
        check_close(result, truth, FP32, f"product {i}")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_xla_form(dtype):
    x, matrices = operands(3, 40, (24, 7), dtype)
    check(skinny_matmul(x, *matrices), x, matrices)


# One, two and six shares of the depth; rows that are and are not a multiple of 8; full rings.
@pytest.mark.parametrize(
    ("rows", "inner", "widths"),
    [(1, 64, (64,)), (3, 768, (64,)), (64, 384, (128, 64, 64)), (9, 128, (512,))],
)
def test_kernel(rows, inner, widths, interpreted):
    x, matrices = operands(rows, inner, widths, jnp.bfloat16)
    assert skinny_matmul_supported(x, *matrices)
    check(skinny_matmul(x, *matrices), x, matrices)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_xla_form_in_int8(dtype):
    x, matrices, scales = in_int8(3, 40, (24, 7))
    x = x.astype(dtype)
    check_int8(skinny_matmul(x, *matrices, scales=scales), x, matrices, scales)


@pytest.mark.parametrize(
    ("rows", "inner", "widths"), [(1, 64, (64,)), (64, 384, (128, 64, 64)), (9, 512, (192,))]
)
def test_kernel_in_int8(rows, inner, widths, interpreted):
    x, matrices, scales = in_int8(rows, inner, widths)
    assert skinny_matmul_supported(x, *matrices)
    check_int8(skinny_matmul(x, *matrices, scales=scales), x, matrices, scales)


def test_rows_do_not_meet(interpreted):
    """What another row holds changes no bit, and neither do rows that are added."""
    x, matrices = operands(5, 256, (128,), jnp.bfloat16)
    (alone,) = skinny_matmul(x[:1], *matrices)
    (among,) = skinny_matmul(x.at[1:].set(jnp.nan), *matrices)
    assert np.array_equal(alone[0], among[0])
    assert np.all(np.isnan(among[1:]))


def test_gradients_are_those_of_the_products(interpreted):
    x, matrices = operands(2, 64, (64, 64), jnp.bfloat16)
    weights = [jnp.asarray(np.random.default_rng(i).standard_normal((2, 64))) for i in range(2)]

    def total(x, *matrices):
        products = skinny_matmul(x, *matrices)
        return sum(jnp.sum(p * w) for p, w in zip(products, weights, strict=True))

    grads = jax.grad(total, argnums=(0, 1, 2))(x, *matrices)
    wide = [np.asarray(a, np.float64) for a in (x, *matrices, *weights)]
    wanted = (wide[3] @ wide[1].T + wide[4] @ wide[2].T, wide[0].T @ wide[3], wide[0].T @ wide[4])
    for name, seen, true in zip(("x", "first", "second"), grads, wanted, strict=True):
        check_close(seen, true, 4e-3, name)  # one rounding to bf16 of the result, one of products


# All sizes of the models; the widths of both kinds of attention, one and many rows.
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(
    ("inner", "widths"),
    [(2048, (6144, 2048)), (2048, (2048, 512, 512)), (6144, (24576, 8192)), (8192, (6144,))],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_kernel_lowers_for_cuda(inner, widths, rows, dtype):
    x = jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16)
    matrices = [jax.ShapeDtypeStruct((inner, n), dtype) for n in widths]
    scales = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in widths if dtype == jnp.int8]
    assert gpu_hopper.unsupported_arguments(x, *matrices) is None
    run = jax.jit(lambda x, m, s: gpu_hopper.skinny_matmul(x, *m, scales=s or None))
    lowered = run.trace(x, matrices, scales)
    assert "mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cores", [1, 78, 132])
@pytest.mark.parametrize(("inner", "width"), [(64, 64), (2048, 2048), (9216, 6144), (6144, 32768)])
def test_shares_divide_the_depth_and_fill_the_machine(inner, width, cores, monkeypatch):
    monkeypatch.setattr(platform, "gpu_cores", lambda: cores)
    parts = gpu_hopper.shares(inner, width)
    columns, workers = width // gpu_hopper.COLUMNS, gpu_hopper.WORKERS * cores
    assert inner // gpu_hopper.DEPTH % parts == 0
    assert parts == 1 or parts * columns <= workers
    larger = [n for n in range(parts + 1, workers // columns + 1) if inner // 64 % n == 0]
    assert not larger


def test_refusals_say_what_to_use_instead(monkeypatch):
    x, (matrix,) = operands(2, 64, (64,), jnp.bfloat16)

    def refusal(x, *matrices):
        with pytest.raises(NotImplementedError, match="use implementation='xla'") as caught:
            skinny_matmul(x, *matrices, implementation="pallas_gpu")
        return str(caught.value)

    assert "cpu: it is written for Hopper" in refusal(x, matrix)
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    assert "dtype float32" in refusal(x.astype(jnp.float32), matrix.astype(jnp.float32))
    mixed = gpu_hopper.unsupported(x, matrix, matrix.astype(jnp.int8))
    assert mixed == "a matrix of dtype int8: all must be bfloat16, or all int8"
    assert "65 rows: at most 64" in refusal(jnp.zeros((65, 64), jnp.bfloat16), matrix)
    assert "multiples of 64" in refusal(x, matrix[:, :40])
    assert "empty operand" in refusal(x[:0], matrix)
    assert not skinny_matmul_supported(x, matrix[:, :40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((2, 3, 64))), r"x and matrices have shapes \(2, 3, 64\)"),
        (dict(matrices=()), "one or more"),
        (dict(matrices=(jnp.zeros((32, 64)),)), r"matrix 0 has shape \(32, 64\)"),
        (dict(matrices=(jnp.zeros((64, 8), jnp.bfloat16),)), "dtypes disagree"),
        (dict(matrices=(jnp.zeros((64, 8), jnp.int8),)), "matrix 0 has dtype int8"),
        (dict(scales=[jnp.zeros(8)] * 2), "2 scales for 1 matrices"),
        (dict(scales=[jnp.zeros(8)]), "matrix 0 has dtype float32 and its scale float32; with"),
        (
            dict(matrices=(jnp.zeros((64, 8), jnp.int8),), scales=[jnp.zeros(1)]),
            r"the scale of matrix 0 has shape \(1,\); it must be \(8,\)",
        ),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": jnp.zeros((2, 64)), "matrices": (jnp.zeros((64, 8)),), **change}
    with pytest.raises(ValueError, match=f"^skinny_matmul: .*{message}"):
        skinny_matmul(arguments["x"], *arguments["matrices"], scales=arguments.get("scales"))
