"""The TPU kernels in the TPU interpreter, and compiled for every TPU that libtpu knows."""

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
import truth
from jax.sharding import AbstractDevice, AbstractMesh
from kernel_cases import TOLERANCE, LightningCase, _runs, check_close, check_lightning
from sweeps import in_either_dtype
from tpu_compiler import Compile, compile_for_every_tpu, needs_libtpu

from pallas_kernels.lightning_attention import tpu

C = tpu.CHUNK

_PACKED = (
    _runs((1, 50), (2, 78), (3, 128), (4, 1), (5, 343)),  # borders on chunk borders and off them
    _runs((7, 300), (2, 212), (9, 88)),  # 512 is also where a grid step ends
)
_PADDED = (
    _runs((0, 140), (1, 460)),
    _runs((1, 100), (0, 300), (1, 160), (0, 40)),  # padding longer than a chunk inside one sample
    _runs((0, 600)),
)
_BOTH = (
    _runs((0, 30), (4, 98), (0, 150), (4, 20), (5, 214), (0, 60), (6, 28)),
    tuple(i % 2 + (i > 300) for i in range(600)),  # every second token is padding, then none
)
CASES = (
    # Many channels: over 16 numbers a bf16 error would be a matter of luck.
    LightningCase("one_token", 1, initial_state=True, key_dim=64, value_dim=64),
    LightningCase("chunk_minus_one", C - 1, initial_state=True),
    LightningCase("chunk", C),
    LightningCase("chunk_plus_one", C + 1, initial_state=True),
    LightningCase("steps_and_remainder", 600, initial_state=True),
    LightningCase("whole_steps", 1024, initial_state=True),
    LightningCase("wide_values", 150, initial_state=True, key_dim=96, value_dim=130),
    LightningCase("packed", 600, initial_state=True, segments=_PACKED),
    LightningCase("padded", 600, initial_state=True, segments=_PADDED),
    LightningCase("packed_and_padded", 600, segments=_BOTH),
    LightningCase("padding_token", 1, initial_state=True, segments=((0,), *((1,),) * 5)),
)


@pytest.fixture
def interpreted(monkeypatch):
    """Let `check_lightning` call the kernel, which the public function offers on TPUs only."""

    def attend(q, k, v, slopes, *, initial_state, segment_ids, chunk_size, implementation):
        del chunk_size, implementation
        return tpu._lightning_attention(q, k, v, slopes, initial_state, segment_ids, interpret=True)

    monkeypatch.setattr(kernel_cases, "lightning_attention", attend)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("case", "dtype"), in_either_dtype(CASES))
def test_kernel_equals_the_recurrence(case, dtype):
    check_lightning(case, dtype, implementation=None, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [3, 5])
def test_heads_that_four_does_not_divide(heads):
    rng = np.random.default_rng(heads)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 140, heads, 4)), jnp.bfloat16) for _ in "qkv")
    slopes = jnp.linspace(0, 1, heads)
    out, state = tpu._lightning_attention(q, k, v, slopes, None, None, interpret=True)
    true = truth.lightning(q, k, v, slopes, None, None, np.zeros(v.shape), np.zeros(state.shape))
    check_close(out, true.out, TOLERANCE[jnp.bfloat16], "output", axis=2)
    check_close(state, true.final_state, TOLERANCE[jnp.bfloat16], "final_state", axis=1)


def test_slow_decay_is_not_lost():
    # expm1 in the kernel: two dozen chunks of the slowest head against the exact power.
    slopes = jnp.asarray([0, 4.9e-5, 1e-3, 0.01], jnp.float32)
    x = jnp.zeros((1, 24 * C, 4, 8), jnp.float32)
    state = jnp.ones((1, 4, 8, 8))
    _, final = tpu._lightning_attention(x, x, x, slopes, state, None, interpret=True)
    wanted = np.exp(-24 * C * np.asarray(slopes, np.float64))
    # One rounding of 6e-8 a chunk, unbiased.
    np.testing.assert_allclose(np.asarray(final)[0, :, 0, 0], wanted, rtol=1e-6)


def _arguments(dtype=jnp.bfloat16, key_dim=128):
    x = jax.ShapeDtypeStruct((1, 8, 4, key_dim), dtype)
    slopes = jax.ShapeDtypeStruct((4,), jnp.float32)
    return (x, x, x, slopes), dict(initial_state=None, segment_ids=None, chunk_size=8)


def test_what_is_unsupported():
    arrays, options = _arguments()
    assert "platform 'cpu'" in str(tpu.unsupported(*arrays, **options))
    device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert tpu.unsupported(*arrays, **options) is None
        arrays, options = _arguments(dtype=jnp.float64)
        assert "dtype float64" in str(tpu.unsupported(*arrays, **options))
        arrays, options = _arguments(key_dim=384)
        assert "K=384" in str(tpu.unsupported(*arrays, **options))


def compile_cases() -> list[Compile]:
    def attend(q, k, v, slopes, ids):
        return tpu.lightning_attention(
            q, k, v, slopes, initial_state=None, segment_ids=ids, chunk_size=128
        )

    def backward(q, k, v, slopes, ids):
        results, back = jax.vjp(lambda q, k, v: attend(q, k, v, slopes, ids), q, k, v)
        return results, back(results)

    def case(name, length, heads, head_dim, dtype, *, segments=False, gradient=True):
        x = jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)
        slopes = jax.ShapeDtypeStruct((heads,), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if segments else None
        function = backward if gradient else attend
        return Compile(name, function, (x, x, x, slopes, ids), kernels=1 + gradient)

    # More than a grid step, no multiple of the chunk, and arrays of the size that XLA likes to
    # move into VMEM as a whole.
    wide = (1100, 32, 128, jnp.bfloat16)
    return [
        case("packed", *wide, segments=True),
        case("whole", *wide),
        case("packed, forward", *wide, segments=True, gradient=False),
        case("forward", *wide, gradient=False),
        case("fp32 64", 300, 2, 64, jnp.float32),
        case("packed 256", 300, 2, 256, jnp.bfloat16, segments=True),
    ]


@needs_libtpu
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_for_every_tpu(everything):
    compile_for_every_tpu(__name__, everything=everything)
