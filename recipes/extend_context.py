"""Extend the context of a pretrained model in stages, as MiniMax-01 does (paper, table 6).

    mmx extend demo --from runs/demo        256 -> 1K -> 4K -> 16K on a laptop
    mmx extend 456b --from RUN --corpus SHARDS      128K, 512K, 1M on a pod

Every stage trains on longer rows with a larger RoPE base and another mix of short, medium and long
text, and on questions about long texts in its last fifth. After each it measures what it is for,
retrieval inside the new length, and what it must not cost, the held-out loss of short text. Run
again on the same --run-dir and it goes on where it stopped; stages that began with other parameters
are refused.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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
from mmx.placement import make_partition
from mmx.training.agreement import by_first
from mmx.training.evaluation import HeldOut
from mmx.training.loop import Result, train
from mmx.training.placement import rows_of_process
from mmx.training.plan import Plan
from mmx.training.run_folder import reserved
from mmx.training.schedule import BatchSchedule, LearningRate, constant, warm_up
from mmx.training.step import StepOptions, compute_params
from recipes import command
from recipes.extension_options import ExtendContext, Stage, check_options, flagged
from recipes.extension_report import show, told
from recipes.origins import Origin, begin, check_chain, digest, origin_of
from recipes.processes import together
from sharding import MeshConfig, Partition
from sharding.peers import Peers

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


def folders_of(recipe: ExtendContext) -> list[Path]:
    """The run folder of each stage."""
    return [
        recipe.run_dir / f"stage-{number}-{stage.seq_len}"
        for number, stage in enumerate(recipe.stages, 1)
    ]


def config_of(stage: Stage, config: ModelConfig) -> ModelConfig:
    """Of the model in a stage, from that before it."""
    longest = max(config.max_seq_len, stage.seq_len)
    return dataclasses.replace(config, rope_theta=stage.rope_theta, max_seq_len=longest)


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
    config = load_config(recipe.from_run)
    weights, partition = _check(recipe, config)
    with reserved(recipe.run_dir):
        return _extend(recipe, config, weights, partition, peers)


def _extend(
    recipe: ExtendContext,
    config: ModelConfig,
    weights: Sequence[Weights],
    partition: Partition | None,
    peers: Peers | None,
) -> list[dict[str, Any]]:
    first = peers is None or peers.is_first
    folders = folders_of(recipe)
    by_first(lambda: check_chain(folders, [stage.steps for stage in recipe.stages]))
    config, params = load(recipe.from_run, partition=partition)
    begin(folders[0], origin_of(recipe.from_run, params))
    with nullcontext() if peers is None else peers.first_alone():
        base, long = _corpora(recipe, config, follows=not first)
    before, reports = short_loss(recipe, base, config, params), []
    for number, (stage, shares) in enumerate(zip(recipe.stages, weights, strict=True), 1):
        config, folder = config_of(stage, config), folders[number - 1]
        result = _train(recipe, number, config, params, shares, base, long)
        if not result.finished:
            _tell(first, f"run the same command again to go on from step {result.step} of {folder}")
            break
        params = result.params
        if number < len(folders):  # before this stage is reported
            begin(folders[number], Origin(str(folder), result.step, digest(params)))
        reports.append(
            {
                "stage": number,
                "run": folder.name,
                "seq_len": stage.seq_len,
                "rope_theta": stage.rope_theta,
                "tokens": result.step * stage.accumulation * stage.batch_size * stage.seq_len,
                "heldout_loss_before": result.heldout_before,
                "heldout_loss": result.heldout_after,
                "short_loss_before": before,
                "short_loss": short_loss(recipe, base, config, params),
                "needles": _needles(recipe, stage, config, params, base),
            }
        )
        text = json.dumps(reports, indent=1) + "\n"
        by_first(lambda text=text: write_atomic(recipe.run_dir / "extension.json", text.encode()))
        _tell(first, f"after stage {number}: {', '.join(map(' '.join, told(reports[-1])))}")
    return reports


def _check(
    recipe: ExtendContext, config: ModelConfig
) -> tuple[tuple[Weights, ...], Partition | None]:
    """Refuse now what would be refused after an hour's work.

    Returns:
      The shares of the sources in each stage, and the partition to load parameters with: stages
      differ in rows and lengths, which split no parameter.
    """
    import jax

    check_options(recipe)
    with flagged("--stages.N.seq-len"):
        weights = weights_of(recipe)
    partition = make_partition(recipe.mesh, recipe.rules, config)
    for number, stage in enumerate(recipe.stages):
        config = config_of(stage, config)
        with flagged(f"--stages.{number}"):
            plan_of(recipe, stage, config, num_sources=1)
            _rows(partition_of(recipe, config, stage.batch_size, stage.seq_len))
    with flagged("--short-len"):
        partition_of(recipe, config, jax.device_count(), recipe.short_len)
    if recipe.corpus is not None:
        corpus_of(recipe, config, follows=False)
    return weights, partition


def _rows(partition: Partition | None) -> tuple[int, int]:
    """Which part of the rows of a micro-batch this process loads, of how many."""
    import jax

    return rows_of_process(partition, jax.process_index())


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
    stage = recipe.stages[number - 1]
    partition = partition_of(recipe, config, stage.batch_size, stage.seq_len)
    index, count = _rows(partition)
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
            folders_of(recipe)[number - 1],
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
    index, count = _rows(partition)
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
        show(recipe.run_dir, reports)
    return 0
