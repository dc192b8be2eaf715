import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from golden_cases import close
from random_models import random_params, random_tokens, small_config
from sweeps import sweep
from truth_losses import balance_losses, cross_entropy, predictions, z_loss

import mmx
from mmx.model import param_specs

# The bars of the golden cases: fp32 rounding through a few layers, times five.
LOGITS = 5e-5
# A closer decision than this could fall the other way in fp32, and then nothing is comparable.
MARGIN = 1e-3
TRANSFORMERS = dict(slope_base="geometric", slope_layer_epsilon=1e-5)


@dataclass(frozen=True)
class Case:
    name: str
    pattern: str
    changes: dict[str, Any]
    seed: int = 0
    ids: tuple[tuple[int, ...], ...] | None = None
    mask: tuple[tuple[int, ...], ...] | None = None
    cached: bool = False


PACKED = (
    (1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3),
    (0, 0, 7, 7, 7, 0, 7, 7, 0, 0, 5, 5, 5, 5, 5, 0),
)
MASK = (
    (1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1),
    (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0),
)
CASES = (
    Case("one_lightning_layer", "l", dict(num_heads=3, num_kv_heads=1), cached=True),
    Case("one_softmax_layer", "s", dict(num_heads=6, num_kv_heads=3, rotary_dim=2), cached=True),
    Case("released_5_heads_k1", "lsll", dict(num_heads=5, num_kv_heads=1, num_experts_per_tok=1)),
    Case(
        "released_12_heads_all_experts",
        "llsl" + "llsl",
        dict(num_heads=12, num_kv_heads=4, num_experts_per_tok=4, tie_embeddings=True),
        cached=True,
    ),
    Case("released_packed_shared", "lls", dict(num_heads=6, shared_expert_dim=10), 1, PACKED),
    Case(
        "released_pre_norm_padded",
        "slsl",
        dict(num_heads=3, num_kv_heads=3, post_norm=False),
        mask=MASK,
        cached=True,
    ),
    Case(
        "transformers_3_heads",
        "slsl",
        dict(num_heads=3, num_kv_heads=3, rotary_dim=8, **TRANSFORMERS),
        ids=PACKED,
        mask=MASK,
    ),
    Case("transformers_all_lightning", "lll", dict(num_heads=6, **TRANSFORMERS), cached=True),
    Case(
        "transformers_all_softmax",
        "ss",
        dict(num_heads=12, num_kv_heads=2, rotary_dim=8, num_experts=1, num_experts_per_tok=1),
        mask=MASK,
        cached=True,
    ),
    Case(
        "everything_at_once",
        "lsl",
        dict(
            num_heads=5,
            num_kv_heads=5,
            post_norm=False,
            tie_embeddings=True,
            shared_expert_dim=6,
            num_experts=7,
            num_experts_per_tok=3,
            norm_epsilon=1e-2,
            lightning_norm_epsilon=1e-3,
        ),
        ids=PACKED,
        cached=True,
    ),
)


# One layer, or all of a kind, is within the others; `make test` has no time for what they repeat.
QUICK = (
    "released_12_heads_all_experts",
    "released_pre_norm_padded",
    "transformers_3_heads",
    "transformers_all_softmax",
    "everything_at_once",
)
WITH_GRADIENTS = ("released_packed_shared", "everything_at_once")


def _sweep(cases):
    return sweep(cases, lambda case: case.name in QUICK, name=lambda case: case.name)


def _setup(case: Case):
    config = small_config(case.pattern, **case.changes)
    params = random_params(config, case.seed)
    tokens = random_tokens(config, (2, 16), case.seed)
    ids, mask = (None if x is None else np.array(x, np.int32) for x in (case.ids, case.mask))
    true = truth.forward(params, tokens, config, mask=mask, segment_ids=ids)
    assert true.margin > MARGIN, f"choose another seed: {true.margin:.1e}"
    return config, params, tokens, ids, mask, true


@pytest.mark.parametrize("case", _sweep(CASES))
def test_forward(case):
    config, params, tokens, ids, mask, true = _setup(case)
    real = np.ones(tokens.shape, bool)
    real &= (ids != 0) if ids is not None else True
    real &= (mask != 0) if mask is not None else True
    cache = mmx.init_cache(config, 2, 20) if case.cached else None
    out = mmx.forward(
        params, tokens, config, mask=mask, segment_ids=ids, cache=cache, return_hidden=True
    )
    close(np.asarray(out.logits)[real], true.logits[real], LOGITS, "logits")
    close(np.asarray(out.hidden)[:, real], true.hidden[:, real], LOGITS, "hidden")
    close(np.asarray(out.aux.logits)[:, real], true.router_logits[:, real], LOGITS, "router_logits")
    if cache is not None:
        bar = 5e-5 * max(np.abs(true.states).max(initial=0), 1e-30)
        close(out.cache.lightning_states, true.states, bar, "lightning_states")
        np.testing.assert_array_equal(out.cache.num_slots, 16)


def _losses(params, config, tokens, ids, mask) -> float:
    """The total that mmx.loss should give, with both coefficients below."""
    true = truth.forward(params, tokens, config, mask=mask, segment_ids=ids)
    where = predictions(tokens, mask=mask, segment_ids=ids)
    real = np.ones(tokens.shape, bool) if ids is None else ids != 0
    real = real if mask is None else real & (mask != 0)
    balance, _ = balance_losses(true.router_logits, real, config.num_experts_per_tok)
    total = cross_entropy(true.logits, where) + BALANCE * balance
    return total + Z_LOSS * z_loss(true.logits, where)


