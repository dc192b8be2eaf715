"""Where chat templates are rendered: processes that are kept, and a fork of one for each render.

A kept process (`chat_worker`) has loaded what rendering needs, and forks for every question; the
fork alone sees the template, under limits of the operating system, and ends with its answer. So
nothing of one template is there for the next, and starting Python is paid for once.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("chat_worker.py")
_KEPT = 4  # processes that may be idle
_START = 60.0  # seconds that one may take to be ready: a busy machine needs a few
_idle: "list[_Worker]" = []


def ask(question: dict[str, Any], seconds: float) -> dict[str, str]:
    """What the worker answers to a question, see there; of a render that was ended, an error.

    Args:
      seconds: after which the process that renders is killed, and the one that forked it.
    """
    kept = _kept()
    if kept is not None and (answer := _answer(kept, question, seconds)) is not None:
        return answer  # else it was ended while it was idle
    answer = _answer(_Worker(), question, seconds)
    return {"error": "its process was ended, or does not start"} if answer is None else answer


def _answer(worker: "_Worker", question: dict[str, Any], seconds: float) -> dict[str, str] | None:
    """The answer of one, which is then kept or ended; None where it is not there."""
    answer = None
    try:
        answer = worker.ask(question, seconds) if worker.ready else None
    finally:
        if answer is None or worker.killed or len(_idle) >= _KEPT:
            worker.end()
        else:
            _idle.append(worker)
    return answer


class _Worker:
    """A process that forks for each question. It ends when its stdin does, as with this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.killed = False
        # In a group of its own, with its forks: they end together, and not by a Ctrl-C for us.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        with self._within(_START):
            self.ready = self._out.readline() == b"ready\n"

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, str] | None:
        """What its fork answers; None where there is none, since it has ended."""
        said = code = b""
        with self._within(seconds), contextlib.suppress(OSError):  # a pipe that was cut
            self._in.write(json.dumps(question).encode() + b"\n")
            self._in.flush()
            said, code = self._out.readline(), self._out.readline()
        if self.killed:
            return {"error": f"takes more than {seconds:g} seconds"}
        if not code:
            return None
        try:
            return json.loads(said)
        except ValueError:
            return {"error": f"its process ended with code {code.decode().strip()}"}

    def end(self) -> None:
        """Kill it and its fork, and leave nothing of them."""
        self._kill()
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):  # what was not written is of no use
                pipe.close()
        self._process.wait()

    def _kill(self) -> None:
        self.killed = True
        if self._process.returncode is None:  # else its number may be somebody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Kill it after so many seconds, which ends all reading and writing."""
        clock = threading.Timer(seconds, self._kill)
        clock.daemon = True
        clock.start()
        try:
            yield
        finally:
            clock.cancel()
            clock.join()


def _kept() -> _Worker | None:
    """One that is idle."""
    with contextlib.suppress(IndexError):
        while True:
            worker = _idle.pop()
            if worker.owner == os.getpid():  # not of the process that this one was forked from
                return worker
    return None
