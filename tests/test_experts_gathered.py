"""Experts over few devices: all tokens go to all of them, and sums come back."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experts_parallel import (
    MESHES,
    B,
    D,
    F,
    K,
    T,
    close,
    compiled,
    exact,
    identical,
    kept_one_by_one,
    linear_experts,
    partition,
    problem,
    routes,
    swiglu_experts,
    wanted,
    whole_problem,
)

from sharding import exchange, rules
from sharding.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize("name", ["expert 4, tensor 2", "rows over expert, sequence over seq"])
def test_output_gradients_and_drops_are_those_of_one_device(name):
    ours, sizes, factor = MESHES[name]
    run = compiled(partition(ours, **sizes), factor=factor, exchange="gathered")
    inputs = problem()
    for experts, is_token in routes().values():
        out, grads, kept = run(*inputs, experts, is_token)
        true_kept = np.ones(experts.shape, bool)
        if factor is not None:
            true_kept = kept_one_by_one(experts, is_token, factor)
            np.testing.assert_array_equal(kept, true_kept)
        close((out, grads), wanted(*inputs, experts, true_kept))


@pytest.mark.parametrize(("devices", "gathered"), [(2, True), (4, False)])
def test_few_devices_gather_and_more_exchange(devices, gathered):
    """Two choices a token: up to two devices it is no more to send every token to all."""
    run = compiled(partition(rules.EXPERT, fsdp=8 // devices, expert=devices))
    text = run.lower(*problem(), *routes()["even"]).as_text()
    assert ("stablehlo.all_to_all" in text) is not gathered
    here = B * T // 8
    sums = rf"\(tensor<{here * devices}x{D}xf32>\) -> tensor<{here}x{D}xf32>"
    # The output, and the gradient of the tokens.
    assert len(re.findall(r"reduce_scatter.*?" + sums, text, re.DOTALL)) == 2 * gathered


def test_whole_numbers_are_those_of_the_exchange():
    """Bit for bit: at once, in groups, and these in turn."""
    where = partition(rules.EXPERT, fsdp=2, expert=4)
    params, *rest = whole_problem()
    for groups, recompute in ((1, False), (2, False), (2, True)):
        run = compiled(
            where, compute=linear_experts, groups=groups, recompute=recompute, exchange="gathered"
        )
        seen = [run(params, *rest, *route) for route in routes().values()]
        identical(seen, exact())


def test_no_more_rows_are_computed_than_have_room():
    """Of 2 devices with 4 experts each; without a capacity all choices of all tokens could come."""
    rows = []

    def compute(params, x, group_sizes):
        rows.append(x.shape[0])
        return swiglu_experts(params, x, group_sizes)

    where = partition(rules.EXPERT, data=4, expert=2)
    for factor, most in ((None, B * T // 4 * K), (0.25, 4 * int(0.25 * K * B * T / 8))):
        rows.clear()
        compiled(where, factor=factor, compute=compute).trace(*problem(), *routes()["even"])
        assert set(rows) == {most}


def test_gradients_are_added_up_in_fp32():
    """Seen in the program: CPU adds up bf16 in fp32 by itself."""
    mesh = make_mesh(MeshConfig(fsdp=1, expert=8))
    spec = jax.sharding.PartitionSpec("expert")
    gather = functools.partial(exchange.gather_rows, "expert")
    run = jax.shard_map(gather, mesh=mesh, in_specs=spec, out_specs=spec)

    def pull(x, grad):
        return jax.vjp(run, x)[1](grad)[0]

    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.normal(size=(n, F)), jnp.bfloat16) for n in (8, 64))
    program = jax.jit(pull)
    true = np.asarray(grad, np.float64).reshape(8, 8, F).sum(axis=0)
    np.testing.assert_allclose(
        np.asarray(program(x, grad), np.float64), true, rtol=2**-8, atol=1e-6
    )
    text = program.lower(x, grad).as_text()
    (operand,) = re.findall(r'"stablehlo.reduce_scatter".*?: \((tensor<\w+>)\)', text, re.DOTALL)
    assert operand == f"tensor<8x{F}xf32>"
