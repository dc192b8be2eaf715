"""The training step against `mmx.loss`, a float64 AdamW and the float64 model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
import truth_losses
from golden_cases import close
from random_models import random_params, small_config

import mmx
from mmx.training import step as stepping
from mmx.training.metrics import to_record
from mmx.training.optimizer import OptimizerOptions
from mmx.training.schedule import LearningRate, Piece, constant
from mmx.training.state import init_state
from mmx.training.step import StepOptions, make_train_step, stack_micro_batches

pytestmark = pytest.mark.usefixtures("quick_programs")
# fp32 gradients of about 0.1 summed in another order.
SAME = 1e-6
CONFIG = small_config("ls", vocab_size=20)
RATE = LearningRate((Piece(4, 0.0, 4e-3), constant(10, 2e-3)))
OPTIONS = StepOptions(
    RATE,
    balance_coef=0.0,
    z_loss_coef=0.01,
    compute_dtype="float32",
    num_sources=3,
    spike_sigma=float("inf"),
)


def make_batch(seed: int, *, micro_batches=4, rows=2, length=9) -> dict[str, np.ndarray]:
    """Packed rows with padding, three sources, and ever more ignored labels from first to last."""
    rng = np.random.default_rng(seed)
    shape = (micro_batches, rows, length)
    ids = np.sort(rng.integers(0, 4, shape), axis=-1).astype(np.int32)
    tokens = rng.integers(0, CONFIG.vocab_size, shape, dtype=np.int32)
    ignored = rng.random(shape) < np.linspace(0.05, 0.8, micro_batches)[:, None, None]
    return {
        "tokens": tokens,
        "labels": np.where(ignored, -100, tokens).astype(np.int32),
        "segment_ids": ids,
        "sources": np.where(ids > 0, ids % 3, -1).astype(np.int32),
    }


def one_large(batch, count):
    """The first micro-batches as one batch without the sources; the others become padding."""
    large = {n: a.reshape(-1, a.shape[2]).copy() for n, a in batch.items() if n != "sources"}
    large["segment_ids"][count * batch["tokens"].shape[1] :] = 0
    return large


def all_close(seen, wanted, bar, what):
    jax.tree.map(lambda a, b: close(a, b, bar, what), seen, wanted)


def new_state(seed=0, options=OPTIONS, config=CONFIG):
    return init_state(config, options.optimizer, 3, params=random_params(config, seed))


@pytest.fixture(scope="module")
def step():
    return make_train_step(CONFIG, OPTIONS)


_large_gradient = jax.jit(
    jax.value_and_grad(
        lambda params, batch: mmx.loss(
            params, batch, CONFIG, balance_coef=0.0, z_loss_coef=0.01, remat="none"
        ),
        has_aux=True,
    )
)


def test_accumulated_gradients_are_those_of_the_large_batch():
    accumulate = jax.jit(
        lambda params, batch, count: stepping._accumulate(
            params, batch, count, CONFIG, OPTIONS, None
        )
    )
    batch, params = make_batch(0), random_params(CONFIG, 0)
    counts = []
    for count in (1, 2, 3, 4):
        grads, sums, targets = accumulate(params, batch, np.int32(count))
        (total, parts), wanted = _large_gradient(params, one_large(batch, count))
        close(sums.loss, total, SAME * 5, f"loss of about 5, {count}")
        assert targets == parts["num_targets"]
        counts.append(float(targets))
        all_close(grads, wanted, SAME, f"gradient, {count}")
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
        assert largest > 0.05, "the bar is far below the gradients"
    shares = np.diff([0, *counts]) / counts[-1]
    assert shares.max() > 3 * shares.min(), "micro-batches weigh differently"


def test_balance_loss_is_averaged_over_micro_batches():
    config = small_config("l", vocab_size=20)
    options = dataclasses.replace(OPTIONS, balance_coef=0.5, z_loss_coef=0.0)
    batch, params = make_batch(1, micro_batches=3), random_params(config, 1)
    grads, sums, targets = jax.jit(
        lambda params, batch: stepping._accumulate(
            params, batch, jnp.int32(3), config, options, None
        )
    )(params, batch)
    single = jax.jit(
        jax.value_and_grad(
            lambda params, batch: mmx.loss(params, batch, config, balance_coef=0.5), has_aux=True
        )
    )
    total, balance, wanted = 0.0, 0.0, jax.tree.map(jnp.zeros_like, params)
    for i in range(3):
        micro = {name: a[i] for name, a in batch.items() if name != "sources"}
        (value, parts), gradient = single(params, micro)
        share = float(parts["num_targets"]) / float(targets)
        total, balance = total + share * value, balance + share * parts["balance_loss"]
        wanted = jax.tree.map(lambda a, b, s=share: a + s * b, wanted, gradient)
    close(sums.loss, total, SAME * 5, "loss")
    close(sums.balance_loss, balance, SAME * 5, "balance")
    all_close(grads, wanted, SAME * 2, "gradient")


def test_three_steps_of_adamw(step):
    """Clipping, moments, bias, decay and rate in float64, by hand."""
    state = new_state()
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    moments = [jax.tree.map(np.zeros_like, params) for _ in range(2)]
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: not ("scale" in str(path) or "embedding" in str(path)), params
    )
    assert sum(jax.tree.leaves(decayed)) == 3 + 4 + 2 * 4 + 1  # attention, experts, head
    for number in range(3):
        batch = make_batch(10 + number)
        narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        _, grads = _large_gradient(narrow, one_large(batch, 3))
        grads = jax.tree.map(lambda x: np.asarray(x, np.float64), grads)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g, n=norm: g / max(1.0, n), grads)
        for k, beta in enumerate((0.9, 0.95)):
            moments[k] = jax.tree.map(
                lambda m, g, k=k, b=beta: b * m + (1 - b) * g ** (k + 1), moments[k], grads
            )
        rate = 1e-3 * (number + 1)

        def change(p, m, v, decay, number=number, rate=rate):
            m, v = (x / (1 - b ** (number + 1)) for x, b in ((m, 0.9), (v, 0.95)))
            return -rate * (m / (np.sqrt(v) + 1e-8) + 0.1 * decay * p)

        changes = jax.tree.map(change, params, *moments, decayed)
        params = jax.tree.map(np.add, params, changes)
        state, metrics = step(state, batch, 3)
        # Adam divides gradients of which some are near 0; so a few in 1e-3 of the rate.
        all_close(state.params, params, 2e-6, f"step {number}")
        update = np.sqrt(sum((c**2).sum() for c in jax.tree.leaves(changes)))
        close(metrics["grad_norm"], norm, 1e-5 * norm, "grad_norm")
        close(metrics["update_norm"], update, 1e-4 * update, "update_norm")
        size = np.sqrt(sum((p**2).sum() for p in jax.tree.leaves(params)))
        close(metrics["param_norm"], size, 1e-5 * size, "param_norm")
        close(metrics["learning_rate"], rate, 1e-9, "rate")
        assert norm > 1, "clipping is at work"
    assert int(state.step) == 3


def test_one_compile_for_all_batch_sizes(step):
    state = new_state()
    state, _ = step(state, make_batch(0), 1)
    compiles = []

    def listen(event, duration, **rest):
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        losses = []
        for number, count in enumerate((1, 2, 4, 3, None, 1)):
            state, metrics = step(state, make_batch(number), count)
            losses.append(metrics["num_targets"])
        assert compiles == []
        assert step.num_compiles == 1
        assert len({float(x) for x in losses}) > 3
        jax.jit(lambda x: x + 1)(np.float32(len(compiles)))
        assert compiles, "the counter counts"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_metrics_against_the_float64_model(step):
    state, batch, params = new_state(4), make_batch(4), random_params(CONFIG, 4)
    _, metrics = step(state, batch, 2)
    record = to_record(metrics)
    large = one_large(batch, 2)
    large = {name: array[:4] for name, array in large.items()}
    tokens, ids, sources = large["tokens"], large["segment_ids"], batch["sources"][:2].reshape(4, 9)
    true = truth.forward(params, tokens, CONFIG, segment_ids=ids)
    where = truth_losses.predictions(tokens, labels=large["labels"], segment_ids=ids)
    by_source, number = np.zeros(3), np.zeros(3)
    for b, t, y in where:
        logits = true.logits[b, t]
        by_source[sources[b, t]] += truth_losses.log_sum_exp(logits) - logits[y]
        number[sources[b, t]] += 1
    assert (number > 0).all()
    close(record["loss_by_source"], by_source, 1e-4, "loss_by_source")
    assert record["tokens_by_source"] == number.tolist()
    entropy = by_source.sum() / number.sum()
    z_loss = truth_losses.z_loss(true.logits, where)
    close(record["cross_entropy"], entropy, 1e-5, "cross_entropy")
    close(record["z_loss"], z_loss, 1e-4, "z_loss")
    close(record["loss"], entropy + 0.01 * z_loss, 1e-5, "loss")
    assert record["num_targets"] == len(where)
    assert record["num_tokens"] == (ids != 0).sum()
    real = (ids != 0).reshape(-1)
    for layer in range(2):
        logits = true.router_logits[layer].reshape(-1, 4)[real]
        shares = truth.softmax(logits)
        close(
            record["router_entropy"][layer],
            -(shares * np.log(shares)).sum(axis=1).mean(),
            1e-5,
            "router_entropy",
        )
        chosen = np.bincount(np.argsort(-logits, axis=1)[:, :2].reshape(-1), minlength=4)
        close(record["router_load"][layer], chosen.max() / chosen.mean(), 1e-5, "router_load")
    assert record["dropped_tokens"] == [0, 0]
    squares = []
    for i in range(2):
        cache = mmx.init_cache(CONFIG, 2, 9)
        micro = {name: batch[name][i] for name in ("tokens", "segment_ids")}
        after = mmx.forward(
            params, micro["tokens"], CONFIG, segment_ids=ids[2 * i : 2 * i + 2], cache=cache
        ).cache
        squares.append(np.mean(np.square(np.asarray(after.lightning_states))))
    close(record["lightning_state_norm"], [np.sqrt(np.mean(squares))], 1e-5, "state norm")
    assert record["skipped"] == record["skipped_in_a_row"] == record["num_skipped"] == 0


def test_a_micro_batch_of_padding_changes_nothing(step):
    """Nor does what comes after the last micro-batch that is used, whatever it is."""
    batch = make_batch(6)
    batch["segment_ids"][1] = 0
    without = {name: a[[0, 2, 2, 2]].copy() for name, a in batch.items()}
    without["tokens"][2:] = 10**6  # would give NaN
    seen, metrics = step(new_state(), batch, 3)
    wanted, _ = step(new_state(), without, 2)
    assert metrics["skipped"] == 0
    all_close(seen.params, wanted.params, SAME, "params")


def test_bf16_computes_in_bf16_and_keeps_fp32():
    """Gradients have fp32's direction; updates far below bf16's resolution are not lost."""
    options = dataclasses.replace(OPTIONS, compute_dtype="bfloat16", capacity_factor=None)
    cast = stepping.compute_params(random_params(CONFIG, 0), CONFIG, "bfloat16")
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype == jnp.float32
    }
    assert all(name.endswith(("scale", "router/kernel")) for name in names)
    assert len(names) == 4 + 1 + 1 + 2  # norms of two layers, of lightning, final; two routers
    batch, params = make_batch(2), random_params(CONFIG, 2)
    narrow, _, _ = jax.jit(
        lambda p, b: stepping._accumulate(p, b, jnp.int32(4), CONFIG, options, None)
    )(params, batch)
    (_, _), wide = _large_gradient(params, one_large(batch, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (narrow, wide))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert 0.97 < cosine < 0.999999  # 8 bits, and routing that a rounding may decide differently


def test_it_learns(step):
    """A row repeated: the loss goes from ln(20) towards 0 in 14 steps at this rate."""
    tokens = np.tile(np.arange(9, dtype=np.int32), (4, 2, 1))
    state, losses = new_state(), []
    for _ in range(14):
        state, metrics = step(
            state,
            {
                "tokens": tokens,
                "labels": tokens,
                "segment_ids": np.ones_like(tokens),
                "sources": np.zeros_like(tokens),
            },
        )
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.8 * losses[0]


def test_micro_batches_are_stacked_and_filled_up():
    batch = make_batch(3)
    micro = [{name: a[i] for name, a in batch.items()} for i in range(3)]
    stacked = stack_micro_batches(micro, 4)
    for name, array in batch.items():
        np.testing.assert_array_equal(stacked[name][:3], array[:3])
        assert stacked[name].shape == array.shape
        assert stacked[name].dtype == array.dtype
        assert not stacked[name][3].any()
    with pytest.raises(ValueError, match="3 micro-batches; there must be 1 to 2"):
        stack_micro_batches(micro, 2)
    with pytest.raises(ValueError, match="0 micro-batches"):
        stack_micro_batches([], 2)
    del micro[1]["labels"]
    with pytest.raises(ValueError, match=r"micro-batch 1 has shapes .*; the first has .*labels"):
        stack_micro_batches(micro, 4)


BAD = [
    (lambda b: b.pop("tokens"), {}, "'labels' has shape .* 'tokens' has None"),
    (lambda b: b.update(labels=b["labels"][:, :, 1:]), {}, r"'labels' has shape \(4, 2, 8\)"),
    (lambda b: b.update(positions=b["tokens"]), {}, "batch has the keys .*'positions'"),
    (lambda b: None, dict(accumulation=5), "accumulation is 5; the batch has 4 micro-batches"),
    (lambda b: None, dict(accumulation=0), "accumulation is 0; the batch has 4 micro-batches"),
]


@pytest.mark.parametrize(("spoil", "arguments", "message"), BAD)
def test_bad_batches_are_refused(step, spoil, arguments, message):
    batch = make_batch(0)
    spoil(batch)
    with pytest.raises(ValueError, match=message):
        step(new_state(), batch, **arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compute_dtype", "float16"),
        ("capacity_factor", 0.0),
        ("loss_blocks", 0),
        ("num_sources", 0),
        ("spike_sigma", -1.0),
        ("spike_min_steps", 129),
    ],
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(ValueError, match=f"StepOptions: {field} is {value!r}; it must be"):
        StepOptions(RATE, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0), ("weight_decay", -1.0), ("clip_norm", 0.0)],
)
def test_bad_optimizers_are_refused(field, value):
    with pytest.raises(ValueError, match=f"OptimizerOptions: {field} is {value}; it must be"):
        OptimizerOptions(**{field: value})
