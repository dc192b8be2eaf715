"""Training over 8 CPU devices: the losses of one device, state that lies as the rules say."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from random_models import random_params, small_config
from sharded import ROWS
from test_sharded_model import QUICK

from mmx.cli import main
from mmx.inference.requests import Sampling
from mmx.inference.sampling import sample_rows, sampling_rows
from mmx.model import forward
from mmx.placement import make_partition, param_shardings, parameter_table
from mmx.training.evaluation import write_samples
from mmx.training.placement import put_batch, state_shardings
from mmx.training.schedule import LearningRate, constant, warm_up
from mmx.training.state import init_state
from mmx.training.step import StepOptions, make_train_step
from sharding import MeshConfig, rules

pytestmark = pytest.mark.usefixtures("quick_programs")
CONFIG = small_config("ls", num_heads=4, num_kv_heads=2)
WIDE = small_config("ls", num_heads=8, num_kv_heads=4)
OPTIONS = StepOptions(
    LearningRate((warm_up(4, 1e-2), constant(20, 1e-2))),
    compute_dtype="float32",
    capacity_factor=1.0,
    implementation="reference",
    num_sources=2,
)
STEPS = 24


def batches(rows):
    """Packed: two micro-batches of so many rows a step, of which every other step uses one."""
    for step in range(STEPS):
        others = ROWS[4:8] if rows == 4 else ROWS[2:10]
        ids = np.stack([ROWS[:rows], np.roll(others, step, axis=0)])
        tokens = np.random.default_rng(step).integers(0, 40, ids.shape, dtype=np.int32)
        sources = np.where(ids == 0, -1, ids % 2).astype(np.int32)
        yield {"tokens": tokens, "segment_ids": ids, "sources": sources}, np.int32(1 + step % 2)


def run(config, rows, partition):
    """The state before the first step, the metrics of every one, the state after the last."""
    step = make_train_step(config, OPTIONS, partition=partition)
    shardings = state_shardings(config, OPTIONS.optimizer, partition)
    state = init_state(config, OPTIONS.optimizer, 0, shardings=shardings)
    first, compiled, metrics = jax.device_get(state), None, []
    for batch, used in batches(rows):
        arguments = state, put_batch(batch, partition), used
        compiled = compiled or step.program.lower(*arguments).compile(QUICK)
        state, seen = compiled(*arguments)
        metrics.append(jax.device_get(seen))
    return first, jax.tree.map(lambda *leaves: np.stack(leaves), *metrics), state, shardings


@functools.cache
def alone(config, rows):
    return run(config, rows, None)


def swept(ours, shard, **sizes):
    """Eight rows and four key heads, which every mesh can share."""
    name = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    sizes = {"fsdp": 1, **sizes}
    return pytest.param(WIDE, 8, ours, sizes, shard, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("config", "rows", "ours", "sizes", "shard"),
    [
        pytest.param(CONFIG, 4, "expert", dict(fsdp=2, expert=2, seq=2), (1, 2, 6, 12),
                     id="fsdp 2 x expert 2 x seq 2"),
        swept("fsdp", (1, 4, 3, 12), fsdp=8),
        swept("tensor", (1, 4, 24, 3), tensor=4, data=2),
        swept("expert", (1, 1, 12, 12), expert=4, fsdp=2),
        swept("expert", (1, 2, 12, 6), expert=2, tensor=2, seq=2),
        swept("long_context", (1, 4, 3, 12), seq=8),
        swept("expert", (1, 4, 6, 6), seq=4, tensor=2),
    ],
)  # fmt: skip
def test_losses_of_24_steps_are_those_of_one_device(config, rows, ours, sizes, shard):
    partition = make_partition(MeshConfig(**sizes), ours, config, rows=rows)
    first, metrics, state, shardings = run(config, rows, partition)
    true_first, true, true_state, _ = alone(config, rows)
    # Made where they lie, with the same random numbers.
    jax.tree.map(np.testing.assert_array_equal, first, true_first)
    assert true["loss"][-4:].mean() < true["loss"][:4].mean() - 0.2
    assert true["dropped_tokens"].max() > 0.05
    for name, values in true.items():
        # fp32 sums in another order, through 24 steps of Adam.
        bar = 1e-4 * np.abs(values).max()
        np.testing.assert_allclose(metrics[name], values, rtol=0, atol=bar, err_msg=name)
    same = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, shardings
    )
    assert jax.tree.all(same)
    assert int(state.step) == int(true_state.step) == STEPS
    gate = state.opt_state[1].mu["blocks"]["layer_0"]["moe"]["gate_proj"]
    assert gate.addressable_shards[0].data.shape == shard  # of experts, width and their own width


class Numbers:
    """A tokenizer of numbers below 40."""

    def encode(self, text, add_special_tokens):
        return SimpleNamespace(ids=[int(word) for word in text.split()])

    def decode(self, ids):
        return "".join(f" {number}" for number in ids)


def test_samples_over_devices_are_the_draws_of_one(tmp_path):
    """Each token is the one drawn from what one device makes of all tokens before it."""
    config = small_config("l", num_heads=4, num_kv_heads=2)
    mesh, devices = MeshConfig(fsdp=2, seq=2), jax.devices()[:4]
    partition = make_partition(mesh, "expert", config, devices=devices)
    params = random_params(config, 0)
    prompts, count = ("7", "1 2 3", "9 39"), 5
    text = write_samples(
        tmp_path / "text",
        jax.device_put(params, param_shardings(config, partition)),
        config,
        Numbers(),
        prompts,
        tokens=count,
        end_id=-2,
        compute_dtype="float32",
        seed=3,
        partition=partition,
    )
    assert (tmp_path / "text").read_text() == text
    rows = [part.splitlines()[1].split() for part in text.split("--- ")[1:]]
    keys = sampling_rows([Sampling(temperature=0.8, seed=3 + n) for n in range(3)])
    longest = 3 + count
    whole = np.array([[0] * (longest - len(row)) + [int(i) for i in row] for row in rows])
    mask = np.arange(longest) >= longest - np.array([[len(row)] for row in rows])
    logits = forward(params, whole, config, mask=mask, implementation="reference").logits
    for number in range(count):
        at = 3 + number
        seen = np.zeros((3, config.vocab_size), bool)
        drawn, _ = sample_rows(logits[:, at - 1], keys, seen, np.full(3, number))
        np.testing.assert_array_equal(whole[:, at], drawn)
    assert len({int(i) for i in whole[:, 3:].flat}) > 5


def test_the_table_is_what_the_devices_hold():
    """Every parameter, with the bytes that a device has of it."""
    partition = make_partition(MeshConfig(fsdp=2, expert=2, tensor=2), "expert", CONFIG)
    assert partition is not None
    params = jax.device_put(random_params(CONFIG, 0), param_shardings(CONFIG, partition))
    table = parameter_table(CONFIG, partition.mesh, rules.EXPERT, dtype=np.float32)
    rows = {row.name: row for row in table}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        row = rows.pop(jax.tree_util.keystr(path, simple=True, separator="/"))
        assert row.shape == leaf.shape
        assert row.spec == leaf.sharding.spec
        assert row.bytes_per_device == leaf.addressable_shards[0].data.nbytes
    assert not rows


REFUSED = [
    (dict(fsdp=16), "expert", {}, "takes 16 devices and there are 8; the nearest that fits is"),
    (dict(fsdp=1, expert=8), "expert", {},
     "'experts' has size 4, which 8 devices (expert=8) cannot share evenly; the nearest numbers "
     "that can are 4"),
    (dict(fsdp=2, tensor=4), "tensor", {},
     "'kv_heads' has size 2, which 4 devices (tensor=4) cannot share evenly; the nearest numbers "
     "that can are 2"),
    (dict(fsdp=1, seq=8), "expert", dict(seq_len=72),
     "rows of 72 tokens: 8 devices (seq=8) share a row in multiples of 16 tokens; the nearest "
     "lengths are 64 or 80"),
    (dict(fsdp=8), "expert", dict(rows=4),
     "micro-batches of 4 rows: 'batch' has size 4, which 8 devices (fsdp=8) cannot share evenly; "
     "the nearest sizes that they can are 8"),
    (dict(fsdp=8), "expert", dict(rows=20), "the nearest sizes that they can are 16 or 24"),
    (dict(fsdp=4, seq=2), "fsdp", {}, "rules 'fsdp' split nothing over mesh axis 'seq'"),
    (dict(), "zero", {}, "rules 'zero'; choose one of fsdp, tensor, expert, long_context, serving"),
    (dict(), dataclasses.replace(rules.FSDP, mlp=("model",)), {},
     "rules 'fsdp' use mesh axis 'model'; the mesh has data, fsdp, expert, seq, tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "ours", "batch", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(sizes, ours, batch, message):
    config = dataclasses.replace(CONFIG, embed_dim=32)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_partition(MeshConfig(**sizes), ours, config, **batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo", "--mesh.fsdp", "16"],
         "mesh data=1 x fsdp=16 x expert=1 x seq=1 x tensor=1 "
         "takes 16 devices and there are 8; the nearest that fits is data=1, fsdp=8, expert=1"),
        (["train", "demo", "--mesh.fsdp", "1", "--mesh.expert", "8"],
         "blocks/layer_0/moe/down_proj: 'experts' has size 4, which 8 devices (expert=8) cannot "
         "share evenly; the nearest numbers that can are 4"),
        (["train", "demo", "--mesh.fsdp", "8", "--batch-size", "4"],
         "micro-batches of 4 rows: 'batch' has size 4, which 8 devices (fsdp=8) cannot share "
         "evenly; the nearest sizes that they can are 8"),
        (["train", "demo", "--mesh.fsdp", "1", "--mesh.seq", "8", "--seq-len", "100"],
         "rows of 100 tokens: 8 devices (seq=8) share a row in multiples of 16 tokens"),
    ],
)  # fmt: skip
def test_commands_refuse_in_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--run-dir", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mmx: error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "refused before anything is made"


def test_one_device_needs_no_partition():
    devices = jax.devices()[:1]
    assert make_partition(MeshConfig(), "expert", CONFIG, devices=devices) is None
