"""The training loop: from the last checkpoint of a run folder, or from nothing, to its last step.

    RUN/run.json        what is being trained, and on what
    RUN/tokenizer.json  of the corpus
    RUN/metrics.jsonl   one object a step
    RUN/checkpoints/    see `mmx.training.checkpoint`
    RUN/samples/        text written by the model
    RUN/tensorboard/

A step is a pure function of the step before it and of the data's state, and both are in the
checkpoint: a run that is killed and started again repeats the steps since its last save, on CPU bit
for bit.
"""

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from mmx.data.batches import Batches
from mmx.data.shards import Manifest, write_atomic
from mmx.model import Params
from mmx.planning.exhausted import explained, of_training
from mmx.training import metrics as measuring
from mmx.training.agreement import as_first, compile_together, signals, stop_agreed
from mmx.training.checkpoint import Checkpoints, SaveFailed
from mmx.training.display import Display
from mmx.training.evaluation import HeldOut, write_samples
from mmx.training.logbook import Logbook
from mmx.training.placement import put_batch, state_shardings, with_shardings
from mmx.training.plan import Plan, device_numbers, opening_rows
from mmx.training.run_folder import last_step, loss_before, reserved, tokenizer_of
from mmx.training.state import TrainState, abstract_state, init_state
from mmx.training.step import make_train_step, stack_micro_batches
from sharding import Partition


class TrainingStopped(ValueError):
    """Training cannot go on; one line with the reason. The last good state has been saved."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: steps done.
      params: fp32 master parameters.
      heldout_before, heldout_after: held-out loss before the first step and now, nats; None when
        it was not measured.
      finished: False when a signal stopped it early.
    """

    step: int
    params: Params
    heldout_before: float | None
    heldout_after: float | None
    finished: bool


def train(
    plan: Plan,
    run_dir: Path,
    data: Batches,
    heldout: Batches | None,
    manifest: Manifest,
    *,
    params: Params | None = None,
    partition: Partition | None = None,
) -> Result:
    """Train, or go on training, in a run folder.

    SIGTERM and SIGINT let the step in progress end, save, and return; a second one is not caught.
    Of several processes all call this; they stop and save together, and process 0 writes and shows.

    Args:
      plan: what to train. A folder that has checkpoints must have been trained with the same
        `config` and `seq_len`.
      run_dir: made where it is missing.
      data: training batches of `plan.rows` rows, at their start; restored from the checkpoint.
      heldout: batches of the held-out split, or None.
      manifest: of the corpus; its tokenizer is copied into the folder.
      params: begin with these instead of random ones, when the folder has no checkpoint.
      partition: over which devices to spread the work; None for one.

    Raises:
      ValueError: the folder belongs to another model or corpus, or cannot be written.
      TrainingStopped: `max_skipped` bad steps in a row.
      SaveFailed: the last checkpoint could not be written.
      MemoryExhausted: on a device; a plan of what would help is on stderr.
    """
    with ExitStack() as stack:
        stack.enter_context(explained(lambda: of_training(plan, partition)))
        stop = stack.enter_context(signals())
        run = _open(plan, run_dir, data, heldout, manifest, params, partition, stack)
        run.measure_before()
        while run.step < plan.steps and run.trouble is None:
            if stop_agreed(stop["asked"]):
                break
            run.take_step()
        run.flush()
        finished = run.step >= plan.steps
        if not finished and run.trouble is None:
            run.display.note(f"stopped by a signal after step {run.step}; saving")
        run.save(final=True)
        if run.trouble is not None:
            raise TrainingStopped(run.trouble)
        after = run.measure_after() if finished else None
        return Result(run.step, run.state.params, run.heldout_before, after, finished)


