"""Extend the context of a pretrained model in stages, as MiniMax-01 does (paper, table 6).

    mmx extend demo --from runs/demo        256 -> 1K -> 4K -> 16K on a laptop
    mmx extend 456b --from RUN --corpus SHARDS      128K, 512K, 1M on a pod

Every stage trains on longer rows with a larger RoPE base and another mix of short, medium and long
text, and on questions about long texts in its last fifth. After each it measures what it is for,
retrieval inside the new length, and what it must not cost, the held-out loss of short text. Run
again on the same --run-dir and it goes on where it stopped.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmx.config import ModelConfig
from mmx.convert.load import load, load_config
from mmx.data.batches import Batches
from mmx.data.corpus import build_default
from mmx.data.long_context import LENGTH_MIXES, build_long_corpus, extension_weights
from mmx.data.mixing import Weights
from mmx.data.shards import Manifest, file_sha256, write_atomic
from mmx.data.tokenizer import load_tokenizer
from mmx.evaluation.needles import needle_accuracy
from mmx.model import Params
from mmx.placement import RuleName, make_partition
from mmx.training.agreement import by_first
from mmx.training.evaluation import HeldOut
from mmx.training.loop import Result, train
from mmx.training.placement import rows_of_process
from mmx.training.plan import Plan
from mmx.training.schedule import BatchSchedule, LearningRate, constant, warm_up
from mmx.training.step import StepOptions, compute_params
from recipes import command
from recipes.processes import together
from sharding import MeshConfig, Partition
from sharding.peers import Peers


@dataclass(frozen=True)
class Stage:
    """One length."""

    seq_len: int
    """Tokens a row."""
    rope_theta: float
    """RoPE base."""
    steps: int
    """Of this stage."""
    learning_rate: float
    """Constant, after a warm-up over a tenth of the steps."""
    batch_size: int
    """Rows of a micro-batch, over all devices."""
    accumulation: int = 1
    """Micro-batches a step."""
    mix: tuple[float, float, float] = (0.3, 0.3, 0.4)
    """Shares of short, medium and long text."""


@dataclass(frozen=True)
class ExtendContext:
    """Extend the context of a model. What is not given is as in the preset."""

    from_run: Annotated[Path, tyro.conf.arg(name="from")]
    """The run, or the checkpoint folder, to begin with."""
    run_dir: Path
    """Where everything goes; stages found there are continued."""
    corpus: Path | None
    """Shards the model was trained on; none: the standard library of this Python."""
    stages: tuple[Stage, ...]
    """One after the other."""
    documents: int
    """Long documents of each length and kind."""
    short_len: int
    """Tokens a row where the held-out loss of short text is measured."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where needles are, 0 the beginning of the text and 1 its end."""
    needles: int = 8
    """Prompts for each depth."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrices and activations; master parameters are float32."""
    remat: Literal["none", "superblock", "layer"] = "layer"
    """What the backward pass computes again."""
    capacity_factor: float | None = None
    """Tokens an expert takes, as a multiple of its even share; none: no token is dropped."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices along each axis of the mesh; -1 takes what the others leave."""
    rules: RuleName = "long_context"
    """What the axes split."""
    seed: int = 0
    """Of documents, data order and needles."""
    save_every: int = 100
    """Steps between checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases to report to."""


PRESETS = {
    "demo": ExtendContext(
        from_run=Path("runs/demo"),
        run_dir=Path("runs/demo-long"),
        corpus=None,
        stages=(
            Stage(1024, 50_000.0, 100, 1e-3, 4, mix=LENGTH_MIXES[0]),
            Stage(4096, 200_000.0, 60, 1e-3, 1, mix=LENGTH_MIXES[1]),
            Stage(16_384, 1_000_000.0, 20, 1e-3, 1, mix=LENGTH_MIXES[2]),
        ),
        documents=64,
        short_len=256,
        needles=4,
        compute_dtype="float32",
        remat="none",
        mesh=MeshConfig(fsdp=1, seq=-1),
    ),
    # Lengths, bases, mixes and tokens (300B, 32B, 26B, here in steps of 128M) are the paper's. It
    # does not give the learning rate: this is where its pretraining ends.
    "456b": ExtendContext(
        from_run=Path("runs/456b"),
        run_dir=Path("runs/456b-long"),
        corpus=None,
        stages=(
            Stage(131_072, 5e6, 2235, 3e-5, 256, accumulation=4, mix=LENGTH_MIXES[0]),
            Stage(524_288, 1e7, 238, 3e-5, 256, accumulation=1, mix=LENGTH_MIXES[1]),
            Stage(1_048_576, 1e7, 194, 3e-5, 128, accumulation=1, mix=LENGTH_MIXES[2]),
        ),
        documents=10_000,
        short_len=8192,
        capacity_factor=1.25,
    ),
}


