"""Experts over 8 CPU devices, against all experts computed on all tokens and against the layer."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged_simulator import simulated_ragged_all_to_all
from random_models import random_params, small_config

from mmx.model import _modules
from mmx.nn import functional, layers
from pallas_kernels import grouped_matmul
from sharding import exchange, rules
from sharding import experts as parallel
from sharding.mesh import MeshConfig, make_mesh
from sharding.partition import Partition

E, K, D, F = 8, 2, 16, 8
B, T = 8, 8
AXES = {
    "gate": ("experts", "embed", "expert_mlp"),
    "up": ("experts", "embed", "expert_mlp"),
    "down": ("experts", "expert_mlp", "embed"),
    "square": ("experts", "embed", None),
}
EXPERT_WEIGHTS = ("gate", "up", "down")
# fp32 products of 8 to 16 numbers in another order, and sums over 64 tokens.
SAME = 1e-5


def swiglu_experts(params, rows, group_sizes):
    gate, up = (grouped_matmul(rows, params[name], group_sizes) for name in ("gate", "up"))
    return grouped_matmul(functional.swiglu(gate, up), params["down"], group_sizes)


def linear_experts(params, rows, group_sizes):
    """Sums of small whole numbers, so that fp32 is exact in any order."""
    return grouped_matmul(rows, params["square"], group_sizes)


def partition(rules_, **sizes):
    return Partition(make_mesh(MeshConfig(**{"fsdp": 1, **sizes})), rules_)


def whole(rng, shape):
    return rng.integers(-2, 3, shape).astype(np.float32)


def problem(seed=0, draw=np.random.Generator.normal):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    params = {
        name: (draw(rng, size=shape) / 3).astype(np.float32) for name, shape in shapes.items()
    }
    tokens = rng.normal(size=(B, T, D)).astype(np.float32)
    weights = rng.uniform(0.1, 1, (B, T, K)).astype(np.float32)
    grad = rng.normal(size=(B, T, D)).astype(np.float32)
    return params, tokens, weights, grad


def whole_problem(seed=0):
    """The same with small whole numbers."""
    rng = np.random.default_rng(seed)
    params = {"square": whole(rng, (E, D, D))}
    return params, whole(rng, (B, T, D)), whole(rng, (B, T, K)), whole(rng, (B, T, D))


def routes(seed=0):
    """Choices [B, T, k] by name, with which tokens are real."""
    rng = np.random.default_rng(seed)

    def drawn(skew):
        scores = rng.normal(size=(B, T, E)) - skew * np.arange(E)
        return np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)

    padded = rng.random((B, T)) < 0.7
    padded[3] = False
    everyone = np.ones((B, T), bool)
    one = np.broadcast_to(np.array([5, 2], np.int32), (B, T, K))
    return {
        "even": (drawn(0), everyone),
        "skewed, padded, some experts without tokens": (drawn(1), padded),
        "all to one": (one, everyone),
        "all to the last": (np.broadcast_to(np.array([7, 6], np.int32), (B, T, K)), padded),
    }


def kept_one_by_one(experts, is_token, factor, num_experts=E):
    """First choices of all tokens, then second ones, while their expert has room."""
    per_token = experts.shape[-1]
    room = int(np.ceil(round(factor * per_token * is_token.sum() / num_experts, 9)))
    left = [room] * num_experts
    kept = np.zeros(experts.shape, bool)
    for choice in range(per_token):
        for token in np.ndindex(is_token.shape):
            expert = experts[*token, choice]
            if is_token[token] and left[expert] > 0:
                left[expert] -= 1
                kept[*token, choice] = True
    return kept


def everywhere(params, tokens, weights, experts, kept):
    """Every expert of every token, most of them times 0."""
    with jax.default_matmul_precision("highest"):
        gate, up = (jnp.einsum("btd,edf->btef", tokens, params[name]) for name in ("gate", "up"))
        out = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, params["down"])
        share = (jax.nn.one_hot(experts, E) * (weights * kept)[..., None]).sum(axis=2)
        return jnp.einsum("bted,bte->btd", out, share)


@jax.jit
def wanted(params, tokens, weights, grad, experts, kept):
    def value(*inputs):
        out = everywhere(*inputs, experts, kept)
        return (out * grad).sum(), out

    (_, out), grads = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(params, tokens, weights)
    return out, grads


def compiled(where, *, factor=None, compute=swiglu_experts, groups=1, **options):
    """(params, tokens, weights, grad, experts, is_token) -> output, gradients, kept."""
    where = dataclasses.replace(where, expert_groups=groups)

    @jax.jit
    def run(params, tokens, weights, grad, experts, is_token):
        def value(params, tokens, weights):
            out, kept = parallel.mixture(
                tokens,
                weights,
                experts,
                is_token,
                params,
                param_axes={name: AXES[name] for name in params},
                compute=compute,
                num_experts=E,
                partition=where,
                capacity_factor=factor,
                **options,
            )
            return (out * grad).sum(), (out, kept)

        gradient = jax.value_and_grad(value, (0, 1, 2), has_aux=True)
        (_, (out, kept)), grads = gradient(params, tokens, weights)
        return out, grads, kept

    return run


def close(seen, true):
    """Relative to the largest number of each array."""

    def leaf(path, a, b):
        bar = SAME * max(float(np.abs(b).max()), 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=bar, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(leaf, seen, true)


def identical(seen, true):
    jax.tree.map(np.testing.assert_array_equal, seen, true)


MESHES = {
    "expert 8": (rules.EXPERT, dict(expert=8), 1.0),
    "expert 4, tensor 2": (rules.EXPERT, dict(expert=4, tensor=2), None),
    "expert 2, tensor 2, data 2": (rules.EXPERT, dict(expert=2, tensor=2, data=2), 0.6),
    "rows over expert, sequence over seq": (rules.EXPERT, dict(expert=4, seq=2), 1.0),
    "sequence over expert and seq": (rules.LONG_CONTEXT, dict(fsdp=2, expert=2, seq=2), 0.6),
    "all tokens everywhere": (rules.SERVING, dict(expert=4, tensor=2), 1.0),
    "no expert axis": (rules.TENSOR, dict(fsdp=4, tensor=2), 1.0),
}

# Over two devices the default is 'gathered': tests/test_experts_gathered.py.
FORMS = [(name, None) for name in MESHES] + [(name, "padded") for name in list(MESHES)[2:5:2]]


@pytest.mark.parametrize(("name", "exchange"), FORMS)
def test_output_gradients_and_drops_are_those_of_one_device(name, exchange):
    ours, sizes, factor = MESHES[name]
    run = compiled(partition(ours, **sizes), factor=factor, exchange=exchange)
    inputs = problem()
    for experts, is_token in routes().values():
        out, grads, kept = run(*inputs, experts, is_token)
        true_kept = np.ones(experts.shape, bool)
        if factor is None:
            assert kept is None
        else:
            true_kept = kept_one_by_one(experts, is_token, factor)
            assert not true_kept.all()
            np.testing.assert_array_equal(kept, true_kept)
        close((out, grads), wanted(*inputs, experts, true_kept))


def test_it_is_the_layer():
    """Router, padding, capacity and all: `MoE` with its products done by `mixture`."""
    config = small_config("l", num_experts=8)
    params = jax.tree.map(
        lambda leaf: leaf[0], random_params(config, 5)["blocks"]["layer_0"]["moe"]
    )
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, 6, config.embed_dim)).astype(np.float32)
    grad, real = rng.normal(size=x.shape).astype(np.float32), rng.random(x.shape[:2]) < 0.8
    module = _modules(config).blocks.layer_0.moe

    def layer(params, x):
        out, stats = layers.bind(module, params)(
            x, real, keep_logits=False, implementation=None, capacity_factor=0.8, statistics=True
        )
        return (out * grad).sum(), (out, stats.num_dropped)

    def spread(where, params, x):
        weights, experts, *_ = layers.bind(module, params).router(x)
        out, kept = parallel.mixture(
            x,
            weights,
            experts,
            jnp.asarray(real),
            {name: params[f"{name}_proj"] for name in EXPERT_WEIGHTS},
            param_axes={name: AXES[name] for name in EXPERT_WEIGHTS},
            compute=swiglu_experts,
            num_experts=8,
            partition=where,
            capacity_factor=0.8,
        )
        return (out * grad).sum(), (out, (real[..., None] & ~kept).sum())

    def run(f):
        (_, (out, dropped)), grads = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, x)
        return out, grads, dropped

    true = run(layer)
    assert true[2] > 5
    identical(run(functools.partial(spread, None)), true)
    close(run(functools.partial(spread, partition(rules.EXPERT, fsdp=2, expert=4))), true)


def test_counts_of_a_larger_batch():
    """Four choices of 16 experts, with rows and sequence split."""
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(8, 64, 16)) - 0.3 * np.arange(16)
    experts = np.argsort(-scores, axis=-1)[..., :4].astype(np.int32)
    is_token = rng.random((8, 64)) < 0.9
    spread = functools.partial(
        parallel.within_capacity,
        num_experts=16,
        capacity_factor=1.1,
        batch_axes=("data", "expert"),
        seq_axes=("seq",),
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=2, seq=2))
    spec = jax.sharding.PartitionSpec(("data", "expert"), "seq")
    run = jax.shard_map(spread, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    kept = jax.jit(run)(experts, is_token)
    np.testing.assert_array_equal(kept, kept_one_by_one(experts, is_token, 1.1, 16))
    assert 0 < kept.sum() < kept.size


@functools.cache
def exact_program(groups=1, factor=None):
    where = partition(rules.EXPERT, fsdp=2, expert=4)
    run = compiled(where, compute=linear_experts, groups=groups, factor=factor)
    params, *rest = whole_problem()
    square = jax.device_put(params["square"], where.sharding(AXES["square"], (E, D, D)))
    inputs = {"square": square}, *rest
    return inputs, run.lower(*inputs, *routes()["even"]).compile()


@functools.cache
def exact(groups=1, factor=None):
    """Everything about whole numbers, where rounding hides nothing, for each of the routes."""
    inputs, run = exact_program(groups, factor)
    return [run(*inputs, *route) for route in routes().values()]


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_change_no_bit(groups):
    assert float(jnp.abs(exact()[0][0]).max()) > 50
    identical(exact(groups), exact())


def test_room_for_all_drops_nothing():
    for (out, grads, kept), (true_out, true_grads, _), (_, is_token) in zip(
        exact(factor=E / K), exact(), routes().values(), strict=True
    ):
        np.testing.assert_array_equal(kept, np.broadcast_to(is_token[..., None], kept.shape))
        if is_token.all():
            identical((out, grads), (true_out, true_grads))
        real = is_token[..., None]
        identical(np.where(real, out, 0), np.where(real, true_out, 0))


def ancestors(jaxpr):
    """For each exchange of rows, how many others it depends on."""
    before, counts = {}, []
    for eqn in jaxpr.eqns:
        needed = set()
        for var in eqn.invars:
            needed |= before.get(id(var), set())
        if " all_to_all[" in str(eqn):  # within the rule for its gradient
            counts.append(len(needed))
            needed = needed | {id(eqn)}
        before |= {id(var): needed for var in eqn.outvars}
    return counts


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_do_not_wait_for_each_other(groups):
    """A dispatch depends on no exchange of rows, a return on its own dispatch alone."""
    where = partition(rules.EXPERT, fsdp=2, expert=4)
    params, tokens, weights, _ = whole_problem()
    traced = jax.make_jaxpr(
        lambda *args: parallel.mixture(
            *args,
            params,
            param_axes={name: AXES[name] for name in params},
            compute=linear_experts,
            num_experts=E,
            partition=dataclasses.replace(where, expert_groups=groups),
        )
    )(tokens, weights, *routes()["even"])
    (body,) = (eqn.params["jaxpr"] for eqn in traced.eqns if eqn.primitive.name == "shard_map")
    assert sorted(ancestors(body)) == [0] * groups + [1] * groups


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_ragged_exchange_moves_the_same_rows(pieces, monkeypatch):
    """The device primitive simulated, since CPU has none: output and every gradient."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", simulated_ragged_all_to_all)
    monkeypatch.setattr(exchange, "_pieces", lambda axis_name, lanes: pieces)
    where = partition(rules.EXPERT, fsdp=2, expert=4)
    run = compiled(where, factor=1.0, exchange="ragged")
    inputs = problem()
    for experts, is_token in routes().values():
        out, grads, kept = run(*inputs, experts, is_token)
        np.testing.assert_array_equal(kept, kept_one_by_one(experts, is_token, 1.0))
        close((out, grads), wanted(*inputs, experts, kept))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_ragged_exchange_lowers_for_accelerators(platform):
    """There and back, and both again in the backward pass; the products are those of XLA."""
    where = partition(rules.EXPERT, fsdp=2, expert=4)
    run = compiled(where, compute=linear_experts, groups=2, exchange="ragged")
    text = (
        run.trace(*whole_problem(), *routes()["even"])
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    assert len(re.findall(r"custom_call @ragged_all_to_all", text)) == 2 * 4
    assert "stablehlo.all_to_all" not in text


def collectives(text, kind):
    """Numbers of elements in the results of each collective of this kind."""
    found = []
    for line in text.splitlines():
        result, called, _ = line.partition(f" {kind}(")
        shapes = re.findall(r"\w+\[([\d,]*)\]", result) if called else []
        found += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return found


def test_no_device_ever_has_the_weights_of_all_experts():
    text = exact_program(1, None)[1].as_text()
    here = E // 4 * D * D
    weights = [size for size in collectives(text, "all-gather") if size >= here // 2]
    assert weights
    assert set(weights) == {here}, "ZeRO-3 gathers the experts of this device alone"
    block = B * T // 8 * min(K, E // 4) * D
    exchanges = [size for size in collectives(text, "all-to-all") if size % block == 0]
    assert len(exchanges) >= 4
    assert max(exchanges) <= 4 * block
    assert max(collectives(text, "all-reduce"), default=0) < here, "gradients are scattered"


def test_what_is_refused():
    where = partition(rules.EXPERT, fsdp=2, expert=4)
    args = (*problem(), *routes()["even"])
    with pytest.raises(ValueError, match="8 tokens on each device cannot be cut into groups=3"):
        compiled(where, groups=3)(*args)
    params = {name: array[:6] for name, array in args[0].items()}
    with pytest.raises(ValueError, match=r"experts.*'experts' has size 6, which 4 devices"):
        compiled(where)(params, *args[1:])
    short = [array[:6] for array in args[1:]]
    with pytest.raises(ValueError, match=r"tokens: 'batch' has size 6, which 8 devices"):
        compiled(where)(args[0], *short)
    two = dataclasses.replace(rules.EXPERT, experts=("expert", "tensor"), expert_mlp=())
    with pytest.raises(ValueError, match=r"split 'experts' over .*over one mesh axis: name one"):
        compiled(partition(two, expert=4, tensor=2))(*args)
    both = dataclasses.replace(rules.EXPERT, expert_mlp=("fsdp",), expert_embed=())
    with pytest.raises(ValueError, match=r"'expert_mlp' and the tokens over \{'fsdp'\}; devices"):
        compiled(partition(both, expert=4, fsdp=2))(*args)
    with pytest.raises(ValueError, match=r"exchange is 'sparse'; choose None or one of \('ragged'"):
        compiled(where, exchange="sparse")(*args)
