"""States of lightning attention alone, and what is left out because it has decayed to nothing."""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep_simulator
from kernel_cases import TOLERANCE, LightningCase, check_close, check_lightning

from pallas_kernels import lightning_attention, lightning_state, platform
from pallas_kernels.lightning_attention import gpu_hopper, gpu_states, gpu_sweep

CHUNK = gpu_sweep.CHUNK
LENGTH = 1300
SLOPES = np.asarray([0.0, 1e-3, 0.05, 1.0], np.float32)


@pytest.fixture
def simulated(monkeypatch):
    """A Hopper GPU whose kernel is the simulator; the starts of its launches for states."""
    starts = []

    def run(*args, **options):
        if options.get("starts") is not None:
            jax.debug.callback(lambda x: starts.append(np.asarray(x)), options["starts"])
        return sweep_simulator.run(*args, **options)

    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_sweep, "run", run)
    return starts


def cut(monkeypatch, *numbers):
    monkeypatch.setattr(gpu_hopper, "plan", lambda *_: gpu_hopper.Plan(*numbers))


def _ids(*runs):
    return np.asarray([i for i, count in runs for _ in range(count)], np.int32)


PACKED = np.stack(
    [
        _ids((1, LENGTH)),
        _ids((1, 700), (2, 500), (3, 100)),
        _ids((1, 640), (2, 660)),
        _ids((0, 100), (1, 900), (0, 300)),  # of the pieces the last is all padding
        np.where(np.arange(LENGTH) % 3, 1, 0).astype(np.int32),
        np.zeros(LENGTH, np.int32),
    ]
)


def true_state(k, v, ids, reverse):
    """The definition in float64: the last sample's tokens, each decayed by those behind it."""
    k, v = (np.asarray(x).astype(np.float64) for x in (k, v))
    state = np.zeros((*k.shape[::2], k.shape[3], v.shape[3]))
    for row in range(len(k)):
        real = np.flatnonzero(ids[row])
        real = real[::-1] if reverse else real
        sample = [t for t in real if ids[row, t] == ids[row, real[-1]]]
        behind = np.arange(len(sample))[::-1]
        weights = np.exp(-SLOPES.astype(np.float64) * behind[:, None])
        state[row] = np.einsum("th,thk,thv->hkv", weights, k[row, sample], v[row, sample])
    return state


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["xla", "pallas_gpu"])
def test_the_state_is_that_of_the_recurrence(name, packed, reverse, simulated, monkeypatch):
    cut(monkeypatch, 2, 1, 4)
    dtype = jnp.bfloat16 if name == "pallas_gpu" else jnp.float32
    rng = np.random.default_rng(0)
    shape = (len(PACKED), LENGTH, len(SLOPES))
    k = jnp.asarray(rng.standard_normal((*shape, 8)), dtype)
    v = jnp.asarray(rng.standard_normal((*shape, 12)), dtype)
    ids = PACKED if packed else np.ones_like(PACKED)
    static = dict(reverse=reverse, implementation=name)
    run = jax.jit(functools.partial(lightning_state, **static))
    segment_ids = jnp.asarray(ids) if packed else None
    state = run(k, v, jnp.asarray(SLOPES), segment_ids=segment_ids)
    assert state.dtype == jnp.float32
    check_close(state, true_state(k, v, ids, reverse), TOLERANCE[jnp.float32], "state", axis=1)
    if name == "pallas_gpu":
        jax.effects_barrier()
        assert simulated[0].max() > 0


@pytest.mark.parametrize(
    ("numbers", "packed"), [((1, 1, 2), True), ((2, 1, 2), True), ((2, 1, 4), False)]
)
def test_attention_that_leaves_out_what_has_decayed(numbers, packed, simulated, monkeypatch):
    """Rows long enough for it: output, state and gradients, as of short ones."""
    cut(monkeypatch, *numbers)
    rows = (
        _ids((1, 200), (2, 410), (3, 414)),
        _ids((0, 40), (1, 500), (0, 84), (1, 400)),
    )
    case = LightningCase(
        "long",
        1024,
        initial_state=True,
        segments=tuple(tuple(row.tolist()) for row in rows) if packed else None,
    )
    check_lightning(case, jnp.bfloat16, implementation="pallas_gpu", tolerance=4e-3)
    jax.effects_barrier()
    assert max(x.max() for x in simulated) > 0


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_left_out_is_below_the_numbers_of_fp32(reverse, simulated, monkeypatch):
    """And no chunk less: the kernel reads the first whose nearest token still counts."""
    chunks = 16
    slopes = jnp.asarray([0.0, 1e-3, 0.11, 88 / CHUNK / 2, 1.0], jnp.float32)
    k = jnp.ones((1, chunks * CHUNK, len(slopes), 64), jnp.bfloat16)
    for segments in (1, 4):
        cut(monkeypatch, 1, 1, segments)
        simulated.clear()
        run = functools.partial(lightning_state, reverse=reverse, implementation="pallas_gpu")
        jax.jit(run)(k, k, slopes)
        jax.effects_barrier()
        (starts,) = simulated
        pieces = starts[:, ::-1] if reverse else starts
        behind = np.arange(chunks)[::-1].reshape(segments, -1) * CHUNK
        exponents = np.asarray(slopes, np.float64)[:, None, None] * behind
        assert pieces.tolist() == np.sum(exponents > 88, axis=2).tolist()
        assert np.exp(-88.0) < jnp.finfo(jnp.float32).tiny


