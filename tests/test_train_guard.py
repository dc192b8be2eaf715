"""Bad steps change nothing; what bad is; the state and its initialisation."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params, random_tokens, small_config

import mmx
from mmx.model import param_specs
from mmx.training import losses
from mmx.training import step as stepping
from mmx.training.metrics import to_record
from mmx.training.optimizer import OptimizerOptions, decays
from mmx.training.schedule import LearningRate, constant
from mmx.training.state import (
    WINDOW,
    abstract_state,
    deepnorm_scaled,
    init_guard,
    init_state,
    judge,
)
from mmx.training.step import StepOptions, make_train_step

pytestmark = pytest.mark.usefixtures("quick_programs")
CONFIG = small_config("ls")
SHAPE = (2, 4, 16)
# Small enough that a hundred steps do not teach the model anything about random tokens.
OPTIONS = StepOptions(LearningRate((constant(10**6, 1e-5),)), compute_dtype="float32")
POISON = 7  # a batch that begins so gets gradients of NaN


def digest(tree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    content = b"".join(str(path).encode() + np.asarray(x).tobytes() for path, x in leaves)
    return hashlib.sha256(content).hexdigest()


def poisoned_loss_parts(params, batch, config, **rest):
    """`loss_parts` with NaN for gradients, and a finite loss, where the first token is POISON."""
    factor = jnp.where(batch["tokens"][0, 0] == POISON, jnp.nan, 1.0)
    poison = poison_gradient(params, factor)
    return losses.loss_parts(poison, batch, config, **rest)


@jax.custom_vjp
def poison_gradient(tree, factor):
    return tree


poison_gradient.defvjp(
    lambda tree, factor: (tree, factor),
    lambda factor, grads: (jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), None),
)


@pytest.fixture(scope="module")
def step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "loss_parts", poisoned_loss_parts)
        made = make_train_step(CONFIG, OPTIONS)
        made(new_state(), good(0))  # compiled while patched
        yield made


def new_state():
    # A head that is sure of itself, so that there are labels it finds very unlikely.
    params = random_params(CONFIG, 1)
    params["head"]["kernel"] *= 2
    return init_state(CONFIG, OPTIONS.optimizer, 0, params=params)


def good(seed: int) -> dict[str, np.ndarray]:
    tokens = random_tokens(CONFIG, (2 * 4, 16), seed).reshape(SHAPE)
    tokens[:, 0, 0] = 1
    return {"tokens": tokens, "labels": tokens.copy()}


def nan_gradients(seed: int) -> dict[str, np.ndarray]:
    batch = good(seed)
    batch["tokens"][seed % 2, 0, 0] = POISON  # in the first or the second micro-batch
    return batch


def nan_loss(seed: int) -> dict[str, np.ndarray]:
    batch = good(seed)
    batch["tokens"][0, 1, 2] = 10**6  # out of range: NaN from there on
    return batch


def spike(seed: int) -> dict[str, np.ndarray]:
    """Labels that the model finds least likely."""
    batch = good(seed)
    forward = jax.jit(mmx.forward, static_argnames="config")
    logits = [forward(new_state().params, rows, config=CONFIG).logits for rows in batch["tokens"]]
    worst = np.argmin(np.asarray(logits), axis=-1).astype(np.int32)
    batch["labels"][:, :, 1:] = worst[:, :, :-1]
    return batch


def test_fifty_nan_gradients_and_twenty_spikes_change_nothing(step):
    kinds = [nan_gradients] * 40 + [nan_loss] * 10 + [spike] * 20 + [good] * 60
    np.random.default_rng(0).shuffle(kinds)
    kinds = [good] * 40 + kinds
    state, skipped, in_a_row = new_state(), 0, 0
    for number, kind in enumerate(kinds):
        before = digest((state.params, state.opt_state)), digest(state.params)
        window = digest((state.guard.losses, state.guard.grad_norms))
        state, metrics = step(state, kind(number))
        after = digest((state.params, state.opt_state)), digest(state.params)
        record = to_record(metrics)
        bad = kind is not good
        skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
        assert record["skipped"] == bad, f"step {number}: {kind.__name__}, {record}"
        assert record["num_skipped"] == skipped
        assert record["skipped_in_a_row"] == in_a_row
        assert int(state.step) == number + 1
        assert int(state.opt_state[1].count) == number + 1 - skipped
        assert (before[0] == after[0]) == bad
        assert (before[1] == after[1]) == bad
        assert (window == digest((state.guard.losses, state.guard.grad_norms))) == bad
        assert (record["update_norm"] == 0) == bad
        assert np.isfinite(record["param_norm"])
        if kind is nan_gradients:
            assert record["grad_norm"] is None
            assert record["loss"] < 10, "only the gradient is bad"
        if kind is spike:
            assert record["loss"] is not None
    assert skipped == 70
    assert step.num_compiles == 1


def test_without_targets_there_is_no_step(step):
    state = new_state()
    before = digest((state.params, state.opt_state))
    batch = good(0)
    batch["labels"][:] = -100
    state, metrics = step(state, batch)
    assert digest((state.params, state.opt_state)) == before
    assert metrics["skipped"] == 1
    assert metrics["num_targets"] == 0
    assert int(state.guard.num_recorded) == 0


# ---------------------------------------------------------------- what is bad


_judge = jax.jit(judge, static_argnames=("sigma", "min_recorded"))


def filled(losses, norms=None):
    guard = init_guard()
    for loss, norm in zip(losses, norms if norms is not None else losses, strict=True):
        _, guard = _judge(guard, jnp.float32(loss), jnp.float32(norm), sigma=1e9, min_recorded=32)
    return guard


def is_bad(guard, loss, norm, sigma=6.0, min_recorded=32) -> bool:
    return bool(
        _judge(guard, jnp.float32(loss), jnp.float32(norm), sigma=sigma, min_recorded=min_recorded)[
            0
        ]
    )


@pytest.mark.parametrize("steps", [40, 128, 200])
def test_six_sigma_of_the_last_128(steps):
    rng = np.random.default_rng(steps)
    values, norms = rng.normal(3, 0.1, steps), rng.normal(1, 0.05, steps)
    guard = filled(values, norms)
    limits = [x[-WINDOW:].mean() + 6 * x[-WINDOW:].std() for x in (values, norms)]
    for place, typical in ((0, (3, 1)), (1, (3, 1))):
        for factor, bad in ((0.9999, False), (1.0001, True)):
            value = list(typical)
            value[place] = limits[place] * factor
            assert is_bad(guard, *value) == bad
    assert not is_bad(guard, 0.0, 0.0), "low is never bad"
    assert is_bad(guard, limits[0] * 0.99, 1, sigma=3.0)


def test_spikes_need_a_window_and_what_is_not_finite_does_not():
    guard = filled([3.0, 3.1] * 15 + [3.0])
    assert not is_bad(guard, 100, 3)
    assert is_bad(guard, 100, 3, min_recorded=31)
    for bad in (np.nan, np.inf, -np.inf):
        assert is_bad(init_guard(), bad, 1)
        assert is_bad(init_guard(), 1, bad)


def test_equal_losses_leave_room_for_a_little_more():
    guard = filled([2.0] * 50)
    assert not is_bad(guard, 2.0 + 0.9 * 6 * 2e-3, 2)
    assert is_bad(guard, 2.0 + 1.1 * 6 * 2e-3, 2)


# ---------------------------------------------------------------- state


def test_abstract_state_is_the_state():
    real = init_state(CONFIG, OPTIONS.optimizer, 0)
    abstract = abstract_state(CONFIG, OPTIONS.optimizer)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)] for x in (real, abstract)]
    assert shapes[0] == shapes[1]
    for leaf in jax.tree.leaves((real.params, real.opt_state[1].mu, real.opt_state[1].nu)):
        assert leaf.dtype == jnp.float32
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(real)]
    assert len(set(pointers)) == len(pointers), "every leaf can be donated"


def test_seeds():
    one, same, other = (init_state(CONFIG, OPTIONS.optimizer, seed) for seed in (0, 0, 1))
    assert digest(one) == digest(same)
    assert digest(one.params) != digest(other.params)
    assert digest(one.rng) != digest(other.rng)


def test_matrices_decay_and_nothing_else():
    for tied in (False, True):
        config = small_config("lsls", tie_embeddings=tied, shared_expert_dim=4)  # scales are 2-D
        mask = jax.tree_util.tree_leaves_with_path(decays(config))
        free = {
            jax.tree_util.keystr(path, simple=True, separator="/") for path, ok in mask if not ok
        }
        layers = [f"blocks/layer_{i}/{n}_norm/scale" for i in (0, 1) for n in ("attention", "mlp")]
        inner = "blocks/layer_0/attention/norm/scale"
        assert free == {"embed/embedding", "final_norm/scale", inner, *layers}


def test_deepnorm_scales_values_outputs_and_experts():
    config = small_config("ls", shared_expert_dim=4)
    params = random_params(config, 0)
    scaled = deepnorm_scaled(params, config)
    beta = (8 * 2) ** -0.25
    seen = {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(scaled), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        seen[name.removeprefix("blocks/")] = np.unique(np.round(np.asarray(b / a), 5)).tolist()
    qkv = seen.pop("layer_0/attention/qkv_proj")
    assert qkv == [pytest.approx(beta, abs=1e-5), 1]
    ratio = scaled["blocks"]["layer_0"]["attention"]["qkv_proj"]
    ratio = np.asarray(ratio / params["blocks"]["layer_0"]["attention"]["qkv_proj"])
    np.testing.assert_allclose(ratio[..., 2, :], beta, rtol=1e-6)
    np.testing.assert_array_equal(ratio[..., :2, :], 1)
    wanted = {f"layer_{i}/attention/out_proj" for i in (0, 1)} | {"layer_1/attention/v_proj"}
    for i in (0, 1):
        for part in ("moe", "moe/shared_expert"):
            wanted |= {f"layer_{i}/{part}/{n}_proj" for n in ("gate", "up", "down")}
    assert {name for name, ratios in seen.items() if ratios != [1]} == wanted
    assert all(seen[name] == [pytest.approx(beta, abs=1e-5)] for name in wanted)
    one = init_state(config, OptimizerOptions(), 0).params
    other = init_state(config, OptimizerOptions(), 0, initialisation="deepnorm").params
    jax.tree.map(np.testing.assert_array_equal, deepnorm_scaled(one, config), other)


def test_xavier_spread():
    params = init_state(CONFIG, OptimizerOptions(), 0).params
    down = params["blocks"]["layer_0"]["moe"]["down_proj"]  # 1,152 numbers: known to 2 %
    assert float(down.std()) == pytest.approx((2 / (24 + 12)) ** 0.5, rel=0.08)
    assert jax.tree.structure(params) == jax.tree.structure(param_specs(CONFIG))


def test_bad_states_are_refused():
    with pytest.raises(ValueError, match="initialisation is 'he'; it must be 'xavier' or"):
        init_state(CONFIG, OptimizerOptions(), 0, initialisation="he")  # pyright: ignore
    with pytest.raises(ValueError, match="seed is -1; it must be at least 0"):
        init_state(CONFIG, OptimizerOptions(), -1)


def test_records_hold_no_nan():
    metrics = {"a": jnp.float32(1.5), "b": jnp.array([1, jnp.nan]), "c": jnp.float32(jnp.inf)}
    assert to_record(metrics) == {"a": 1.5, "b": [1.0, None], "c": None}
