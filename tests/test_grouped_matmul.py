import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from jax.extend.core import Literal
from kernel_cases import GROUPED_CASES, TOLERANCE, check_close, check_grouped, named
from sweeps import in_either_dtype

from pallas_kernels import dispatch, grouped_matmul
from pallas_kernels.grouped_matmul import gpu_hopper


@pytest.mark.parametrize(("case", "dtype"), in_either_dtype(GROUPED_CASES))
def test_equals_group_after_group(case, dtype):
    check_grouped(case, dtype, implementation="xla", tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("case", **named(GROUPED_CASES))
def test_reference_equals_group_after_group(case):
    tolerance = TOLERANCE[jnp.float32]
    check_grouped(case, jnp.float32, implementation="reference", tolerance=tolerance)


# ---------------------------------------------------------------- int8


INT8_CASES = [
    case
    for case in GROUPED_CASES
    if case.name in ("ragged", "empty_groups", "rows_past_the_end", "one_row", "skewed")
]


def int8_arguments(case, dtype):
    rng = np.random.default_rng(len(case.name) + case.rows)
    groups = len(case.group_sizes)
    w = rng.integers(-127, 128, (groups, case.inner, case.columns), np.int8)
    # Apart by powers of ten: the scale of another group or column would be far off.
    scale = 10.0 ** rng.uniform(-3, 1, (groups, 1, case.columns))
    x = jnp.asarray(rng.standard_normal((case.rows, case.inner)), dtype)
    sizes = jnp.asarray(case.group_sizes, jnp.int32)
    return (x, jnp.asarray(w), sizes), jnp.asarray(scale, jnp.float32)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(None, jnp.bfloat16), ("xla", jnp.float32), ("reference", jnp.float32)],
)
@pytest.mark.parametrize("case", **named(INT8_CASES))
def test_int8(case, dtype, implementation):
    """Each group's integers times their scales; casts are exact, so the float tolerance holds."""
    (x, w, sizes), scale = int8_arguments(case, dtype)
    out = grouped_matmul(x, w, sizes, w_scale=scale, implementation=implementation)
    assert out.dtype == dtype
    true = truth.grouped_matmul(
        x, truth.wide(w) * truth.wide(scale), case.group_sizes, np.zeros(out.shape)
    )[0]
    # Column by column, as the scales are apart.
    check_close(out, true, TOLERANCE[dtype], "output", axis=1)


def test_int8_is_scaled_before_it_is_rounded():
    """3 * 127 * 1.002 = 381.8 is 382 in bf16; 381 is none of its numbers, 380 * 1.002 is 380."""
    x, sizes = jnp.ones((1, 3), jnp.bfloat16), jnp.asarray([1])
    w, scale = jnp.full((1, 3, 1), 127, jnp.int8), jnp.full((1, 1, 1), 1.002, jnp.float32)
    for implementation in ("xla", "reference"):
        out = grouped_matmul(x, w, sizes, w_scale=scale, implementation=implementation)
        assert out[0, 0] == 382


def test_int8_is_cast_one_matrix_at_a_time():
    (x, w, sizes), scale = int8_arguments(GROUPED_CASES[2], jnp.bfloat16)
    program = jax.jit(lambda *a: grouped_matmul(*a[:3], w_scale=a[3])).lower(x, w, sizes, scale)
    text = program.compile().as_text()
    assert "s8[4,8,12]" in text
    assert "bf16[4,8,12]" not in text
    assert "f32[4,8,12]" not in text


def test_int8_passes_no_gradient():
    (x, w, sizes), scale = int8_arguments(GROUPED_CASES[0], jnp.float32)
    with pytest.raises(NotImplementedError, match="an int8 w passes no gradient; train in bf16"):
        jax.grad(lambda x: jnp.sum(grouped_matmul(x, w, sizes, w_scale=scale)))(x)


def test_kernels_refuse_int8():
    (x, w, sizes), scale = int8_arguments(GROUPED_CASES[0], jnp.bfloat16)
    assert "int8: both must be bfloat16" in str(gpu_hopper.unsupported_arguments(x, w))
    for name in ("pallas_gpu", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match=f"{name}.* does not support"):
            grouped_matmul(x, w, sizes, w_scale=scale, implementation=name)


