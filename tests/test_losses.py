import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
import truth_losses
from golden_cases import close
from random_models import random_params, small_config

import mmx
from mmx.nn.moe import RouterStats
from mmx.training import losses

# fp32 means of numbers of about 5: a few roundings of 6e-8 each.
SAME = 1e-5
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (3, 7, 11)).astype(np.float32)
TOKENS = RNG.integers(0, 11, (3, 7)).astype(np.int32)
LABELS = np.where(RNG.random((3, 7)) < 0.4, -100, TOKENS).astype(np.int32)
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0], [1] * 7], np.int32)
IDS = np.array([[1, 1, 1, 2, 2, 2, 2], [0, 3, 3, 0, 3, 3, 0], [5, 6, 7, 7, 8, 8, 8]], np.int32)
BATCHES = {
    "tokens": {},
    "labels": dict(labels=LABELS),
    "mask": dict(mask=MASK),
    "packed": dict(segment_ids=IDS),
    "all": dict(labels=LABELS, mask=MASK, segment_ids=IDS),
}


@pytest.mark.parametrize("rest", BATCHES.values(), ids=BATCHES)
def test_targets_cross_entropy_and_z_loss(rest):
    where = truth_losses.predictions(TOKENS, **rest)
    arrays = {name: jnp.asarray(array) for name, array in {"tokens": TOKENS, **rest}.items()}
    targets, counted = losses.next_token_targets(arrays)
    assert {(b, t, int(targets[b, t])) for b, t in np.argwhere(np.asarray(counted))} == set(where)
    seen = losses.cross_entropy(LOGITS, targets, counted)
    close(seen, truth_losses.cross_entropy(LOGITS, where), SAME, "cross_entropy")
    close(losses.z_loss(LOGITS, counted), truth_losses.z_loss(LOGITS, where), 1e-4, "z_loss")  # 40


def test_gradients_are_softmax_minus_one_hot():
    where = truth_losses.predictions(TOKENS, labels=LABELS)
    targets, counted = losses.next_token_targets({"tokens": TOKENS, "labels": LABELS})
    of_entropy = np.zeros(LOGITS.shape)
    of_z = np.zeros(LOGITS.shape)
    for b, t, y in where:
        share = truth.softmax(LOGITS[b, t].astype(np.float64))
        of_entropy[b, t] = share / len(where)
        of_entropy[b, t, y] -= 1 / len(where)
        of_z[b, t] = 2 * truth_losses.log_sum_exp(LOGITS[b, t]) * share / len(where)
    close(jax.grad(losses.cross_entropy)(LOGITS, targets, counted), of_entropy, 1e-7, "entropy")
    close(jax.grad(losses.z_loss)(LOGITS, counted), of_z, 1e-6, "z")


def test_nothing_to_predict_costs_nothing():
    targets, counted = losses.next_token_targets({"tokens": TOKENS[:, :1]})
    for loss in (
        lambda x: losses.cross_entropy(x, targets, counted),
        lambda x: losses.z_loss(x, counted),
    ):
        value, grad = jax.value_and_grad(loss)(LOGITS[:, :1])
        assert value == 0
        np.testing.assert_array_equal(grad, 0)


def test_huge_logits_stay_finite():
    logits = np.full((1, 2, 3), 3e4, np.float32)
    logits[0, 0, 1] = -3e4
    counted = np.array([[True, False]])
    seen = losses.cross_entropy(logits, np.array([[1, 0]]), counted)
    close(seen, 6e4 + np.log(2), 1e-2, "cross_entropy")  # fp32 at 6e4 has steps of 4e-3


@pytest.mark.parametrize("per_token", [1, 2, 5])
def test_balance_losses(per_token):
    router_logits = RNG.normal(0, 2, (3, 2, 9, 5))
    real = RNG.random((2, 9)) < 0.6
    flat = real.reshape(-1)
    probabilities = truth.softmax(router_logits).reshape(3, 18, 5)[:, flat]
    ranks = np.argsort(np.argsort(-router_logits, axis=-1), axis=-1).reshape(3, 18, 5)[:, flat]
    stats = RouterStats(
        tokens_per_expert=jnp.asarray((ranks < per_token).sum(axis=1), jnp.float32),
        probability_sum=jnp.asarray(probabilities.sum(axis=1), jnp.float32),
        num_tokens=jnp.full(3, flat.sum(), jnp.float32),
        logits=None,
    )
    checkpoint, paper = truth_losses.balance_losses(router_logits, real, per_token)
    close(losses.checkpoint_balance_loss(stats), checkpoint, SAME, "checkpoint")
    close(losses.paper_balance_loss(stats), paper, SAME, "paper")


def test_perfect_balance_gives_k_and_k_over_e_squared():
    experts, per_token, layers, tokens = 8, 2, 3, 40
    even = jnp.full((layers, experts), tokens / experts)
    stats = RouterStats(per_token * even, even, jnp.full(layers, float(tokens)), None)
    close(losses.checkpoint_balance_loss(stats), per_token, SAME, "checkpoint")
    close(losses.paper_balance_loss(stats), layers * per_token / experts**2, SAME, "paper")