BALANCE, Z_LOSS = 0.1, 0.01


@pytest.mark.parametrize("case", _sweep(c for c in CASES if c.name in WITH_GRADIENTS))
def test_every_gradient(case):
    """Each parameter's gradient along a random direction against differences of the truth."""
    config, params, tokens, ids, mask, _ = _setup(case)
    batch = {"tokens": tokens}
    batch |= {} if ids is None else {"segment_ids": ids}
    batch |= {} if mask is None else {"mask": mask}
    loss = jax.value_and_grad(mmx.loss, has_aux=True)
    (total, _), grads = jax.jit(loss, static_argnames=("config", "balance_coef", "z_loss_coef"))(
        params, batch, config=config, balance_coef=BALANCE, z_loss_coef=Z_LOSS
    )
    wide = truth.wide(params)
    close(total, _losses(wide, config, tokens, ids, mask), 1e-5, "total")

    rng = np.random.default_rng(1)
    step = 1e-5  # differences of float64: both errors stay below 1e-9
    leaves, tree = jax.tree.flatten(wide)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(wide)]
    for i, (path, grad) in enumerate(zip(paths, jax.tree.leaves(grads), strict=True)):
        direction = rng.standard_normal(grad.shape)
        direction /= np.linalg.norm(direction)

        def along(distance, i=i, direction=direction):
            moved = [*leaves[:i], leaves[i] + distance * direction, *leaves[i + 1 :]]
            return _losses(jax.tree.unflatten(tree, moved), config, tokens, ids, mask)

        wanted = (along(step) - along(-step)) / (2 * step)
        grad = np.asarray(grad, np.float64)
        bar = 5e-5 * np.abs(grad).max()
        close(np.sum(grad * direction), wanted, bar, jax.tree_util.keystr(path))


def test_initial_parameters_have_the_declared_spread():
    config = small_config("l")
    params = mmx.init_params(config, jax.random.key(0), dtype=jnp.bfloat16)
    for path, spec in jax.tree_util.tree_leaves_with_path(param_specs(config)):
        leaf = functools.reduce(lambda node, key: node[key.key], path, params)
        name = jax.tree_util.keystr(path)
        assert leaf.shape == spec.shape, name
        assert leaf.dtype == (jnp.float32 if spec.fp32 else jnp.bfloat16), name
        values = np.asarray(leaf, np.float64)
        if name.endswith("['scale']"):
            np.testing.assert_array_equal(values, 1)
        else:
            # Xavier: the deviation of n draws is known to 1/sqrt(2n); five of those.
            fans = {"embedding": (24, 24), "kernel": spec.shape[-2:]}.get(path[-1].key)
            wanted = spec.std if fans is None else (2 / sum(fans)) ** 0.5
            assert abs(values.std() / wanted - 1) < 5 / np.sqrt(2 * values.size), name


def test_bf16_stays_close_to_fp32():
    alpha = 3.5565588200778455  # Text-01's
    config = small_config(
        "lllllll" + "s",
        vocab_size=256,
        embed_dim=128,
        num_heads=8,
        head_dim=32,
        rotary_dim=16,
        num_experts=8,
        expert_dim=64,
        **dict.fromkeys(["lightning_alpha", "softmax_alpha", "mlp_alpha"], alpha),
        **dict.fromkeys(["lightning_beta", "softmax_beta", "mlp_beta"], 1.0),
    )
    params = random_params(config, 0, jnp.bfloat16)
    tokens = random_tokens(config, (32, 8), 0)
    outs = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        cache = mmx.init_cache(config, *tokens.shape, dtype)
        # The fp32 model has the rounded weights: what differs is the arithmetic.
        cast = jax.tree.map(
            lambda x, dtype=dtype: x if x.dtype == jnp.float32 else x.astype(dtype), params
        )
        out = mmx.forward(cast, tokens, config, cache=cache, return_hidden=True)
        assert out.logits.dtype == jnp.float32
        assert out.aux.logits.dtype == jnp.float32
        assert out.cache.lightning_states.dtype == jnp.float32
        assert out.hidden.dtype == out.cache.keys.dtype == dtype
        outs[dtype] = out
    seen, wanted = (np.asarray(out.logits, np.float64) for out in outs.values())
    router = [np.asarray(out.aux.logits) for out in outs.values()]
    ranked = [np.argsort(-logits, axis=-1)[..., :2] for logits in router]
    flipped = (np.sort(ranked[0]) != np.sort(ranked[1])).any(axis=-1)  # [layers, B, T]
    # A token that sits between two experts may go to the other one, and then is another token.
    # That must be rare, and first happen only where fp32 itself hardly tells the two apart.
    assert flipped.mean() < 0.02
    rows = flipped.any(axis=2)  # [layers, B]; within a row a flip reaches the tokens after it
    earlier = np.cumsum(rows, axis=0) - rows > 0
    descending = -np.sort(-router[1], axis=-1)
    gap = (descending[..., 1] - descending[..., 2])[flipped & ~earlier[..., None]]
    assert gap.max() < 0.1 * router[1].std()
    same = ~rows.any(axis=0)
    assert same.sum() >= 8
    # 16 branches, each with a few roundings of 2^-9 = 2e-3, add up as a walk to some 1.5e-2.
    difference = np.linalg.norm((seen - wanted)[same])
    assert difference <= 2e-2 * np.linalg.norm(wanted[same])