def _multiplications(function, *arguments) -> int:
    """Run a program step by step and count the scalar multiplications of its matrix products."""
    count = 0

    def run(jaxpr, constants, values):
        nonlocal count
        known = dict(zip(jaxpr.constvars, constants, strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            inputs, params = [read(atom) for atom in equation.invars], equation.params
            if equation.primitive.name == "while":
                outputs = run_while(params, inputs)
            elif "jaxpr" in params or "call_jaxpr" in params:
                inner = params.get("jaxpr", params.get("call_jaxpr"))
                outputs = run(inner.jaxpr, inner.consts, inputs)
            else:
                if equation.primitive.name == "dot_general":
                    (contracted, _), _ = params["dimension_numbers"]
                    inner_size = int(np.prod([inputs[0].shape[d] for d in contracted]))
                    count += int(np.prod(equation.outvars[0].aval.shape)) * inner_size
                outputs = equation.primitive.bind(*inputs, **params)
                outputs = outputs if equation.primitive.multiple_results else [outputs]
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def run_while(params, inputs):
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        split = of_cond + of_body
        cond, body, carry = inputs[:of_cond], inputs[of_cond:split], inputs[split:]
        condition, step = params["cond_jaxpr"], params["body_jaxpr"]
        while run(condition.jaxpr, condition.consts, [*cond, *carry])[0]:
            carry = run(step.jaxpr, step.consts, [*body, *carry])
        return carry

    closed = jax.make_jaxpr(function)(*arguments)
    run(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
    return count


@pytest.mark.parametrize(
    "group_sizes",
    [(32,) * 16, (512, *(0,) * 15), (1,) * 15 + (497,), (3,) * 16],
    ids=["even", "one_group", "skewed", "mostly_past_the_end"],
)
def test_work_is_that_of_the_rows_not_of_the_groups(group_sizes):
    rows, inner, columns = 512, 4, 4
    x, grad = jnp.ones((rows, inner)), jnp.ones((rows, columns))
    w = jnp.ones((len(group_sizes), inner, columns))
    sizes = jnp.asarray(group_sizes, jnp.int32)

    def forward_backward(implementation):
        def run(x, w, sizes, grad):
            out, back = jax.vjp(
                lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w
            )
            return out, back(grad)

        return run

    least = 3 * rows * inner * columns  # forward, gradient to x, gradient to w
    # A partly empty block a group: at most as much again as the rows themselves.
    assert _multiplications(forward_backward("xla"), x, w, sizes, grad) <= 2 * least
    dense = _multiplications(forward_backward("reference"), x, w, sizes, grad)
    assert dense >= len(group_sizes) * least  # the count sees dense work


GOOD = dict(x=jnp.ones((6, 4)), w=jnp.ones((3, 4, 5)), group_sizes=jnp.asarray([1, 2, 3]))
BAD = [
    (dict(x=jnp.ones((2, 6, 4))), r"x and w have shapes \(2, 6, 4\) and \(3, 4, 5\)"),
    (dict(w=jnp.ones((4, 5))), r"x and w have shapes \(6, 4\) and \(4, 5\)"),
    (dict(w=jnp.ones((3, 7, 5))), r"w has shape \(3, 7, 5\); it must be \(3, 4, 5\)"),
    (
        dict(group_sizes=jnp.asarray([1, 2])),
        r"group_sizes has shape \(2,\); it must be \(3,\)",
    ),
    (dict(group_sizes=jnp.ones(3)), "group_sizes has dtype float32; it must be integer"),
    (dict(x=jnp.ones((6, 4), jnp.bfloat16)), "dtypes disagree .*x bfloat16"),
    (dict(w=jnp.ones((3, 4, 5), jnp.int32)), "w has dtype int32"),
    (dict(w=jnp.ones((3, 4, 5), jnp.int8)), "w has dtype int8"),
    (
        dict(w_scale=jnp.ones((3, 1, 5))),
        "w has dtype float32 and w_scale float32; .* must be int8 and float32",
    ),
    (
        dict(w=jnp.ones((3, 4, 5), jnp.int8), w_scale=jnp.ones((3, 5))),
        r"w_scale has shape \(3, 5\); it must be \(3, 1, 5\)",
    ),
    (
        dict(implementation="ragged"),
        "unknown implementation 'ragged'; choose None or one of .*'xla'",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change, message):
    arguments = {**GOOD, **change}
    arrays = [arguments.pop(name) for name in ("x", "w", "group_sizes")]
    with pytest.raises(ValueError, match=rf"^grouped_matmul: {message}"):
        grouped_matmul(*arrays, **arguments)


def test_a_named_implementation_is_never_replaced():
    implementations = (
        dispatch.Implementation(
            "fast", lambda x: "fast", unsupported=lambda x: "odd numbers" if x % 2 else None
        ),
        dispatch.Implementation("manual", lambda x: "manual", automatic=False),
        dispatch.Implementation("xla", lambda x: "xla"),
    )
    assert dispatch.select("op", implementations, None, 4).name == "fast"
    assert dispatch.select("op", implementations, None, 3).name == "xla"
    assert dispatch.select("op", implementations, "manual", 3).name == "manual"
    with pytest.raises(
        NotImplementedError,
        match="op: implementation='fast' does not support odd numbers; use implementation='xla'",
    ):
        dispatch.select("op", implementations, "fast", 3)