def _open(
    plan: Plan,
    run_dir: Path,
    data: Batches,
    heldout: Batches | None,
    manifest: Manifest,
    params: Params | None,
    partition: Partition | None,
    stack: ExitStack,
) -> "_Run":
    """Restore or begin; everything that can be refused is refused here."""
    if manifest.vocab_size > plan.config.vocab_size:
        raise ValueError(
            f"{manifest.folder}: its tokenizer has {manifest.vocab_size} tokens, the model "
            f"vocab_size={plan.config.vocab_size}; train a smaller tokenizer or raise vocab_size"
        )
    tokenizer = tokenizer_of(manifest)
    stack.enter_context(reserved(run_dir))
    shardings = state_shardings(plan.config, plan.options.optimizer, partition)
    checkpoints = stack.enter_context(
        Checkpoints(run_dir / "checkpoints", keep=plan.keep, save_every=plan.save_every)
    )
    latest = last_step(checkpoints)
    if latest is None:
        state = init_state(
            plan.config,
            plan.options.optimizer,
            plan.seed,
            initialisation=plan.initialisation,
            params=params,
            shardings=shardings,
        )
    else:
        abstract = abstract_state(plan.config, plan.options.optimizer)
        identity = {name: plan.describe()[name] for name in ("model", "seq_len", "seed")}
        restored = checkpoints.restore(latest, with_shardings(abstract, shardings), config=identity)
        state = restored.state
        data.set_state(restored.data)
    run = _Run(plan, run_dir, data, manifest, tokenizer, partition, checkpoints, state)
    run.open_logs(stack, resumed=latest is not None)
    if heldout is not None:
        run.heldout = HeldOut(
            heldout,
            plan.heldout_batches,
            plan.config,
            compute_dtype=plan.options.compute_dtype,
            partition=partition,
            implementation=plan.options.implementation,
        )
    return run