def plan_of(recipe: ExtendContext, stage: Stage, config: ModelConfig, num_sources: int) -> Plan:
    """What to train in a stage; `config` is already that of the stage."""
    warm = max(1, stage.steps // 10)
    micro_batch = stage.seq_len * stage.batch_size
    return Plan(
        config=config,
        options=StepOptions(
            learning_rate=LearningRate(
                (warm_up(warm, stage.learning_rate), constant(stage.steps, stage.learning_rate))
            ),
            capacity_factor=recipe.capacity_factor,
            compute_dtype=recipe.compute_dtype,
            remat=recipe.remat,
            num_sources=num_sources,
        ),
        batches=BatchSchedule(micro_batch, ((0, stage.accumulation * micro_batch),)),
        seq_len=stage.seq_len,
        steps=stage.steps,
        seed=recipe.seed,
        save_every=recipe.save_every,
        heldout_every=stage.steps,
        tensorboard=recipe.tensorboard,
        wandb=recipe.wandb,
    )


def corpus_of(recipe: ExtendContext, config: ModelConfig, *, follows: bool) -> Manifest:
    """The shards the model was trained on, with its own tokenizer; see `pretrain.corpus_of`."""
    if recipe.corpus is not None:
        manifest = Manifest.load(recipe.corpus)
    else:
        vocab_size = min(config.vocab_size, 32_768)
        folder = recipe.from_run.parent / f"corpus-stdlib-{vocab_size}"
        workers = os.cpu_count() or 1
        manifest = build_default(folder, vocab_size=vocab_size, workers=workers, wait=follows)
    own = recipe.from_run / "tokenizer.json"
    if own.is_file() and file_sha256(own) != manifest.tokenizer_sha256:
        raise ValueError(
            f"{manifest.folder}: has another tokenizer than {own}; give the --corpus that the "
            "model was trained on"
        )
    return manifest


def partition_of(
    recipe: ExtendContext, config: ModelConfig, rows: int, seq_len: int
) -> Partition | None:
    """How work on so many rows of such a length is spread over the devices."""
    return make_partition(recipe.mesh, recipe.rules, config, rows=rows, seq_len=seq_len)


def weights_of(recipe: ExtendContext) -> tuple[Weights, ...]:
    """Shares of the sources in each stage."""
    return extension_weights(
        [stage.seq_len for stage in recipe.stages],
        [stage.steps * stage.accumulation * stage.batch_size for stage in recipe.stages],
        mixes=[stage.mix for stage in recipe.stages],
    )


def run(recipe: ExtendContext, peers: Peers | None = None) -> list[dict[str, Any]]:
    """Extend, or go on, with the other processes if any.

    Returns:
      What was measured after each stage, also in RUN/extension.json.
    """
    first = peers is None or peers.is_first
    weights, config = weights_of(recipe), load_config(recipe.from_run)
    partitions = [  # before an hour's work
        partition_of(recipe, config, stage.batch_size, stage.seq_len) for stage in recipe.stages
    ]
    with nullcontext() if peers is None else peers.first_alone():
        base, long = _corpora(recipe, config, follows=not first)
    # Stages differ in rows and lengths, which split no parameter.
    config, params = load(recipe.from_run, partition=partitions[0])
    before, reports = short_loss(recipe, base, config, params), []
    for number, (stage, shares) in enumerate(zip(recipe.stages, weights, strict=True), 1):
        config = dataclasses.replace(
            config,
            rope_theta=stage.rope_theta,
            max_seq_len=max(config.max_seq_len, stage.seq_len),
        )
        folder = recipe.run_dir / f"stage-{number}-{stage.seq_len}"
        result = _train(recipe, number, config, params, shares, base, long)
        if not result.finished:
            _tell(first, f"run the same command again to go on from step {result.step} of {folder}")
            break
        params = result.params
        reports.append(
            {
                "stage": number,
                "run": folder.name,
                "seq_len": stage.seq_len,
                "rope_theta": stage.rope_theta,
                "tokens": stage.steps * stage.accumulation * stage.batch_size * stage.seq_len,
                "heldout_loss_before": result.heldout_before,
                "heldout_loss": result.heldout_after,
                "short_loss_before": before,
                "short_loss": short_loss(recipe, base, config, params),
                "needles": _needles(recipe, stage, config, params, base),
            }
        )
        text = json.dumps(reports, indent=1) + "\n"
        by_first(lambda text=text: write_atomic(recipe.run_dir / "extension.json", text.encode()))
        _tell(first, f"after stage {number}: {', '.join(map(' '.join, _told(reports[-1])))}")
    return reports


def _corpora(
    recipe: ExtendContext, config: ModelConfig, *, follows: bool
) -> tuple[Manifest, Manifest]:
    """The shards of short and of long text; what is missing is built."""
    base = corpus_of(recipe, config, follows=follows)
    _tell(not follows, f"long documents: in {recipe.run_dir / 'corpus'}")
    long = build_long_corpus(
        base.folder,
        recipe.run_dir / "corpus",
        lengths=[stage.seq_len for stage in recipe.stages],
        documents=recipe.documents,
        seed=recipe.seed,
        workers=os.cpu_count() or 1,
        wait=follows,
    )
    return base, long


def _tell(first: bool, words: str) -> None:
    """One process speaks for all."""
    if first:
        print(words, flush=True)


def _train(
    recipe: ExtendContext,
    number: int,
    config: ModelConfig,
    params: Params,
    weights: Weights,
    base: Manifest,
    long: Manifest,
) -> Result:
    """Train a stage in a run folder of its own, or go on with it."""
    import jax

    stage = recipe.stages[number - 1]
    partition = partition_of(recipe, config, stage.batch_size, stage.seq_len)
    index, count = rows_of_process(partition, jax.process_index())
    rows = {
        "seq_len": stage.seq_len,
        "batch_size": stage.batch_size,
        "seed": recipe.seed + number,
        "process_index": index,
        "process_count": count,
    }
    data = Batches(long.folder, weights=weights, split="train", max_epochs=None, **rows)
    heldout = Batches(base.folder, weights=None, split="heldout", max_epochs=1, **rows)
    try:
        return train(
            plan_of(recipe, stage, config, len(long.sources)),
            recipe.run_dir / f"stage-{number}-{stage.seq_len}",
            data,
            heldout,
            long,
            params=params,
            partition=partition,
        )
    finally:
        data.close()
        heldout.close()


def short_loss(recipe: ExtendContext, base: Manifest, config: ModelConfig, params: Params) -> float:
    """Held-out loss of text at the length the model comes from, in nats."""
    import jax

    rows = devices = jax.device_count()
    rows *= max(1, 16 // devices)
    partition = partition_of(recipe, config, rows, recipe.short_len)
    index, count = rows_of_process(partition, jax.process_index())
    batches = Batches(
        base.folder,
        seq_len=recipe.short_len,
        batch_size=rows,
        weights=None,
        seed=recipe.seed,
        split="heldout",
        max_epochs=1,
        process_index=index,
        process_count=count,
    )
    try:
        heldout = HeldOut(
            batches, 16, config, compute_dtype=recipe.compute_dtype, partition=partition
        )
    finally:
        batches.close()
    return heldout.loss(params)


def _needles(
    recipe: ExtendContext, stage: Stage, config: ModelConfig, params: Params, base: Manifest
) -> dict[str, Any]:
    partition = partition_of(recipe, config, stage.batch_size, stage.seq_len)
    found = needle_accuracy(
        compute_params(params, config, recipe.compute_dtype),
        config,
        load_tokenizer(base.tokenizer_file),
        length=stage.seq_len,
        depths=recipe.depths,
        count=recipe.needles,
        seed=recipe.seed,
        batch_size=1 if partition is None else partition.devices_of("batch"),
        partition=partition,
    )
    return dataclasses.asdict(found)


def main(arguments: Sequence[str]) -> int:
    """`mmx extend PRESET [OPTIONS]`."""
    parsed = command.parse("extend", __doc__ or "", PRESETS, arguments)
    if parsed is None:
        return 0
    recipe, processes = parsed
    with together(processes, recipe) as peers:
        reports = run(recipe, peers)
    if peers is None or peers.is_first:
        _report(recipe, reports)
    return 0


def _told(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a person wants to know of a stage: retrieval inside its length, beside the losses."""
    needles = row["needles"]
    return (
        ("length", f"{row['seq_len']:,}"),
        ("RoPE base", f"{row['rope_theta']:,.0f}"),
        ("held-out loss", f"{row['heldout_loss_before']:.3f} -> {row['heldout_loss']:.3f}"),
        ("short text", f"{row['short_loss_before']:.3f} -> {row['short_loss']:.3f}"),
        ("retrieved", f"{sum(needles['exact']) / len(needles['exact']):.0%}"),
        ("by depth", " ".join(f"{share:.0%}" for share in needles["exact"])),
        ("loss of answers", f"{needles['loss']:.3f}"),
    )


def _report(recipe: ExtendContext, reports: Sequence[dict[str, Any]]) -> None:
    """One row a stage, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    if not reports:
        return
    title = "after each stage; losses in nats, before -> after"
    table = Table(*(name for name, _ in _told(reports[0])), title=title)
    for row in reports:
        table.add_row(*(value for _, value in _told(row)))
    Console().print(table)
    print(f"report: {recipe.run_dir / 'extension.json'}")
    last = recipe.run_dir / reports[-1]["run"]
    print(f"next: mmx generate {last} --prompt 'def ' (mmx verify {last} checks every byte)")
