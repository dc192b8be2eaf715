"""An engine for many callers of one event loop: a thread of its own, and a queue with an end.

The thread alone touches the engine. It hands in waiting requests as rows become free, steps while
there is work, and sleeps otherwise. What it and the callers share is under one lock.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmx.inference.engine import Engine
from mmx.inference.requests import Event, Sampling
from mmx.inference.service_metrics import Counters, Gauges, Outcome

_FAILURES = 3  # steps that raise in a row, with nothing given in between: the engine is broken


class Busy(Exception):
    """The queue is full; the same request may be let in later."""


class Stopping(Exception):
    """The service is being shut down."""


class EngineError(Exception):
    """The engine failed, in the middle of a request or for good."""


class Answers:
    """What requests that were submitted together get, as it comes.

    Iterating gives lists of (index of the request, event) until all have ended, or raises
    `EngineError` or `Stopping`. At the end of a `with` block those that have not ended are given
    up; nobody else may wait for events meanwhile.
    """

    def __init__(self, service: "Service", count: int):
        self._service = service
        self._left = count
        self._events: list[tuple[int, Event]] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *unused: object) -> None:
        if self._left:
            self._service._give_up(self)

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        events, self._events = self._events, []
        return events

    def _receive(self, index: int, event: Event | Exception) -> None:
        """On the event loop."""
        if isinstance(event, Exception):
            self._error = event
        else:
            self._events.append((index, event))
            self._left -= event.finish_reason is not None
        self._news.set()


@dataclass(eq=False)
class _Request:
    """One request on its way; `number` is the engine's, once it is there."""

    answers: Answers
    index: int
    prompt: np.ndarray
    sampling: Sampling
    submitted: float
    number: int | None = None
    first: float = 0.0  # when the first token came
    tokens: int = 0


