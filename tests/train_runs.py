"""A training run small enough for tests, here or in a process of its own."""

import functools
import hashlib
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np

from mmx.config import ModelConfig
from mmx.data.batches import Batches
from mmx.data.corpus import build_corpus
from mmx.data.parts import Recipe
from mmx.data.shards import Manifest
from mmx.placement import make_partition
from mmx.training import loop
from mmx.training.plan import Plan
from mmx.training.schedule import BatchSchedule, LearningRate, Piece, constant, warm_up
from mmx.training.step import StepOptions
from sharding import MeshConfig, Partition

CONFIG = ModelConfig(
    vocab_size=320,
    embed_dim=16,
    layer_kinds=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=2,
    num_experts_per_tok=1,
    expert_dim=16,
    rope_theta=10_000.0,
    chunk_size=16,
    max_seq_len=64,
)
ROWS, LENGTH = 8, 32
_make_train_step = loop.make_train_step
_one_program = functools.lru_cache(_make_train_step)


def _shared(config, options, *, partition=None):
    """One program for all the runs of a process on one device: they differ in their folders."""
    if partition is None:
        return _one_program(config, options)
    return _make_train_step(config, options, partition=partition)


loop.make_train_step = _shared


def corpus(folder: Path) -> Manifest:
    """Two sources of generated sentences and a tokenizer of 300."""
    rng = np.random.default_rng(0)
    words = ["the", "model", "reads", "writes", "one", "long", "line", "after", "another", "ends"]
    for source in ("one", "two"):
        texts = [" ".join(rng.choice(words, rng.integers(5, 60))) for _ in range(120)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{source}.jsonl").write_text(lines)
    inputs = tuple(f"{source}={folder / source}.jsonl" for source in ("one", "two"))
    return build_corpus(Recipe(inputs=inputs, vocab_size=300, heldout=0.2), folder / "shards")


def plan(steps: int, **changes) -> Plan:
    """A plan of two batch sizes and three learning rates within ten steps."""
    micro_batch = ROWS * LENGTH
    rate = LearningRate((warm_up(2, 3e-3), constant(4, 3e-3), Piece(4, 3e-3, 3e-4, "exponential")))
    stages = ((0, micro_batch), (4 * micro_batch, 2 * micro_batch))
    return Plan(
        **dict(
            config=CONFIG,
            options=StepOptions(learning_rate=rate, compute_dtype="float32", num_sources=2),
            batches=BatchSchedule(micro_batch, stages),
            seq_len=LENGTH,
            steps=steps,
            save_every=3,
            heldout_every=5,
            heldout_batches=2,
            tensorboard=False,
        )
        | changes
    )


def run(manifest: Manifest, folder: Path, steps: int, **changes) -> loop.Result:
    """Train, or go on, up to a step; on one device unless `partition` says otherwise.

    Nothing is held out with `measured` False.
    """
    partition, measured = changes.pop("partition", None), changes.pop("measured", True)
    rows = {"seq_len": LENGTH, "batch_size": ROWS, "seed": 0}
    data = Batches(manifest.folder, weights=None, max_epochs=changes.pop("epochs", None), **rows)
    heldout = Batches(manifest.folder, weights=None, split="heldout", max_epochs=1, **rows)
    try:
        held = heldout if measured else None
        return loop.train(plan(steps, **changes), folder, data, held, manifest, partition=partition)
    finally:
        data.close()
        heldout.close()


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def digest(folder: Path, step: int) -> str:
    """SHA-256 over everything a step holds: arrays, data state and config."""
    from mmx.training.checkpoint import Checkpoints
    from mmx.training.state import abstract_state

    abstract = abstract_state(CONFIG, plan(1).options.optimizer)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore(step, abstract)
    total = hashlib.sha256(json.dumps(restored.data, sort_keys=True).encode())
    for leaf in jax.tree.leaves(restored.state):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def keep_programs(folder: Path) -> None:
    """Let the processes that are told the same folder compile a program once between them."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def child(
    shards: Path, folder: Path, steps: int, quick: bool, *, devices: int = 8, kill_at: int = 0
) -> None:
    """What a process of its own does: all devices train; with `kill_at` one does, up to there."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_disable_most_optimizations", quick)
    manifest = Manifest.load(shards)
    if kill_at:  # compared bit for bit with a run on one device, whose programs are kept
        _kill_at(kill_at)
        run(manifest, folder, steps)
    else:  # only what is trained is compared
        run(manifest, folder, steps, partition=spread(MeshConfig()), measured=False)


def spread(mesh: MeshConfig) -> Partition | None:
    """The partition of a run over all devices."""
    return make_partition(mesh, "expert", CONFIG, rows=ROWS, seq_len=LENGTH)


def _kill_at(step: int) -> None:
    write = loop.Logbook.write

    def last_words(self, record):
        write(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.Logbook.write = last_words
