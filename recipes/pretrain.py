"""Pretrain a MiniMax-style model: from text files to a checkpoint that resumes, on CPU bit for bit.

    mmx train demo                      three minutes on a laptop, text included
    mmx train 1b --corpus SHARDS        one H200
    mmx train 456b --corpus SHARDS      MiniMax-Text-01, a pod

Run again on the same --run-dir and it goes on from the last checkpoint. The learning rate follows
the preset's schedule, whatever --steps says.
"""

import functools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmx.config import preset
from mmx.data.batches import Batches
from mmx.data.corpus import build_default
from mmx.data.embedded import SOURCES
from mmx.data.mixing import Weights
from mmx.data.shards import Manifest
from mmx.placement import RuleName, make_partition
from mmx.training.loop import Plan, Result, train
from mmx.training.placement import rows_of_process
from mmx.training.schedule import (
    BatchSchedule,
    LearningRate,
    minimax_batches,
    minimax_learning_rate,
    warm_up_stable_decay,
)
from mmx.training.step import StepOptions
from recipes import command
from recipes.processes import together
from sharding import MeshConfig
from sharding.peers import Peers


@dataclass(frozen=True)
class Pretrain:
    """Pretrain a model. What is not given is as in the preset."""

    model: str
    """A preset of `mmx info`."""
    run_dir: Path
    """Where everything goes; a run found there is continued."""
    corpus: Path | None
    """Token shards of `mmx data build`; none: the standard library of this Python."""
    weights: tuple[tuple[str, float], ...]
    """Shares of the sources, NAME SHARE for each; none: as large as they are."""
    max_epochs: int | None
    """How often a source may be read."""
    seq_len: int
    """Tokens a row."""
    batch_size: int
    """Rows of a micro-batch, over all devices."""
    accumulation: tuple[tuple[int, int], ...]
    """(tokens seen, micro-batches a step), rising from 0; none: MiniMax-01's 16M to 128M tokens."""
    steps: int
    """Where to stop."""
    schedule_steps: int | None
    """Steps of the learning rate's schedule; none: MiniMax-01's own, over 11.4T tokens."""
    peak_lr: float = 2e-4
    """Learning rate after the warm-up."""
    end_lr: float = 3e-5
    """Learning rate at the end of the exponential decay, the last fifth of the schedule."""
    warm_up_steps: int = 500
    """Of the learning rate."""
    z_loss_coef: float = 0.0
    """Of the squared logsumexp of the logits."""
    capacity_factor: float | None = None
    """Tokens an expert takes, as a multiple of its even share; none: no token is dropped."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices along each axis of the mesh; -1 takes what the others leave."""
    rules: RuleName = "expert"
    """What the axes split: see `mmx plan`."""
    initialisation: Literal["xavier", "deepnorm"] = "deepnorm"
    """Of the parameters."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrices and activations; master parameters are float32."""
    remat: Literal["none", "superblock", "layer"] = "layer"
    """What the backward pass computes again."""
    seed: int = 0
    """Of parameters and data order."""
    shuffle_rows: int = 256
    """Rows that are shuffled together."""
    save_every: int = 500
    """Steps between checkpoints."""
    heldout_every: int = 500
    """Steps between measurements of the held-out loss."""
    sample_every: int = 500
    """Steps between texts written by the model."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases to report to."""


PRESETS = {
    "demo": Pretrain(
        model="demo",
        run_dir=Path("runs/demo"),
        corpus=None,
        weights=(
            ("stdlib-code", 0.76),
            ("stdlib-docstrings", 0.13),
            ("pydoc-topics", 0.06),
            ("synthetic", 0.05),
        ),
        max_epochs=None,
        seq_len=256,
        batch_size=8,
        accumulation=((0, 1),),
        steps=320,
        schedule_steps=320,
        peak_lr=2.5e-3,
        end_lr=2.5e-4,
        warm_up_steps=15,
        compute_dtype="float32",
        remat="none",
        shuffle_rows=16_384,
        save_every=80,
        heldout_every=160,
        sample_every=160,
    ),
    "1b": Pretrain(
        model="1b",
        run_dir=Path("runs/1b"),
        corpus=None,
        weights=(),
        max_epochs=4,
        seq_len=8192,
        batch_size=8,
        accumulation=((0, 4), (2 << 30, 8)),
        steps=40_000,
        schedule_steps=40_000,
        peak_lr=6e-4,
        end_lr=6e-5,
    ),
    "456b": Pretrain(
        model="minimax-text-01",
        run_dir=Path("runs/456b"),
        corpus=None,
        weights=(),
        max_epochs=4,
        seq_len=8192,
        batch_size=256,
        accumulation=(),
        steps=200_000,
        schedule_steps=None,
        capacity_factor=1.25,
    ),
}
PROMPTS = ("def ", "class Test", "The ", "import ")


def plan_of(recipe: Pretrain, num_sources: int) -> Plan:
    """What to train, as the library wants to know it."""
    micro_batch = recipe.seq_len * recipe.batch_size
    if recipe.accumulation:
        stages = tuple((seen, count * micro_batch) for seen, count in recipe.accumulation)
        batches = BatchSchedule(micro_batch, stages)
    else:
        batches = minimax_batches(micro_batch)
    return Plan(
        config=preset(recipe.model),
        options=StepOptions(
            learning_rate=learning_rate(recipe, batches),
            z_loss_coef=recipe.z_loss_coef,
            capacity_factor=recipe.capacity_factor,
            compute_dtype=recipe.compute_dtype,
            remat=recipe.remat,
            num_sources=num_sources,
        ),
        batches=batches,
        seq_len=recipe.seq_len,
        steps=recipe.steps,
        seed=recipe.seed,
        initialisation=recipe.initialisation,
        save_every=recipe.save_every,
        heldout_every=recipe.heldout_every,
        sample_every=recipe.sample_every,
        prompts=PROMPTS,
        tensorboard=recipe.tensorboard,
        wandb=recipe.wandb,
    )


