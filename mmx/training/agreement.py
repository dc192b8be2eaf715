"""What the processes of a run decide together, so that all do the same; alone, it costs nothing."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

_STEPS = itertools.count(1)  # of all runs of this process, as often as it asked whether to stop
_LONGEST_COMPILE = 7200  # seconds; a process that dies meanwhile is noticed at once


def as_first(value: int) -> int:
    """The value that process 0 has; files of a shared folder may show up later elsewhere."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def by_first(action: Callable[[], object]) -> None:
    """Process 0 does something to files that all share, before the others go on.

    Raises:
      OSError, ValueError: it failed, in every process; process 0 has the words.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            action()
        except (OSError, ValueError) as error:
            problem = error
    number = 0 if problem is None else getattr(problem, "errno", None) or -1
    number = as_first(number)
    if problem is not None:
        raise problem
    if number == -1:
        raise ValueError("process 0 has refused; it says why")
    if number:
        raise OSError(number, f"process 0: {os.strerror(number)}")


def compile_together(program: Any, *arguments: Any, **options: Any) -> None:
    """Compile a jitted function in every process before one of them runs it.

    On CPU a collective gives up on a process that comes 30 seconds late, and compiling takes
    longer. The call itself then finds the program; nothing is compiled twice.
    """
    if jax.process_count() == 1:
        return
    program.lower(*arguments, **options).compile()
    client = distributed.global_state.client  # jax.distributed offers no barrier of its own
    assert client is not None
    client.wait_at_barrier(f"compiled {program.__name__}", _LONGEST_COMPILE * 1000)


@contextmanager
def signals() -> Iterator[dict[str, bool]]:
    """Note SIGTERM and SIGINT instead of dying of them; the second one is as usual.

    Of several processes, jax's runtime notes SIGTERM for all of them, so SIGINT becomes one.
    """
    several = jax.process_count() > 1
    asked = {"asked": False}
    before = {}

    def note(number: int, frame: object) -> None:
        asked["asked"] = True
        signal.signal(number, before[number])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever runs it handles signals
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_agreed(asked: bool) -> bool:
    """Whether to stop before the next step: a process was asked to, and all do before the same one.

    Nothing is exchanged before one is asked: a collective a step would let the devices wait for
    the host.
    """
    if jax.process_count() == 1:
        return asked
    # Of the process and not of the run: a later run's steps begin anew, and the number that all
    # agree on may lie past the last step of this one.
    return multihost_utils.reached_preemption_sync_point(next(_STEPS))
