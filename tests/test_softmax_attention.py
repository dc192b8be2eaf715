import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from kernel_cases import SOFTMAX_CASES, TOLERANCE, check_softmax, named
from sweeps import in_either_dtype

from pallas_kernels import softmax_attention
from pallas_kernels.softmax_attention import xla


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 and no dense short cut, so that tiny cases take the path of long inputs."""
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(xla, "DENSE_SCORES", 0)


@pytest.mark.parametrize(("case", "dtype"), in_either_dtype(SOFTMAX_CASES))
def test_blocks_equal_the_definition(small_blocks, case, dtype):
    check_softmax(case, dtype, implementation="xla", tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("case", **named(SOFTMAX_CASES))
def test_reference_equals_the_definition(case):
    tolerance = TOLERANCE[jnp.float32]
    check_softmax(case, jnp.float32, implementation="reference", tolerance=tolerance)


@pytest.mark.parametrize("case", **named([c for c in SOFTMAX_CASES if "packed" in c.name]))
def test_short_bf16_input_equals_the_definition(case):
    check_softmax(case, jnp.bfloat16, implementation=None, tolerance=TOLERANCE[jnp.bfloat16])


def _largest_array(function, *arrays) -> int:
    """Elements of the largest array that any step of a program makes."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for out in equation.outvars:
                yield int(np.prod(out.aval.shape))
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*arrays).jaxpr))


@pytest.mark.parametrize("causal", [True, False])
def test_long_input_never_makes_the_whole_matrix(causal):
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)

    def total(implementation):
        def loss(q, k, v):
            return softmax_attention(q, k, v, causal=causal, implementation=implementation).sum()

        return jax.grad(loss, argnums=(0, 1, 2))

    assert _largest_array(total("xla"), x, x, x) <= xla.BLOCK * xla.BLOCK
    assert _largest_array(total("reference"), x, x, x) >= length * length  # the count sees it


GOOD = dict(
    q=jnp.ones((2, 5, 4, 8)),
    k=jnp.ones((2, 7, 2, 8)),
    v=jnp.ones((2, 7, 2, 6)),
)
BAD = [
    (dict(q=jnp.ones((5, 4, 8))), r"q and k have shapes \(5, 4, 8\) and \(2, 7, 2, 8\)"),
    (dict(k=jnp.ones((2, 7, 2, 9))), r"k has shape \(2, 7, 2, 9\); it must be \(2, 7, 2, 8\)"),
    (dict(k=jnp.ones((3, 7, 2, 8))), r"k has shape \(3, 7, 2, 8\); it must be \(2, 7, 2, 8\)"),
    (dict(v=jnp.ones((2, 6, 2, 6))), r"v has shape \(2, 6, 2, 6\); it must be \(2, 7, 2, 6\)"),
    (dict(v=jnp.ones((2, 7, 2))), r"v has shape \(2, 7, 2\)"),
    (dict(q=jnp.ones((2, 5, 3, 8))), "3 query heads are no multiple of 2 key heads"),
    (dict(q=jnp.ones((2, 5, 4, 8), jnp.bfloat16)), "dtypes disagree .*q bfloat16"),
    (dict(q=jnp.ones((2, 5, 4, 8), jnp.int32)), "q has dtype int32"),
    (
        dict(segment_ids=jnp.ones((2, 7), int)),
        r"segment_ids has shape \(2, 7\); it must be \(2, 5\)",
    ),
    (
        dict(kv_segment_ids=jnp.ones((2, 5), int)),
        r"kv_segment_ids has shape \(2, 5\); it must be \(2, 7\)",
    ),
    (dict(implementation="flash"), "unknown implementation 'flash'; choose None or one of .*'xla'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change, message):
    arguments = {**GOOD, **change}
    arrays = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=rf"^softmax_attention: {message}"):
        softmax_attention(*arrays, **arguments)