# ---------------------------------------------------------------- mmx.loss

CONFIG = small_config("ls", vocab_size=11, router_aux_loss_coef=0.25)
PARAMS = random_params(CONFIG, 3)


_loss = jax.jit(mmx.loss, static_argnames=("config", "balance_loss"))


@pytest.mark.parametrize(("name", "balance"), [("tokens", "checkpoint"), ("all", "paper")])
def test_the_total_is_the_sum_of_its_parts(name, balance):
    rest = BATCHES[name]
    tokens, real = TOKENS, np.ones(TOKENS.shape, bool)
    arrays = {name: rest.get(name) for name in ("mask", "segment_ids")}
    for array in arrays.values():
        real = real if array is None else real & (array != 0)
    true = truth.forward(PARAMS, tokens, CONFIG, **arrays)
    where = truth_losses.predictions(tokens, **rest)
    both = truth_losses.balance_losses(true.router_logits, real, CONFIG.num_experts_per_tok)
    wanted = {
        "cross_entropy": truth_losses.cross_entropy(true.logits, where),
        "balance_loss": both[["checkpoint", "paper"].index(balance)],
        "z_loss": truth_losses.z_loss(true.logits, where),
        "num_targets": len(where),
    }
    batch = {"tokens": tokens, **rest}
    total, parts = _loss(PARAMS, batch, config=CONFIG, balance_loss=balance, z_loss_coef=0.01)
    assert parts.keys() == wanted.keys()
    for name, value in wanted.items():
        close(parts[name], value, SAME * max(1, value), name)
    entropy, balance_loss, z_loss, _ = wanted.values()
    close(total, entropy + 0.25 * balance_loss + 0.01 * z_loss, SAME, "total")


def test_coefficients():
    batch = {"tokens": TOKENS}

    def total(**coefficients):
        return _loss(PARAMS, batch, config=CONFIG, **coefficients)

    _, parts = total(balance_coef=0.0, z_loss_coef=0.0)
    for balance, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-0.5, 2.0)):
        value, _ = total(balance_coef=balance, z_loss_coef=z)
        wanted = parts["cross_entropy"] + balance * parts["balance_loss"] + z * parts["z_loss"]
        close(value, wanted, 1e-4, "total")  # the z-loss is about 10


def test_packing_averages_the_losses_of_the_samples():
    def entropy(batch):
        _, parts = _loss(PARAMS, batch, config=CONFIG)
        return float(parts["cross_entropy"]), float(parts["num_targets"])

    packed, count = entropy({"tokens": TOKENS, "segment_ids": IDS})
    # The samples of all rows, each in a row of its own and padded on the right.
    samples = [(row, at) for row in range(3) for at in truth.samples(IDS[row])]
    tokens, mask = np.zeros((len(samples), 7), np.int32), np.zeros((len(samples), 7), np.int32)
    for number, (row, at) in enumerate(samples):
        tokens[number, : len(at)], mask[number, : len(at)] = TOKENS[row, at], 1
    separate, targets = entropy({"tokens": tokens, "mask": mask})
    # Padding inside a sample (row 1) hides one target from the packed batch.
    hidden = truth.forward(PARAMS, TOKENS, CONFIG, segment_ids=IDS).logits[1, 2]
    lost = truth_losses.log_sum_exp(hidden) - hidden[TOKENS[1, 4]]
    assert targets == count + 1
    close(packed * count + lost, separate * targets, SAME * targets, "sum over the targets")


BAD = [
    (dict(batch={}), r"batch has the keys \[\]; it must have 'tokens'"),
    (dict(batch={"tokens": TOKENS, "attention_mask": MASK}), "attention_mask.*'labels'"),
    (dict(balance_loss="mixtral"), "balance_loss is 'mixtral'; it must be 'checkpoint' or 'paper'"),
    (
        dict(batch={"tokens": TOKENS, "labels": LABELS[:, :5]}),
        r"labels have shape \(3, 5\); tokens have \(3, 7\)",
    ),
    (
        dict(batch={"tokens": TOKENS, "labels": np.where(LABELS == -100, -1, LABELS)}),
        r"labels contain -1; they must be ids in \[0, vocab_size=11\), or -100 where none counts",
    ),
    (
        dict(batch={"tokens": TOKENS, "labels": TOKENS + 100}),
        r"labels contain 1\d\d; they must be ids",
    ),
    (dict(batch={"tokens": TOKENS, "mask": MASK[:2]}), r"mask has shape \(2, 7\)"),
    (dict(batch={"tokens": TOKENS + 11}), r"ids must be in \[0, vocab_size=11\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change, message):
    arguments = dict(batch={"tokens": TOKENS}) | change
    with pytest.raises(ValueError, match=message):
        mmx.loss(PARAMS, arguments.pop("batch"), CONFIG, **arguments)
