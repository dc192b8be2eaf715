"""Groups of tokens that go to their experts one after the other, where layers are recomputed."""

import dataclasses

import jax
import pytest
from test_experts_parallel import (
    AXES,
    D,
    E,
    compiled,
    exact,
    identical,
    linear_experts,
    partition,
    routes,
    whole_problem,
)

from mmx.planning.equations import inner_jaxprs, size_of
from mmx.planning.memory import _peak
from mmx.planning.walk import live
from sharding import experts as parallel
from sharding import rules


def test_groups_in_turn_change_no_bit():
    where = partition(rules.EXPERT, fsdp=2, expert=4)
    run = compiled(where, compute=linear_experts, groups=4, recompute=True)
    params, *rest = whole_problem()
    square = jax.device_put(params["square"], where.sharding(AXES["square"], (E, D, D)))
    program = run.lower({"square": square}, *rest, *routes()["even"]).compile()
    seen = [program({"square": square}, *rest, *route) for route in routes().values()]
    identical(seen, exact())


def gradient(groups, *, recompute):
    """The traced gradient of a recomputed layer."""
    where = dataclasses.replace(partition(rules.EXPERT, fsdp=2, expert=4), expert_groups=groups)
    params, tokens, weights, grad = whole_problem()

    @jax.checkpoint
    def layer(params, tokens, weights):
        choices, is_token = routes()["even"]
        out, _ = parallel.mixture(
            tokens,
            weights,
            choices,
            is_token,
            params,
            param_axes={name: AXES[name] for name in params},
            compute=linear_experts,
            num_experts=E,
            partition=where,
            recompute=recompute,
        )
        return out

    def value(*inputs):
        return (layer(*inputs) * grad).sum()

    traced = jax.jit(jax.value_and_grad(value, (0, 1, 2))).trace(params, tokens, weights)
    return live(traced.jaxpr)


def exchanges(jaxpr):
    """How many times rows are exchanged, loops multiplied."""
    total = 0
    for eqn in jaxpr.eqns:
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += eqn.primitive.name == "all_to_all"
        total += turns * sum(map(exchanges, inner_jaxprs(eqn)))
    return total


@pytest.mark.parametrize("recompute", [False, True])
def test_a_recomputed_group_travels_no_more_often(recompute):
    """There and back: forward, recomputed, and the gradients."""
    assert exchanges(gradient(4, recompute=recompute)) == 4 * 6


def test_only_one_group_is_in_memory():
    """By the estimate: the more groups the less room, and less than where they take no turns."""
    room = {groups: _peak(gradient(groups, recompute=True), size_of) for groups in (1, 2, 4)}
    assert room[4] < room[2] < room[1]
    assert room[4] < _peak(gradient(4, recompute=False), size_of)
