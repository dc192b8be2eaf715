"""The experts of few tokens: both forms against float64, the kernels in jax's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import interpreted_hopper
from kernel_cases import FP32, check_close

from mmx.nn.moe import mixing_weights
from mmx.nn.quantized import quantized
from pallas_kernels import expert_mixture, expert_mixture_supported, platform
from pallas_kernels.expert_mixture import gpu_hopper, xla

# What the kernels do not copy of a block of 64 rows is NaN there, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
BF16 = 2.5e-3  # what is between the two products is rounded to bf16: 2^-9 = 2e-3 at most


@pytest.fixture
def interpreted(monkeypatch):
    with interpreted_hopper(monkeypatch, cores=3, detect_races=False):
        yield


def case(tokens: int, dim: int, width: int, experts: int, dtype, *, per_token: int = 2):
    """Arguments; half of the tokens choose among the first three experts only."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, dim))
    gate, up = rng.standard_normal((2, experts, dim, width)) / np.sqrt(dim)
    down = rng.standard_normal((experts, width, dim)) / np.sqrt(width)
    weights = np.zeros((tokens, experts), np.float32)
    for token in range(tokens):
        among = 3 if token % 2 == 0 else experts
        weights[token, rng.permutation(among)[:per_token]] = rng.uniform(0.1, 0.9, per_token)
    x, *matrices = (jnp.asarray(array, dtype) for array in (x, gate, up, down))
    return x, jnp.asarray(weights), *matrices


def in_int8(tokens: int, dim: int, width: int, experts: int):
    """The same with int8 matrices, their scales, and what these are in fp32."""
    x, weights, *matrices = case(tokens, dim, width, experts, jnp.float32)
    held = [quantized(matrix, (1,)) for matrix in matrices]
    exact = [one.values * one.scale for one in held]
    x = x.astype(jnp.bfloat16)
    return (x, weights, *(h.values for h in held)), [h.scale for h in held], (x, weights, *exact)


def truth(x, weights, gate, up, down):
    x, weights, gate, up, down = (
        np.asarray(array, np.float64) for array in (x, weights, gate, up, down)
    )
    out = np.zeros_like(x)
    for token, expert in zip(*np.nonzero(weights), strict=True):
        gated = x[token] @ gate[expert]
        hidden = gated / (1 + np.exp(-gated)) * (x[token] @ up[expert])
        out[token] += weights[token, expert] * (hidden @ down[expert])
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, FP32), (jnp.bfloat16, BF16)])
def test_xla_form(dtype, tolerance):
    arrays = case(5, 24, 40, 6, dtype)
    check_close(expert_mixture(*arrays), truth(*arrays), tolerance, "output")


# Widths of one tile, of less and of more tiles than a ring holds; with experts nobody chose.
@pytest.mark.parametrize(
    ("tokens", "dim", "width", "experts"),
    [(1, 64, 64, 4), (3, 384, 128, 5), (64, 128, 448, 4), (9, 64, 192, 8)],
)
def test_kernels(tokens, dim, width, experts, interpreted):
    arrays = case(tokens, dim, width, experts, jnp.bfloat16)
    assert expert_mixture_supported(*arrays)
    check_close(expert_mixture(*arrays), truth(*arrays), BF16, "output")


def test_xla_form_in_int8():
    arrays, scales, exact = in_int8(5, 24, 40, 6)
    check_close(expert_mixture(*arrays, scales=scales), truth(*exact), BF16, "output")


@pytest.mark.parametrize(
    ("tokens", "dim", "width", "experts"), [(1, 64, 64, 4), (3, 384, 128, 5), (64, 128, 448, 4)]
)
def test_kernels_in_int8(tokens, dim, width, experts, interpreted):
    arrays, scales, exact = in_int8(tokens, dim, width, experts)
    assert expert_mixture_supported(*arrays)
    check_close(expert_mixture(*arrays, scales=scales), truth(*exact), BF16, "output")


@pytest.mark.parametrize("int8", [False, True])
def test_nothing_reaches_a_token_but_its_own_choices(int8, interpreted):
    """Neither other tokens, nor experts nobody chose, nor experts that others chose."""
    (x, weights, *matrices), scales, _ = in_int8(4, 128, 128, 6)
    if not int8:
        matrices, scales = case(4, 128, 128, 6, jnp.bfloat16)[2:], None
    weights = jnp.zeros_like(weights).at[0, 1].set(0.5).at[0, 4].set(0.25).at[1, 2].set(1.0)
    clean = expert_mixture(x, weights, *matrices, scales=scales)
    (alone,) = expert_mixture(x[:1], weights[:1], *matrices, scales=scales)
    others = jnp.asarray([0, 2, 3, 5])
    if scales is None:
        matrices = [matrix.at[others].set(jnp.nan) for matrix in matrices]
    else:
        scales = [scale.at[others].set(jnp.nan) for scale in scales]
    mixed = expert_mixture(x.at[2].set(jnp.inf), weights, *matrices, scales=scales)
    assert np.array_equal(clean[0], alone)
    assert np.array_equal(clean[0], mixed[0])
    assert np.all(np.isnan(mixed[1]))  # it did choose expert 2
    assert np.all(np.asarray(mixed[2:]) == 0)  # these chose none