class Service:
    """Runs an engine; made and used on one event loop, which must run until `close`.

    Args:
      engine: idle, and nobody else's from now on.
      queue: requests that may wait beyond the engine's rows.
      log: called with one line when the engine fails.
    """

    def __init__(self, engine: Engine, *, queue: int, log: Callable[[str], None] = print):
        if queue < 0:
            raise ValueError(f"queue is {queue}; it must be 0 or more")
        self.engine, self.counters = engine, Counters()
        self.rows: int = engine.rows.tokens.size
        self.capacity = self.rows + queue
        self.broken: str | None = None
        self.stopping = False
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        # Under `_wake`: what waits, what has been given up, and all that have not ended.
        self._waiting: deque[_Request] = deque()
        self._given_up: list[Answers] = []
        self._open: set[_Request] = set()
        self._closed = False
        # The thread's own: requests in the engine by its number, and failures in a row.
        self._inside: dict[int, _Request] = {}
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="mmx engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ callers

    def submit(self, prompts: Sequence[np.ndarray], samplings: Sequence[Sampling]) -> Answers:
        """Let requests in, all or none.

        Args:
          prompts: int32 ids, each checked (`requests.check_prompt`) as are the samplings.

        Raises:
          Busy: they do not fit into the queue now.
          Stopping, EngineError: no request is let in any more.
          ValueError: they could never fit.
        """
        if len(prompts) > self.capacity:
            raise ValueError(
                f"{len(prompts)} answers are asked for at once; at most {self.capacity} can be"
            )
        answers, now = Answers(self, len(prompts)), time.perf_counter()
        with self._wake:
            self._check(len(prompts))
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                request = _Request(answers, index, prompt, sampling, now)
                self._waiting.append(request)
                self._open.add(request)
                self.counters.prompt_tokens += prompt.size
            self._wake.notify()
        return answers

    def check(self, before: int = 0) -> None:
        """Raise what `submit` would now, whatever the request: before work is spent on it.

        Args:
          before: requests that are about to be submitted, and come first.
        """
        with self._wake:
            self._check(1, before)

    def _check(self, count: int, before: int = 0) -> None:
        if self.stopping:
            raise Stopping("the server is shutting down")
        if self.broken is not None:
            raise EngineError(f"the engine has failed ({self.broken})")
        there = len(self._open) + before
        if there + count > self.capacity:
            raise Busy(f"{there} requests are at work or waiting; try again later")

    @property
    def gauges(self) -> Gauges:
        """What holds now; of the engine between two of its lines of code."""
        working, inside = self.engine.load
        return Gauges(
            working=working,
            waiting=inside + len(self._waiting),
            rows=self.rows,
            pages_free=self.engine.pages.free,
            pages=self.engine.pages.count,
            prefix_hits=self.engine.snapshots.hits,
            prefix_tokens=self.engine.snapshots.saved_tokens,
            healthy=self.broken is None and not self.stopping,
        )

    async def close(self, *, grace: float) -> None:
        """Let nobody in, wait so many seconds for those who are, end the rest with `Stopping`."""
        self.stopping = True
        until = time.perf_counter() + grace
        while self._open and time.perf_counter() < until:
            await asyncio.sleep(0.02)
        with self._wake:
            self._closed = True
            self._wake.notify()
        while self._thread.is_alive() and time.perf_counter() < until + 5:
            await asyncio.sleep(0.02)

    @property
    def running(self) -> bool:
        """Whether the thread is still there; after `close` only where a step takes long."""
        return self._thread.is_alive()

    def _give_up(self, answers: Answers) -> None:
        with self._wake:
            self._given_up.append(answers)
            self._wake.notify()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while self._sleep():
                self._work()
            for number in list(self._inside):
                self.engine.cancel(number)
        except BaseException as error:  # even a panic in somebody's extension
            self._break(error)
        self._end_all(Stopping("the server is shutting down"))

    def _sleep(self) -> bool:
        """Wait for work; False where there will be none."""
        with self._wake:
            while not (self._closed or self._waiting or self._given_up or self._inside):
                self._wake.wait()
            given_up, self._given_up = self._given_up, []
            closed = self._closed
        for answers in given_up:
            self._cancel(answers)
        return not closed

    def _work(self) -> None:
        """Hand in what there are rows for, and step."""
        gone: list[tuple[_Request, Event | Exception]] = []
        try:
            while self._waiting and sum(self.engine.load) < self.rows:
                with self._wake:
                    request = self._waiting.popleft()
                try:
                    request.number = self.engine.submit(request.prompt, request.sampling)
                except ValueError as error:  # not checked, or not by the engine's own numbers
                    gone.append((request, error))
                    continue
                self._inside[request.number] = request
            if self._inside:
                for event in self.engine.step():
                    if event.request in self._inside:
                        gone.append((self._inside[event.request], event))
                        self._failures = 0
        except Exception as error:
            gone += self._failed(error)
        self._deliver(gone)

    def _failed(self, error: Exception) -> list[tuple[_Request, Event | Exception]]:
        """After a step that raised: end what is in the engine; what waits goes on if it can."""
        reason = _said(error)
        self.counters.engine_failures += 1
        self._failures += 1
        self._log(
            f"a step of the engine failed, and {len(self._inside)} requests with it: {reason}"
        )
        requests = list(self._inside.values())
        try:
            for number in list(self._inside):
                self.engine.cancel(number)
            if self._failures >= _FAILURES:
                raise error
        except Exception as again:
            self._break(again)
        return [(request, EngineError(f"the engine failed ({reason})")) for request in requests]

    def _break(self, error: BaseException) -> None:
        """Let nobody in any more, and end all who are."""
        with self._wake:
            self.broken = _said(error)
        self._log(f"the engine is broken, restart the server: {self.broken}")
        self._end_all(EngineError(f"the engine has failed ({self.broken})"))

    def _end_all(self, error: Exception) -> None:
        with self._wake:
            requests = list(self._open)
            self._waiting.clear()
        self._inside.clear()
        self._deliver([(request, error) for request in requests])

    def _cancel(self, answers: Answers) -> None:
        """Forget requests whose caller has gone, and free what they hold."""
        with self._wake:
            ours = [request for request in self._open if request.answers is answers]
            self._waiting = deque(r for r in self._waiting if r.answers is not answers)
        for request in ours:
            if request.number is not None:
                self.engine.cancel(request.number)
        self._closing(ours, "cancelled")

    def _deliver(self, given: list[tuple[_Request, Event | Exception]]) -> None:
        """Count, and hand over to the event loop at once: waking it for each would be slow."""
        now = time.perf_counter()
        for request, event in given:
            if isinstance(event, Exception):
                self._closing([request], "cancelled" if isinstance(event, Stopping) else "error")
                continue
            if event.token is not None:
                self._count(request, now)
            if event.finish_reason is not None:
                self._closing([request], event.finish_reason)
                if request.tokens > 1:
                    mean = (now - request.first) / (request.tokens - 1)
                    self.counters.each_token.observe(mean)

        def hand_over() -> None:
            for request, event in given:
                request.answers._receive(request.index, event)

        if given and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(hand_over)

    def _count(self, request: _Request, now: float) -> None:
        self.counters.generated_tokens += 1
        request.tokens += 1
        if request.tokens == 1:
            request.first = now
            self.counters.first_token.observe(now - request.submitted)

    def _closing(self, requests: Sequence[_Request], outcome: Outcome) -> None:
        with self._wake:
            for request in requests:
                if request.number is not None:
                    self._inside.pop(request.number, None)
                if request in self._open:
                    self._open.remove(request)
                    self.counters.outcomes[outcome] += 1


def _said(error: BaseException) -> str:
    """An error as one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:299] + "…"