def test_states_of_segments_are_used_where_segments_end(simulated, monkeypatch):
    """Of 8 pieces, two a segment: in the first of a pair more is left out than in the second."""
    cut(monkeypatch, 4, 1, 8)
    q = jnp.ones((1, 8 * 8 * CHUNK, 1, 64), jnp.bfloat16)
    slopes = jnp.asarray([88 / (5.5 * CHUNK)], jnp.float32)

    @jax.jit
    def total(q):
        out, state = lightning_attention(q, q, q, slopes, implementation="pallas_gpu")
        return jnp.sum(out) + jnp.sum(state)

    jax.grad(total)(q)
    jax.effects_barrier()
    forward, backward = [8, 2] * 4, [2, 8] * 4
    assert sorted(x[0].tolist() for x in simulated) == [backward, forward]


@pytest.mark.parametrize(("dim", "packed", "reverse"), [(128, False, True), (64, True, False)])
def test_the_kernel_itself_in_the_interpreter(dim, packed, reverse, monkeypatch, capsys):
    """Against the simulator: of two heads and three pieces, hardly any, a part and all is read."""
    interpret = hopper.interpret_sweeps(monkeypatch)
    rng = np.random.default_rng(0)
    segments, chunks = 3, 5
    k, v = (rng.standard_normal((1, segments * chunks * CHUNK, 2, dim)) for _ in range(2))
    bookkeeping = None
    if packed:
        ids = _ids((1, 150), (0, 40), (1, 300), (2, 400), (0, 6), (3, 64))
        bookkeeping = [
            gpu_states.track(jnp.asarray(ids)[None], (1, 960), 3, reverse=reverse).bookkeeping
        ]
    sweeps = (gpu_sweep.Sweep(keys=0, values=1, reverse=reverse),)
    arrays = jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16)
    options = dict(
        bookkeeping=bookkeeping,
        starts=jnp.asarray([[9, 1, 0], [0, 1, 2]], jnp.int32),
        segments=segments,
        final=True,
    )
    arguments = sweeps, arrays, jnp.asarray([0.02, 0.3], jnp.float32)
    (seen,) = gpu_sweep.run(*arguments, **options, interpret=interpret)
    (wanted,) = jax.jit(functools.partial(sweep_simulator.run, sweeps, **options))(*arguments[1:])
    # The kernel scales values in bf16 and adds what that drops in bf16, too: 2^-17.
    check_close(seen, np.asarray(wanted), 2.0**-16, "states", axis=0)
    assert "RACE" not in capsys.readouterr().out


BAD = [
    (dict(k=jnp.ones((1, 8, 4))), r"k has shape \(1, 8, 4\)"),
    (dict(v=jnp.ones((1, 7, 2, 4))), r"v has shape \(1, 7, 2, 4\)"),
    (dict(decay_slopes=jnp.ones(3)), "decay_slopes"),
    (dict(decay_slopes=-jnp.ones(2)), "slope"),
    (dict(v=jnp.ones((1, 8, 2, 4), jnp.bfloat16)), "dtypes disagree"),
    (dict(segment_ids=jnp.ones((2, 8), jnp.int32)), "segment_ids has shape"),
    (dict(chunk_size=0), "chunk_size is 0"),
    (dict(implementation="pallas_tpu"), "unknown implementation 'pallas_tpu'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change, message):
    good = dict(k=jnp.ones((1, 8, 2, 4)), v=jnp.ones((1, 8, 2, 4)), decay_slopes=jnp.ones(2))
    with pytest.raises(ValueError, match=rf"^lightning_state: .*{message}"):
        lightning_state(**good | change)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_kernel_lowers_for_cuda(packed, reverse):
    k = jnp.zeros((1, 4096, 8, 128), jnp.bfloat16)
    ids = jnp.ones((1, 4096), jnp.int32) if packed else None

    def state(k):
        slopes = jnp.full((8,), 0.1)
        return gpu_hopper.lightning_state(
            k, k, slopes, segment_ids=ids, reverse=reverse, chunk_size=256
        )

    text = jax.jit(state).trace(k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    jax.jit(jax.grad(lambda k: jnp.sum(state(k)))).trace(k).lower(lowering_platforms=("cuda",))


def test_gradients_are_those_of_xla(simulated):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((1, 70, 2, 8)), jnp.bfloat16) for _ in range(2))

    def total(k, v, name):
        slopes = jnp.asarray([0.1, 0.9])
        return jnp.sum(lightning_state(k, v, slopes, reverse=True, implementation=name) ** 2)

    seen, wanted = (jax.grad(total, (0, 1))(k, v, name) for name in ("pallas_gpu", "xla"))
    for one, other in zip(seen, wanted, strict=True):
        check_close(one, np.asarray(other).astype(np.float64), 4e-3, "gradient")