def check_options(recipe: Pretrain) -> Weights | None:
    """Refuse what can be refused before a corpus is built; the weights of the sources, if given.

    Raises:
      ValueError: an option out of range, a source twice, or one that the own corpus has not.
    """
    longest = preset(recipe.model).max_seq_len
    if recipe.seq_len > longest:
        raise ValueError(
            f"--seq-len {recipe.seq_len} is more than max_seq_len={longest} of the model"
        )
    plan_of(recipe, num_sources=1)
    # Of the others, a plan refuses what is out of range.
    for name, bound in {"max_epochs": 1, "shuffle_rows": 1, "save_every": 1, "seed": 0}.items():
        value = getattr(recipe, name)
        if value is not None and value < bound:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}; it must be at least {bound}")
    shares = dict(recipe.weights)
    for name in shares:
        given = [share for source, share in recipe.weights if source == name]
        if len(given) > 1:
            raise ValueError(
                f"--weights names {name!r} {len(given)} times, with the shares "
                f"{', '.join(map(str, given))}; give each source one share"
            )
    if not shares:
        return None
    weights = Weights.constant(shares)
    if recipe.corpus is None:
        weights.check_sources(SOURCES)
    return weights


def learning_rate(recipe: Pretrain, batches: BatchSchedule) -> LearningRate:
    """Warm-up, constant, exponential tail; or the one of the paper."""
    if recipe.schedule_steps is None:
        return minimax_learning_rate(batches)
    return warm_up_stable_decay(
        recipe.schedule_steps,
        recipe.peak_lr,
        recipe.end_lr,
        warm_up_steps=recipe.warm_up_steps,
        decay_steps=max(1, recipe.schedule_steps // 5),
        shape="exponential",
    )


def corpus_of(recipe: Pretrain, *, follows: bool = False) -> Manifest:
    """The shards asked for; or those of the standard library, built once for each vocabulary.

    Who follows process 0 finds them, and may have to wait for another who looks them over.
    """
    if recipe.corpus is not None:
        return Manifest.load(recipe.corpus)
    vocab_size = min(preset(recipe.model).vocab_size, 32_768)
    folder = recipe.run_dir.parent / f"corpus-stdlib-{vocab_size}"
    if not follows:
        print(f"corpus: the standard library of this Python, in {folder}", flush=True)
    workers = os.cpu_count() or 1
    return build_default(folder, vocab_size=vocab_size, workers=workers, wait=follows)


def run(recipe: Pretrain, peers: Peers | None = None) -> Result:
    """Build what is missing, train, or go on training; with the other processes if any."""
    import jax

    config = preset(recipe.model)
    weights = check_options(recipe)
    partition = make_partition(
        recipe.mesh, recipe.rules, config, rows=recipe.batch_size, seq_len=recipe.seq_len
    )
    index, count = rows_of_process(partition, jax.process_index())
    with nullcontext() if peers is None else peers.first_alone():
        manifest = corpus_of(recipe, follows=peers is not None and not peers.is_first)
    batches = functools.partial(
        Batches,
        manifest.folder,
        seq_len=recipe.seq_len,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        process_index=index,
        process_count=count,
    )
    data = batches(weights=weights, max_epochs=recipe.max_epochs, shuffle_rows=recipe.shuffle_rows)
    heldout = batches(weights=None, max_epochs=1, split="heldout")
    plan = plan_of(recipe, len(manifest.sources))
    try:
        return train(plan, recipe.run_dir, data, heldout, manifest, partition=partition)
    finally:
        data.close()
        heldout.close()


def main(arguments: Sequence[str]) -> int:
    """`mmx train PRESET [OPTIONS]`."""
    parsed = command.parse("train", __doc__ or "", PRESETS, arguments)
    if parsed is None:
        return 0
    recipe, processes = parsed
    with together(processes, recipe) as peers:
        result = run(recipe, peers)
    if peers is None or peers.is_first:
        _report(recipe, result)
    return 0


def _report(recipe: Pretrain, result: Result) -> None:
    """What came out, and what to do next."""
    if result.heldout_before is not None and result.heldout_after is not None:
        share = 1 - result.heldout_after / result.heldout_before
        print(
            f"held-out loss {result.heldout_before:.3f} before training, "
            f"{result.heldout_after:.3f} after step {result.step}: {share:.0%} less"
        )
    if not result.finished:
        print(f"run the same command again to go on from step {result.step}")
        return
    from mmx.training.plotting import draw

    print(f"plot: {draw(recipe.run_dir, recipe.run_dir / 'plot.png')}")
    if (samples := recipe.run_dir / "samples").is_dir():
        print(f"samples: {samples}")
    print(f"checkpoint: {recipe.run_dir / 'checkpoints'} (mmx verify {recipe.run_dir})")
    print(f"next: mmx generate {recipe.run_dir} --prompt 'def ', or train on with a higher --steps")
