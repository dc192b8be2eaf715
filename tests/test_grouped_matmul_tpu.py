"""The grouped matmul's TPU kernels in the TPU interpreter, and compiled for every TPU."""

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
import truth
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh
from kernel_cases import GROUPED_CASES, TOLERANCE, GroupedCase, check_close, check_grouped
from sweeps import in_either_dtype
from tpu_compiler import Compile, compile_for_every_tpu, needs_libtpu

from pallas_kernels.grouped_matmul import tpu

SHARED = ("ragged", "empty_groups", "all_groups_empty", "fewer_rows_than_groups", "skewed")
CASES = (
    *(case for case in GROUPED_CASES if case.name in SHARED),
    # Tiles of 128 rows, of which one begins inside a group; a last tile of rows without a group.
    GroupedCase("tiles_of_rows", 700, (130, 0, 254, 190), inner=24, columns=40),
    # 128 lanes a side in fp32, 256 in bf16: several tiles, none of which divides the matrix.
    GroupedCase("tiles_of_matrices", 150, (70, 0, 61), inner=300, columns=420),
)


@pytest.fixture
def interpreted(monkeypatch):
    """Let `check_grouped` call the kernels, which the public function offers on TPUs only."""

    def multiply(x, w, group_sizes, *, implementation):
        del implementation
        return tpu._grouped_matmul(True, x, w, group_sizes)

    monkeypatch.setattr(kernel_cases, "grouped_matmul", multiply)
    monkeypatch.setattr(tpu, "GMM_SIDES", (512, 512))
    monkeypatch.setattr(tpu, "TGMM_SIDES", (512, 512))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("case", "dtype"), in_either_dtype(CASES))
def test_equals_group_after_group(case, dtype):
    check_grouped(case, dtype, implementation=None, tolerance=TOLERANCE[dtype])


def test_rows_of_no_group_are_never_read():
    # Not even multiplied by 0: what lies in padding may be NaN.
    sizes, rows = (20, 30), 70
    rng = np.random.default_rng(0)
    x, w, grad = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((rows, 16), (2, 16, 24), (rows, 24))
    )
    true_out, true_x, true_w = truth.grouped_matmul(x, w, sizes, grad)
    x, grad = x.at[50:].set(jnp.nan), grad.at[50:].set(jnp.nan)
    out, back = jax.vjp(lambda x, w: tpu._grouped_matmul(True, x, w, jnp.asarray(sizes)), x, w)
    grad_x, grad_w = back(grad)
    check_close(out, true_out, kernel_cases.FP32, "output")
    check_close(grad_x, true_x, kernel_cases.FP32, "gradient to x")
    check_close(grad_w, true_w, kernel_cases.FP32, "gradient to w", axis=0)


def _products(jaxpr):
    """The precision of every matrix product in a program and the kernels it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from _products(inner)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(jnp.float32, jax.lax.Precision.HIGHEST), (jnp.bfloat16, jax.lax.Precision.DEFAULT)],
)
@pytest.mark.parametrize("surrounding", ["default", "highest"])
def test_products_of_fp32_are_fp32(dtype, wanted, surrounding):
    # The interpreter multiplies exactly whatever is asked for, a TPU rounds fp32 to bf16.
    x, w = jnp.ones((32, 16), dtype), jnp.ones((2, 16, 24), dtype)

    def forward_backward(x, w, sizes):
        out, back = jax.vjp(lambda x, w: tpu.grouped_matmul(x, w, sizes), x, w)
        return back(out)

    with jax.default_matmul_precision(surrounding):
        program = jax.make_jaxpr(forward_backward)(x, w, jnp.asarray([10, 20]))
    seen = list(_products(program.jaxpr))
    assert len(seen) >= 3
    assert set(seen) == {(wanted, wanted)}


def test_what_is_unsupported():
    def unsupported(rows, dtype, w=None):
        x = jax.ShapeDtypeStruct((rows, 4), dtype)
        w = jax.ShapeDtypeStruct((2, 4, 6), dtype) if w is None else w
        return tpu.unsupported(x, w, jax.ShapeDtypeStruct((2,), jnp.int32))  # pyright: ignore

    assert "platform 'cpu'" in str(unsupported(8, jnp.float32))
    device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert unsupported(8, jnp.float32) is None
        assert "dtype float64" in str(unsupported(8, jnp.float64))
        assert "empty arrays x (0, 4)" in str(unsupported(0, jnp.float32))
        in_int8 = jax.ShapeDtypeStruct((2, 4, 6), jnp.int8)
        assert "dtype int8" in str(unsupported(8, jnp.float32, in_int8))


def compile_cases() -> list[Compile]:
    def forward_backward(x, w, sizes, grad):
        out, back = jax.vjp(lambda x, w: tpu.grouped_matmul(x, w, sizes), x, w)
        return out, back(grad)

    def case(name, rows, inner, columns, groups, dtype):
        shapes = ((rows, inner), (groups, inner, columns), (rows, columns))
        x, w, grad = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
        return Compile(name, forward_backward, (x, w, sizes, grad), kernels=3)

    return [
        # The experts of MiniMax-Text-01 at full width, both ways.
        case("up", 65536, 6144, 9216, 32, jnp.bfloat16),
        case("down", 65536, 9216, 6144, 32, jnp.bfloat16),
        case("few rows", 7, 6144, 9216, 32, jnp.bfloat16),
        case("fp32", 8192, 6144, 9216, 4, jnp.float32),
        # Sides that no tile divides: the kernels then mask in fp32, which takes more VMEM.
        case("odd", 16384, 5001, 1400, 4, jnp.bfloat16),
        case("odd fp32", 1000, 5000, 5000, 4, jnp.float32),
        case("narrow", 1000, 200, 72, 4, jnp.bfloat16),
    ]


@needs_libtpu
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_for_every_tpu(everything):
    compile_for_every_tpu(__name__, everything=everything)
