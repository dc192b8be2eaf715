import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from kernel_cases import GROUPED_CASES, TOLERANCE, check_grouped, named

from pallas_kernels import dispatch, grouped_matmul


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", **named(GROUPED_CASES))
def test_equals_group_after_group(case, dtype):
    check_grouped(case, dtype, implementation="xla", tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("case", **named(GROUPED_CASES))
def test_reference_equals_group_after_group(case):
    tolerance = TOLERANCE[jnp.float32]
    check_grouped(case, jnp.float32, implementation="reference", tolerance=tolerance)


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
