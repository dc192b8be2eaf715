import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from kernel_cases import LIGHTNING_CASES, SLOPES, TOLERANCE, check_close, check_lightning, named
from sweeps import in_either_dtype

from pallas_kernels import lightning_attention, lightning_decode_step


@pytest.mark.parametrize(("case", "dtype"), in_either_dtype(LIGHTNING_CASES))
def test_chunks_equal_the_recurrence(case, dtype):
    check_lightning(case, dtype, implementation="xla", tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("case", **named(LIGHTNING_CASES[6:]))
def test_reference_equals_the_recurrence(case):
    tolerance = TOLERANCE[jnp.float32]
    check_lightning(case, jnp.float32, implementation="reference", tolerance=tolerance)


def test_default_chunk_on_a_long_row():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 700, 4, 4)), jnp.float32) for _ in range(3))
    slopes = jnp.asarray(SLOPES, jnp.float32)
    out, state = jax.jit(lightning_attention)(q, k, v, slopes)
    true = truth.lightning(q, k, v, slopes, None, None, np.zeros(v.shape), np.zeros(state.shape))
    # As in kernel_cases: fp32 sums of a few hundred terms.
    check_close(out, true.out, 2e-6, "output", axis=2)
    check_close(state, true.final_state, 2e-6, "final_state", axis=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decode_steps_equal_the_recurrence(dtype):
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((2, 9, 4, 6)), dtype) for _ in range(2))
    v = jnp.asarray(rng.standard_normal((2, 9, 4, 5)), dtype)
    state = first = jnp.asarray(rng.standard_normal((2, 4, 6, 5)), jnp.float32)
    slopes = jnp.asarray(SLOPES, jnp.float32)
    step = jax.jit(lightning_decode_step)
    outs = []
    for t in range(9):
        out, state = step(q[:, t], k[:, t], v[:, t], slopes, state)
        assert out.dtype == dtype
        assert state.dtype == jnp.float32
        outs.append(out)
    zero = np.zeros(v.shape)
    true = truth.lightning(q, k, v, slopes, first, None, zero, np.zeros(state.shape))
    # The step computes in fp32 whatever the inputs; bf16 only rounds the output.
    check_close(jnp.stack(outs, 1), true.out, TOLERANCE[dtype], "output", axis=2)
    check_close(state, true.final_state, TOLERANCE[jnp.float32], "state", axis=1)


def test_twenty_thousand_steps_keep_the_slowest_decay():
    # The slowest head of the last lightning layer of Text-01: exp(-slope) = 1 - 4.9e-5.
    slopes = jnp.asarray([2.0**-8 * 0.012668], jnp.float32)
    steps = 20_000
    rng = np.random.default_rng(2)
    # k and v of one sign: the state grows to its stationary size, where wrong decay shows most.
    q, k, v = (jnp.asarray(rng.uniform(0.1, 1, (steps, 1, 1, 2)), jnp.float32) for _ in range(3))

    @jax.jit
    def decode(q, k, v, slopes):
        def step(state, inputs):
            out, state = lightning_decode_step(*inputs, slopes, state)
            return state, out

        return jax.lax.scan(step, jnp.zeros((1, 1, 2, 2)), (q, k, v))

    state, out = decode(q, k, v, slopes)
    zero = np.zeros((1, 2, 2))
    one = (truth.wide(x)[:, 0] for x in (q, k, v))
    true_out, true_states = truth.recurrence(*one, truth.wide(slopes), zero)
    # 20,000 roundings of 6e-8 add up to 1e-5 at most if they are unbiased.
    np.testing.assert_allclose(np.asarray(state)[0], true_states[-1], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(out)[-1000:, 0], true_out[-1000:], rtol=1e-5)


def test_constant_slopes_under_jit():
    # A concrete array inside jit: looking at its values must not trace.
    x, slopes = jnp.ones((1, 5, 2, 3)), jnp.asarray([0.1, 0.5])
    out, _ = jax.jit(lambda x: lightning_attention(x, x, x, slopes))(x)
    np.testing.assert_allclose(out, lightning_attention(x, x, x, slopes)[0], rtol=1e-6)
    state = jnp.ones((1, 2, 3, 3))
    one = x[:, 0]
    out, _ = jax.jit(lambda x: lightning_decode_step(x, x, x, slopes, state))(one)
    np.testing.assert_allclose(out, lightning_decode_step(one, one, one, slopes, state)[0])


