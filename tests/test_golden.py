import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from golden_cases import (
    LOSS,
    NAMES,
    NEW_TOKENS,
    check_cached,
    check_forward,
    check_generated,
    check_outputs,
    close,
    golden,
    names_with,
)
from sweeps import sweep

import mmx
from mmx.convert import mapping

QUICK = ("text/p01_default_pattern", "text/p03_left_pad", "text/p06_block256_T700",
         "released/o2_bf16_4shards_zero_based")  # fmt: skip


def test_every_case_is_here():
    assert len(NAMES) == 11


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_is_the_golden_truth(name):
    # Two independent float64 implementations and transformers agree on what is right.
    case = golden(name)
    true = truth.forward(case.params, case.tokens, case.config, mask=case.mask)
    check_outputs(case, true.logits, true.hidden, true.router_logits)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_generation_without_a_cache(name):
    check_forward(name)


@pytest.mark.parametrize("name", sweep(NAMES, QUICK.__contains__))
def test_forward_into_a_cache(name):
    check_cached(name)


# The others go through an engine in test_engine.py; `generate` adds batches and their masks.
GENERATED = ("text/p04_right_pad", "released/o2_bf16_4shards_zero_based")


@pytest.mark.parametrize("name", sweep(GENERATED, "text/p04_right_pad".__eq__))
def test_generation(name):
    check_generated(name)


@pytest.mark.parametrize("name", sweep(["text/p03_left_pad", "text/p09_heads6_grads_leftpad"],
                                       "text/p03_left_pad".__eq__))  # fmt: skip
def test_generation_with_padding_anywhere(name):
    case = golden(name)
    batch, length = case.tokens.shape
    rng = np.random.default_rng(0)
    for _ in range(3):
        tokens = np.zeros((batch, length + 5), np.int32)
        mask = np.zeros_like(tokens)
        for row in range(batch):
            prompt = case.tokens[row, case.real[row]]
            at = np.sort(rng.choice(length + 5, len(prompt), replace=False))
            tokens[row, at], mask[row, at] = prompt, 1
        seen = mmx.generate(case.params, tokens, case.config, mask=mask, max_new_tokens=NEW_TOKENS)
        np.testing.assert_array_equal(seen, case.arrays["generated"])


def _batch(case):
    batch = {"tokens": jnp.asarray(case.tokens), "labels": jnp.asarray(case.arrays["labels"])}
    return batch if case.mask is None else {**batch, "mask": jnp.asarray(case.mask)}


def _check_losses(case, total, parts):
    close(parts["cross_entropy"], case.arrays["loss_ce"][0], LOSS, "loss_ce")
    close(parts["balance_loss"], case.arrays["aux_loss"][0], LOSS, "aux_loss")
    close(total, case.arrays["loss_total"][0], LOSS, "loss_total")


WITH_GRADIENTS = names_with("grad.")


@pytest.mark.parametrize("name", [n for n in names_with("loss_") if n not in WITH_GRADIENTS])
def test_loss(name):
    case = golden(name)
    loss = jax.jit(mmx.loss, static_argnames="config")
    _check_losses(case, *loss(case.params, _batch(case), config=case.config))


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients(name):
    case = golden(name)
    loss = jax.value_and_grad(mmx.loss, has_aux=True)
    (total, parts), grads = jax.jit(loss, static_argnames="config")(
        case.params, _batch(case), config=case.config
    )
    _check_losses(case, total, parts)
    recorded = {
        key.removeprefix("grad."): array
        for key, array in case.arrays.items()
        if key.startswith("grad.")
    }
    for entry in mapping.entries(case.config, "separate"):
        if entry.key in recorded:
            leaf = np.asarray(mapping.find(grads, entry.path))
            wanted = recorded.pop(entry.key)
            bar = 5e-5 * np.abs(wanted).max()
            close(entry.from_param(leaf[entry.index]), wanted, bar, entry.key)
    assert not recorded, f"no parameter for {sorted(recorded)}"
