import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep_simulator
from kernel_cases import LIGHTNING_CASES, LightningCase, check_close, check_lightning, named

from pallas_kernels import lightning_attention, platform
from pallas_kernels.lightning_attention import gpu_hopper, gpu_sweep


def _ids(*runs):
    return tuple(i for i, count in runs for _ in range(count))


# Longer than a chunk of 64, than a segment of 128, and with borders on and off their edges.
LONG_CASES = (
    LightningCase("whole", 256, initial_state=True),
    LightningCase("odd", 201, initial_state=True),
    LightningCase(
        "packed",
        320,
        initial_state=True,
        segments=(
            _ids((1, 63), (2, 2), (3, 63), (4, 192)),
            _ids((1, 320)),
            _ids((5, 0), (1, 130), (2, 1), (3, 180), (4, 9)),
        ),
    ),
    LightningCase(
        "packed_and_padded",
        250,
        initial_state=True,
        segments=(
            _ids((0, 70), (1, 10), (0, 90), (1, 20), (2, 40), (0, 20)),
            _ids((1, 66), (0, 184)),
            tuple(1 + i // 90 if i % 3 else 0 for i in range(250)),
        ),
    ),
)


@pytest.fixture
def simulated(monkeypatch):
    """A Hopper GPU whose kernel is the simulator."""
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_sweep, "run", sweep_simulator.run)


# bf16 in and out, fp32 between: the rounding of the result, as in kernel_cases.
TOLERANCE = 4e-3


@pytest.mark.parametrize("case", **named(LIGHTNING_CASES[8:]))
def test_bookkeeping_of_short_rows(case, simulated):
    check_lightning(case, jnp.bfloat16, implementation="pallas_gpu", tolerance=TOLERANCE)


@pytest.mark.parametrize("segments", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("case", **named(LONG_CASES))
def test_bookkeeping_of_chunks_and_segments(case, segments, simulated, monkeypatch):
    monkeypatch.setattr(gpu_hopper, "plan", lambda *_: gpu_hopper.Plan(segments, 1, segments))
    check_lightning(case, jnp.bfloat16, implementation="pallas_gpu", tolerance=TOLERANCE)


@pytest.mark.parametrize("dims", [(96, 96), (256, 128), (64, 80)])
def test_head_sizes_are_served_in_blocks(dims, simulated):
    case = LightningCase("blocks", 70, initial_state=True, key_dim=dims[0], value_dim=dims[1])
    check_lightning(case, jnp.bfloat16, implementation="pallas_gpu", tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        ((4, 256, 64, 128), False),  # a block a head
        ((1, 256, 64, 128), True),  # columns split
        ((1, 4096, 8, 128), True),  # rows cut into segments
        ((2, 130, 4, 128), False),  # rows that do not fill their chunks
        ((2, 128, 4, 64), True),
    ],
)
def test_kernel_lowers_for_cuda(shape, packed):
    batch, length, heads, dim = shape
    q, k, v = (jnp.zeros(shape, jnp.bfloat16) for _ in range(3))
    state = jnp.zeros((batch, heads, dim, dim), jnp.float32)
    ids = jnp.ones((batch, length), jnp.int32) if packed else None

    def total(q, k, v, state):
        out, final = gpu_hopper.lightning_attention(
            q,
            k,
            v,
            jnp.full((heads,), 0.1),
            initial_state=state,
            segment_ids=ids,
            chunk_size=256,
        )
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(final)

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).trace(q, k, v, state)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_plan_fills_the_multiprocessors():
    assert gpu_hopper.plan(256, 16384, 128) == gpu_hopper.Plan(1, 1, 1)
    assert gpu_hopper.plan(64, 65536, 128).splits == 2
    assert gpu_hopper.plan(8, 65536, 128) == gpu_hopper.Plan(16, 1, 16)
    assert gpu_hopper.plan(16, 131072, 128) == gpu_hopper.Plan(8, 1, 32)
    for heads in range(1, 300):
        for length in (1, 64, 1500, 65536):
            cut = gpu_hopper.plan(heads, length, 128)
            assert cut.segments >= 1
            assert cut.state_segments % cut.segments == 0
            assert cut.segments == 1 or cut.splits == 1
            assert length // cut.state_segments >= min(length, gpu_hopper.MIN_SEGMENT)


def test_refusals_say_what_to_use_instead(monkeypatch):
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    slopes = jnp.full((2,), 0.5, jnp.float32)
    with pytest.raises(NotImplementedError, match=r"cpu: it needs an NVIDIA Hopper.*'xla'"):
        lightning_attention(q, q, q, slopes, implementation="pallas_gpu")
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    wide = q.astype(jnp.float32)
    with pytest.raises(NotImplementedError, match=r"float32.*bfloat16"):
        lightning_attention(wide, wide, wide, slopes, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match=r"slope 3.*at most 1.1"):
        lightning_attention(q, q, q, 6 * slopes, implementation="pallas_gpu")


@pytest.mark.parametrize(("length", "segments"), [(72, 1), (200, 1), (258, 2), (72, 2)])
def test_the_largest_slope(length, segments, simulated, monkeypatch):
    """Of whole chunks and of a few tokens in the last."""
    monkeypatch.setattr(gpu_hopper, "plan", lambda *_: gpu_hopper.Plan(segments, 1, segments))
    rng = np.random.default_rng(length)
    arrays = (jnp.asarray(rng.standard_normal((1, length, 1, 8)), jnp.bfloat16) for _ in range(3))
    arrays = (*arrays, jnp.asarray([gpu_hopper.MAX_SLOPE], jnp.float32))
    (out, state), wanted = (
        lightning_attention(*arrays, implementation=name) for name in ("pallas_gpu", "reference")
    )
    out_wanted, state_wanted = (np.asarray(x).astype(np.float64) for x in wanted)
    check_close(out, out_wanted, TOLERANCE, "output")
    check_close(state, state_wanted, 1e-5, "state")


def test_a_slope_too_large_under_jit_is_loud(simulated):
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    run = jax.jit(lambda s: lightning_attention(q, q, q, s, implementation="pallas_gpu")[0])
    out = np.asarray(run(jnp.asarray([1.0, 3.0])).astype(jnp.float32))
    assert np.isfinite(out[:, :, 0]).all()
    assert np.isnan(out[:, :, 1]).all()
