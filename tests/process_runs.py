"""Recipes in several processes on loopback, forked, with a model that compiles in moments."""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import train_runs
from jax._src import cache_key
from jax.experimental import multihost_utils

from mmx import cli
from mmx.training import loop, plotting
from mmx.training.checkpoint import complete_steps
from recipes import extend_context, pretrain
from recipes.extend_context import ExtendContext, Stage
from recipes.processes import together
from sharding import MeshConfig
from sharding.processes import Processes

STEPS = 8
CONFIG = replace(train_runs.CONFIG, layer_kinds=("lightning",))
EXTENSION = ExtendContext(
    from_run=Path("from"),
    run_dir=Path("long"),
    corpus=None,
    stages=(
        Stage(128, 20_000.0, 5, 1e-3, 8, mix=(0.3, 0.7, 0.0)),
        Stage(256, 40_000.0, 5, 1e-3, 8, mix=(0.35, 0.35, 0.3)),
    ),
    documents=6,
    short_len=32,
    depths=(0.0, 1.0),
    needles=2,
    compute_dtype="float32",
    remat="none",
    mesh=MeshConfig(fsdp=1, seq=-1),
    tensorboard=False,
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(corpus, folder, *options) -> list[str]:
    """`mmx train` on the corpus of `train_runs`."""
    return [
        "train", "demo", "--corpus", str(corpus), "--run-dir", str(folder),
        "--seq-len", str(train_runs.LENGTH), "--batch-size", str(train_runs.ROWS),
        "--weights", "one", "0.5", "two", "0.5", "--steps", str(STEPS), "--save-every", "2",
        "--heldout-every", "2", "--sample-every", "4", "--shuffle-rows", "32",
        "--no-tensorboard", *map(str, options),
    ]  # fmt: skip


def by_hand(port: int, process: int, count: int) -> list[str]:
    return [
        "--coordinator", f"127.0.0.1:{port}", "--process-id", str(process),
        "--num-processes", str(count),
    ]  # fmt: skip


def child(arguments, log, programs, devices, at=None) -> None:
    """The command, its words in a file; `at` is (step, signal): sent to itself before that step."""
    words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_disable_most_optimizations", True)
    train_runs.keep_programs(programs)
    # One process compiles for all; the key of a program has in it which process asks.
    jax.config.update("jax_share_binary_between_hosts", True)
    cache_key._hash_accelerator_config = cache_key._hash_devices
    pretrain.preset = lambda name: CONFIG
    extend_context.PRESETS["demo"] = EXTENSION
    plotting.draw = lambda folder, file: file  # importing matplotlib takes as long as the run
    if at is not None:
        _signal_before(*at)
    code = cli.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def collectives(asked: Processes, log, ending=None) -> None:
    """No training: collectives for some seconds; after five of them `ending` comes, if any."""
    words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    with together(asked, train_runs.CONFIG):
        for number in range(40):
            if number == 5 and ending is not None:
                ending()
            multihost_utils.process_allgather(np.array(number))
            time.sleep(0.05)


def die() -> None:
    os.kill(os.getpid(), KILL)


def interrupt() -> None:
    """As Ctrl-C does, also where whoever started the tests ignores it, as a shell's `&` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise ValueError("the disk is full")


def _signal_before(step: int, number: int) -> None:
    take_step = loop._Run.take_step

    def take(self):
        if self.step == step - 1:
            due = (step - 1) // self.plan.save_every * self.plan.save_every
            while number == KILL and due not in complete_steps(self.checkpoints.folder):
                time.sleep(0.1)  # `wait` of this process alone would wait for the others
            os.kill(os.getpid(), number)
        if self.step >= step - 1:
            time.sleep(1)  # steps here take less than jax's runtime to hear of a signal
        take_step(self)

    loop._Run.take_step = take


class Group:
    """Children that run the same command, each with its number."""

    def __init__(self, processes, folder, programs):
        self.processes, self.folder, self.programs = processes, folder, programs
        self.children, self.logs = [], []

    def start(self, arguments, *, devices=2, at=None):
        log = self.folder / f"log-{len(self.children)}-{time.monotonic_ns()}"
        self.logs.append(log)
        options = (arguments, log, self.programs, devices, at)
        self.children.append(self.processes.Process(target=child, args=options))
        self.children[-1].start()
        return self

    def end(self, limit=600.0):
        """Exit code, last error line and seconds until the end, of each."""
        begin, seconds = time.monotonic(), {}
        while len(seconds) < len(self.children):
            for number, process in enumerate(self.children):
                if number not in seconds and not process.is_alive():
                    seconds[number] = time.monotonic() - begin
            if time.monotonic() - begin > limit:
                for process in self.children:
                    process.kill()
                raise AssertionError("\n".join(log.read_text() for log in self.logs))
            time.sleep(0.05)
        codes = [process.exitcode for process in self.children]
        return codes, [errors(log.read_text()) for log in self.logs]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("mmx: error:")]


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


KILL, TERM = signal.SIGKILL, signal.SIGTERM