def test_no_token_chose_anything(interpreted):
    x, weights, *matrices = case(2, 64, 64, 3, jnp.bfloat16)
    out = expert_mixture(x, jnp.zeros_like(weights), *(m * jnp.nan for m in matrices))
    assert np.all(np.asarray(out) == 0)


def test_gradients_are_those_of_the_definition(interpreted):
    arrays = case(2, 64, 64, 3, jnp.bfloat16)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64)), jnp.float32)

    def grads(function):
        def total(*arrays):
            return jnp.sum(weights * function(*arrays))

        return jax.grad(total, argnums=range(5))(*arrays)

    # Of the form in plain jax, differentiated by jax.
    for seen, wanted in zip(grads(expert_mixture), grads(xla.expert_mixture), strict=True):
        assert np.array_equal(seen, wanted)
        assert np.any(np.asarray(seen) != 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(("dim", "width", "experts"), [(2048, 4096, 8), (6144, 9216, 32)])
def test_kernels_lower_for_cuda(dim, width, experts, tokens, dtype):
    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    shapes = (experts, dim, width), (experts, dim, width), (experts, width, dim)
    matrices = [spec(*shape, dtype=dtype) for shape in shapes]
    scales = [spec(experts, 1, shape[2]) for shape in shapes if dtype == jnp.int8]
    arrays = spec(tokens, dim, dtype=jnp.bfloat16), spec(tokens, experts), *matrices
    run = jax.jit(lambda arrays, scales: gpu_hopper.expert_mixture(*arrays, scales=scales or None))
    text = run.trace(arrays, scales)
    assert text.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2


@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_mixing_weights_are_what_top_k_chooses(per_token):
    """Also where probabilities are alike, zero, or all of them the same."""
    rng = np.random.default_rng(0)
    rows = np.round(rng.uniform(size=(200, 8)), 1).astype(np.float32)
    rows[0], rows[1], rows[2, 3:] = 0.125, [1] + [0] * 7, 0
    probabilities = jnp.asarray(rows)
    values, experts = jax.lax.top_k(probabilities, per_token)
    values = values / jnp.sum(values, axis=1, keepdims=True)
    wanted = np.zeros_like(rows)
    np.put_along_axis(wanted, np.asarray(experts), np.asarray(values), axis=1)
    # The sum of k numbers in another order.
    seen = mixing_weights(probabilities, per_token)
    np.testing.assert_allclose(seen, wanted, rtol=3e-7, atol=0)


def test_refusals_say_what_to_use_instead(monkeypatch):
    x, weights, *matrices = case(2, 64, 64, 3, jnp.bfloat16)

    def refusal(*arrays):
        with pytest.raises(NotImplementedError, match="use implementation='xla'") as caught:
            expert_mixture(*arrays, implementation="pallas_gpu")
        return str(caught.value)

    assert "cpu: it is written for Hopper" in refusal(x, weights, *matrices)
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    many = jnp.zeros((65, 64), jnp.bfloat16), jnp.zeros((65, 3))
    assert "65 rows: at most 64" in refusal(*many, *matrices)
    narrow = [m[:, :, :40] for m in matrices[:2]]
    assert "multiples of 64" in refusal(x, weights, *narrow, matrices[2][:, :40])
    assert not expert_mixture_supported(*many, *matrices)


@pytest.mark.parametrize(
    ("index", "array", "message"),
    [
        (0, jnp.zeros(64), r"x and gate have shapes \(64,\)"),
        (1, jnp.zeros((2, 4)), r"weights has shape \(2, 4\)"),
        (1, jnp.zeros((2, 3), jnp.bfloat16), "they must be float32"),
        (3, jnp.zeros((3, 64, 32)), r"up has shape \(3, 64, 32\)"),
        (4, jnp.zeros((3, 64, 32)), r"down has shape \(3, 64, 32\)"),
        (4, jnp.zeros((3, 64, 64), jnp.bfloat16), "dtypes disagree"),
    ],
)
def test_bad_arguments(index, array, message):
    arrays = [jnp.zeros((2, 64)), jnp.zeros((2, 3)), *(jnp.zeros((3, 64, 64)),) * 3]
    arrays[index] = array
    with pytest.raises(ValueError, match=f"^expert_mixture: .*{message}"):
        expert_mixture(*arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "gate has dtype float32 and its scale float32; with scales they must be int8"),
        (
            dict(dtype=jnp.int8),
            r"the scale of down has shape \(3, 1, 32\); it must be \(3, 1, 64\)",
        ),
    ],
)
def test_bad_scales(change, message):
    shapes = (3, 64, 32), (3, 64, 32), (3, 32, 64)
    matrices = [jnp.zeros(shape, **change) for shape in shapes]
    with pytest.raises(ValueError, match=f"^expert_mixture: .*{message}"):
        expert_mixture(
            jnp.zeros((2, 64)), jnp.zeros((2, 3)), *matrices, scales=[jnp.zeros((3, 1, 32))] * 3
        )