class _Run:
    """A run in progress."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        data: Batches,
        manifest: Manifest,
        tokenizer: tuple[Tokenizer, bytes],
        partition: Partition | None,
        checkpoints: Checkpoints,
        state: TrainState,
    ):
        self.plan, self.folder, self.data, self.manifest = plan, folder, data, manifest
        self.partition, self.checkpoints, self.state = partition, checkpoints, state
        self.step = int(state.step)
        self.program = make_train_step(plan.config, plan.options, partition=partition)
        self.heldout: HeldOut | None = None
        self.heldout_before: float | None = None
        self.last_heldout: float | None = None
        self.trouble: str | None = None  # why training cannot go on
        self.tokenizer, self._tokenizer_file = tokenizer
        self._pending: tuple[int, Any, int] | None = None  # step, metrics, tokens
        self._clock = time.perf_counter()  # when the last record was written
        self._waited = 0.0  # seconds since then in which there was no batch

    def open_logs(self, stack: ExitStack, *, resumed: bool) -> None:
        """run.json, the tokenizer, metrics and the display."""
        plan, path = self.plan, self.folder / "run.json"
        about = {**plan.describe(), "source_names": list(self.data.source_names)}
        if resumed:
            self.heldout_before = loss_before(path)
        about["heldout_loss_before"] = self.heldout_before
        self.about = about
        if jax.process_index() == 0:
            try:
                write_atomic(self.folder / "tokenizer.json", self._tokenizer_file)
                self._write_about()
            except OSError as error:
                raise ValueError(f"{self.folder}: {error.strerror}; nothing was trained") from None
            self.log: Logbook | None = stack.enter_context(
                Logbook(
                    self.folder,
                    first_step=self.step + 1,
                    tensorboard=plan.tensorboard,
                    wandb=plan.wandb,
                    run_config=about,
                )
            )
        else:
            self.log = None
        tokens = plan.batches.accumulation(self.step) * plan.batches.micro_batch_tokens
        self.display = Display(
            total_steps=plan.steps,
            first_step=self.step + 1,
            tokens_per_step=tokens,
            console=None if jax.process_index() == 0 else Console(quiet=True, force_terminal=False),
        )
        stack.callback(self.display.close)
        self.display.opening(opening_rows(plan, self.folder, self.step, self.partition))

    def measure_before(self) -> None:
        """The held-out loss before the first step, once in the life of a run."""
        if self.heldout is None or self.step > 0 or self.heldout_before is not None:
            return
        self.heldout_before = self.heldout.loss(self.state.params)
        self.about["heldout_loss_before"] = self.heldout_before
        self._write_about()
        self.display.note(f"held-out loss before training: {self.heldout_before:.4f}")
        self._clock = time.perf_counter()

    def measure_after(self) -> float | None:
        """The held-out loss now; measured again only if this process has not done it."""
        if self.last_heldout is None and self.heldout is not None:
            self.last_heldout = self.heldout.loss(self.state.params)
        return self.last_heldout

    def take_step(self) -> None:
        """One step, and what is due after it."""
        plan = self.plan
        accumulation = plan.batches.accumulation(self.step)
        begin = time.perf_counter()
        batch = self._next_batch(accumulation)
        if batch is None:
            return
        self._waited += time.perf_counter() - begin
        if self.program.num_compiles == 0:
            arguments = self.state, batch, np.int32(accumulation)
            compile_together(self.program.program, *arguments)
        self.state, metrics = self.program(self.state, batch, accumulation)
        # The record of the step before is fetched while this one runs.
        self.flush()
        self.step += 1
        tokens = accumulation * plan.batches.micro_batch_tokens
        self._pending = (self.step, metrics, tokens)
        if plan.heldout_every and self._due(plan.heldout_every) and self.heldout is not None:
            self.flush(heldout=True)
        if plan.sample_every and plan.prompts and self._due(plan.sample_every):
            self.flush()
            self._sample()
        if self.checkpoints.due(self.step) and self.step < plan.steps:
            self.save()

    def flush(self, *, heldout: bool = False) -> None:
        """Write the record of the last step that has none yet."""
        if self._pending is None:
            return
        step, metrics, tokens = self._pending
        self._pending = None
        record: dict[str, Any] = {"step": step, **measuring.to_record(metrics)}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        waited, self._waited = self._waited, 0.0
        per_second = tokens / seconds
        record |= {
            "seconds": seconds,
            "tokens_per_second": per_second,
            "data_wait": waited / seconds,
            "num_compiles": self.program.num_compiles,
        }
        record |= device_numbers(self.plan, per_second)
        if heldout and self.heldout is not None:
            self.last_heldout = self.heldout.loss(self.state.params)
            record["heldout_loss"] = self.last_heldout
            self._clock = time.perf_counter()
        if self.log is not None:
            self.log.write(record)
        self.display.update(record)
        if record["skipped"]:
            self.display.note(
                f"step {step} skipped: loss {record['loss']}, gradient norm {record['grad_norm']}"
            )
        if self.trouble is None and (record["skipped_in_a_row"] or 0) >= self.plan.max_skipped:
            self.trouble = (
                f"{self.plan.max_skipped} steps in a row were skipped, up to step {step}; the "
                "parameters are those before them. Lower the learning rate or look at the data"
            )

    def save(self, *, final: bool = False) -> None:
        """A checkpoint in the background; at the end, wait for it."""
        self.flush()
        try:
            self._save()
        except SaveFailed as error:
            # Often of the save before this one: the steps so far are whole, and there may be room.
            self.display.note(f"{error}; {'trying again' if final else 'training goes on'}")
            if final:
                self._save()
        if final:
            self.checkpoints.wait()
        self._clock = time.perf_counter()

    def _save(self) -> None:
        self.checkpoints.wait()  # so that every process sees the same steps
        if as_first(self.step in self.checkpoints.steps()):
            return
        config = self.plan.describe()
        self.checkpoints.save(self.step, self.state, data=self.data.get_state(), config=config)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.plan.steps

    def _next_batch(self, accumulation: int) -> dict[str, Any] | None:
        """Micro-batches [A, b, T] of which the first `accumulation` hold text; None at the end."""
        before, parts = self.data.get_state(), []
        try:
            parts = [next(self.data) for _ in range(accumulation)]
        except StopIteration:
            self.trouble = (
                f"the data ended at step {self.step}: every source has been read max_epochs times; "
                "add text, or raise max_epochs"
            )
        except ValueError as error:
            # A damaged record. What was trained is saved; but alone: others do not know of it.
            if jax.process_count() > 1:
                raise
            self.trouble = str(error)
        if self.trouble is not None:
            self.data.set_state(before)  # part of a step is no step
            return None
        batch = stack_micro_batches(parts, self.plan.batches.max_accumulation)
        return put_batch(batch, self.partition)

    def _sample(self) -> None:
        plan = self.plan
        write_samples(
            self.folder / "samples" / f"step_{self.step:08d}.txt",
            self.state.params,
            plan.config,
            self.tokenizer,
            plan.prompts,
            tokens=plan.sample_tokens,
            end_id=self.manifest.end_id,
            compute_dtype=plan.options.compute_dtype,
            partition=self.partition,
        )
        self._clock = time.perf_counter()

    def _write_about(self) -> None:
        if jax.process_index() == 0:
            text = json.dumps(self.about, indent=1) + "\n"
            write_atomic(self.folder / "run.json", text.encode())