def test_slopes_get_no_gradient():
    x = jnp.ones((1, 5, 2, 3))
    grad = jax.grad(lambda s: lightning_attention(x, x, x, s)[0].sum())(jnp.asarray([0.1, 0.5]))
    np.testing.assert_array_equal(grad, 0)


GOOD = dict(
    q=jnp.ones((2, 5, 3, 4)),
    k=jnp.ones((2, 5, 3, 4)),
    v=jnp.ones((2, 5, 3, 6)),
    decay_slopes=jnp.ones(3),
)
BAD = [
    (dict(q=jnp.ones((2, 5, 3))), r"q has shape \(2, 5, 3\); it must be \[B, T, H, K\]"),
    (dict(q=jnp.ones((2, 0, 3, 4))), r"q has shape \(2, 0, 3, 4\)"),
    (dict(k=jnp.ones((2, 5, 3, 5))), r"k has shape \(2, 5, 3, 5\); it must be \(2, 5, 3, 4\)"),
    (dict(v=jnp.ones((2, 4, 3, 6))), r"v has shape \(2, 4, 3, 6\); it must be \(2, 5, 3, 6\)"),
    (dict(v=jnp.ones((2, 5, 3))), r"v has shape \(2, 5, 3\)"),
    (dict(v=jnp.ones((2, 5, 3, 0))), r"v has shape \(2, 5, 3, 0\)"),
    (dict(decay_slopes=jnp.ones(4)), r"decay_slopes has shape \(4,\); it must be \(3,\)"),
    (dict(decay_slopes=-jnp.ones(3)), r"decay_slopes has the negative value -1.0"),
    (dict(q=jnp.ones((2, 5, 3, 4), jnp.int32)), "q has dtype int32"),
    (dict(k=jnp.ones((2, 5, 3, 4), jnp.float16)), "k has dtype float16"),
    (dict(v=jnp.ones((2, 5, 3, 6), jnp.bfloat16)), "dtypes disagree .*v bfloat16"),
    (
        dict(initial_state=jnp.ones((2, 3, 4, 4))),
        r"initial_state has shape \(2, 3, 4, 4\); it must be \(2, 3, 4, 6\)",
    ),
    (
        dict(segment_ids=jnp.ones((2, 6), int)),
        r"segment_ids has shape \(2, 6\); it must be \(2, 5\)",
    ),
    (dict(chunk_size=0), "chunk_size is 0; it must be at least 1"),
    (dict(implementation="cuda"), "unknown implementation 'cuda'; choose None or one of .*'xla'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change, message):
    arguments = {**GOOD, **change}
    arrays = [arguments.pop(name) for name in ("q", "k", "v", "decay_slopes")]
    with pytest.raises(ValueError, match=rf"^lightning_attention: {message}"):
        lightning_attention(*arrays, **arguments)


STEP = dict(
    q=jnp.ones((2, 3, 4)),
    k=jnp.ones((2, 3, 4)),
    v=jnp.ones((2, 3, 6)),
    decay_slopes=jnp.ones(3),
    state=jnp.ones((2, 3, 4, 6)),
)
BAD_STEP = [
    (dict(q=jnp.ones((2, 1, 3, 4))), r"q has shape \(2, 1, 3, 4\); it must be \[B, H, K\]"),
    (dict(k=jnp.ones((2, 3, 5))), r"k has shape \(2, 3, 5\); it must be \(2, 3, 4\)"),
    (dict(v=jnp.ones((2, 4, 6))), r"v has shape \(2, 4, 6\); it must be \(2, 3, 6\)"),
    (dict(v=jnp.ones((2, 3))), r"v has shape \(2, 3\)"),
    (dict(decay_slopes=jnp.ones(2)), r"decay_slopes has shape \(2,\); it must be \(3,\)"),
    (dict(decay_slopes=-jnp.ones(3)), "decay_slopes has the negative value -1.0"),
    (dict(state=jnp.ones((2, 3, 4, 5))), r"state has shape \(2, 3, 4, 5\)"),
    (dict(state=jnp.ones((2, 3, 4, 6), jnp.int32)), "state has dtype int32"),
    (dict(k=jnp.ones((2, 3, 4), jnp.bfloat16)), "dtypes disagree .*k bfloat16"),
]


@pytest.mark.parametrize(("change", "message"), BAD_STEP)
def test_bad_input_to_a_step_is_refused(change, message):
    with pytest.raises(ValueError, match=rf"^lightning_decode_step: {message}"):
        lightning_decode_step(**{**STEP, **change})
