"""A training run killed at random moments, many times, and one that nothing happens to.

    python kill_runs.py CORPUS WHOLE KILLED STEPS KILLS SEED

Prints one JSON line a life of the killed run: how far it came, and what it found when it began.
Lives are forks of a process that has imported everything and has not yet touched a device.
"""

import json
import os
import pickle
import random
import signal
import sys
import threading
import time
from pathlib import Path

import train_runs
from jax.experimental import serialize_executable

from mmx.data.shards import Manifest, write_atomic
from mmx.training import folders, loop
from mmx.training.step import TrainStep

SAVE_EVERY = 3


def life(
    corpus: Path, folder: Path, steps: int, *, die_after: tuple[int, float | None] | None
) -> None:
    """Train in a child; with `die_after`, SIGKILL comes some seconds after some step is logged.

    None seconds: as soon as the folder of the next save is there.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"a life ended with {code}")
        return
    try:
        train_runs.keep_programs(folder.parent / "programs")
        _keep_step(folder.parent / "step")
        if die_after is not None:
            _die(folder / "checkpoints", *die_after)
        options = dict(save_every=SAVE_EVERY, heldout_every=0)
        train_runs.run(Manifest.load(corpus), folder, steps, **options)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def _keep_step(file: Path) -> None:
    """Compile the step in the first life; tracing it would be most of what the others do."""
    make = loop.make_train_step

    def make_kept(config, options, **placed):
        traced = make(config, options, **placed).program
        return TrainStep(config, KeptProgram(file, traced))

    loop.make_train_step = make_kept


class KeptProgram:
    """A jitted function that is compiled, or read from the file where that has been done."""

    def __init__(self, file: Path, traced):
        self.file, self.traced, self.compiled = file, traced, None

    def __call__(self, *arguments):
        if self.compiled is None:
            if self.file.exists():
                parts = pickle.loads(self.file.read_bytes())
            else:
                parts = serialize_executable.serialize(self.traced.lower(*arguments).compile())
                write_atomic(self.file, pickle.dumps(parts))
            self.compiled = serialize_executable.deserialize_and_load(*parts)
        return self.compiled(*arguments)

    def _cache_size(self) -> int:
        return 1


def _die(checkpoints: Path, step: int, seconds: float | None) -> None:
    """From another thread, so that the moment is none the training knows of."""
    reached, swept = threading.Event(), threading.Event()
    write, prepare = loop.Logbook.write, folders.prepare

    def write_and_tell(self, record):
        write(self, record)
        if record["step"] >= step:
            reached.set()

    def prepare_and_tell(*about):
        prepare(*about)
        swept.set()  # what an earlier life left of a save is gone

    def kill():
        reached.wait()
        if seconds is None:
            swept.clear()
            swept.wait()
            while not partial(checkpoints):
                time.sleep(0)
        else:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    loop.Logbook.write = write_and_tell
    folders.prepare = prepare_and_tell
    threading.Thread(target=kill, daemon=True).start()


def partial(checkpoints: Path) -> bool:
    """Whether a save has begun and not ended."""
    return any(path.name.endswith(folders.SAVING) for path in checkpoints.glob("*"))


def saved(folder: Path) -> int:
    """The last complete step, 0 before the first."""
    return max(folders.complete(folder / "checkpoints")[0], default=0)


def logged(folder: Path) -> int:
    """Whole lines of the metrics."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    corpus, whole, killed = map(Path, sys.argv[1:4])
    steps, kills, seed = map(int, sys.argv[4:])
    life(corpus, whole, steps, die_after=None)
    chance = random.Random(seed)
    for number in range(kills):
        begin = saved(killed)
        # After two saves are due the first is complete, however slow the disk is beside the steps.
        step = begin + chance.randint(1, 3 * SAVE_EVERY)
        inside = number % 4 == 1
        seconds = None if inside else chance.uniform(0, 0.3)
        life(corpus, killed, steps, die_after=(step, seconds))
        record = dict(
            began=begin,
            saved=saved(killed),
            logged=logged(killed),
            inside=inside,
            partial=partial(killed / "checkpoints"),
        )
        print(json.dumps(record), flush=True)
    life(corpus, killed, steps, die_after=None)


if __name__ == "__main__":
    main()
