"""The thread around an engine: queue, order, failures and the end, with an engine that is none."""

import asyncio
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mmx.inference.requests import Event, Sampling
from mmx.inference.service import Busy, EngineError, Service, Stopping

PROMPT = np.array([1, 2], np.int32)


class Fake:
    """Gives a request the numbers 0, 1, 2, ... and fails where it is told to."""

    def __init__(self, rows=2):
        self.rows = SimpleNamespace(tokens=np.zeros(rows))
        self.pages = SimpleNamespace(free=9, count=9)
        self.snapshots = SimpleNamespace(hits=0, saved_tokens=0)
        self.inside: dict[int, tuple[int, int]] = {}  # tokens given, and wanted
        self.submitted: list[Sampling] = []
        self.threads: set[int] = set()
        self.failing: list[BaseException] = []  # what the next steps raise
        self.gate = threading.Event()
        self.gate.set()
        self._numbers = itertools.count(100)

    @property
    def load(self):
        return len(self.inside), 0

    def submit(self, prompt, sampling):
        self.threads.add(threading.get_ident())
        if sampling.max_new_tokens > 1000:
            raise ValueError("there is no room")
        number = next(self._numbers)
        self.inside[number] = (0, sampling.max_new_tokens)
        self.submitted.append(sampling)
        return number

    def cancel(self, number):
        self.threads.add(threading.get_ident())
        self.inside.pop(number, None)
        return []

    def step(self):
        self.threads.add(threading.get_ident())
        assert self.gate.wait(20)
        time.sleep(0.001)
        assert len(self.inside) <= self.rows.tokens.size  # the queue is the service's, not ours
        if self.failing:
            raise self.failing.pop(0)
        events = []
        for number, (given, wanted) in list(self.inside.items()):
            self.inside[number] = (given + 1, wanted)
            end = given + 1 == wanted
            events.append(Event(number, given, None, "x", "length" if end else None))
            if end:
                del self.inside[number]
        return events


def served(test, *, queue=3, rows=2, grace=5.0, emptied=True):
    """Run a coroutine of (service, engine, log) with a service that is closed afterwards."""

    async def main():
        engine, log = Fake(rows), []
        service = Service(engine, queue=queue, log=log.append)  # pyright: ignore[reportArgumentType]
        try:
            await test(service, engine, log)
        finally:
            engine.gate.set()
            await service.close(grace=grace)
            assert not service.running
        assert not service._open
        assert not (emptied and engine.inside)
        assert len(engine.threads) <= 1  # one thread touches the engine
        assert threading.get_ident() not in engine.threads

    asyncio.run(main())


def ask(service, *lengths):
    samplings = [Sampling(max_new_tokens=length) for length in lengths]
    return service.submit([PROMPT] * len(lengths), samplings)


async def gather(answers):
    """Tokens of each request."""
    got = {}
    with answers:
        async for events in answers:
            for index, event in events:
                got.setdefault(index, []).append(event.token)
    return got


async def until(condition):
    end = time.perf_counter() + 10
    while not condition():
        assert time.perf_counter() < end
        await asyncio.sleep(0.002)


def test_answers_come_to_whom_asked():
    async def test(service, engine, log):
        asked = [ask(service, 3), ask(service, 1, 5), ask(service, 2)]
        seen = await asyncio.gather(*map(gather, asked))
        assert seen == [{0: [0, 1, 2]}, {0: [0], 1: [0, 1, 2, 3, 4]}, {0: [0, 1]}]
        assert service.counters.outcomes["length"] == 4
        assert service.counters.generated_tokens == 11
        assert service.counters.prompt_tokens == 8
        assert sum(service.counters.first_token.counts) == 4
        assert sum(service.counters.each_token.counts) == 3  # one token has none after the first
        assert log == []

    served(test)


def test_the_queue_has_an_end_and_all_or_none_come_in():
    async def test(service, engine, log):
        engine.gate.clear()
        first = ask(service, 1, 2, 3, 4)
        await until(lambda: len(engine.inside) == 2)
        with pytest.raises(Busy, match="4 requests are at work or waiting"):
            ask(service, 1, 1)
        service.check()
        last = ask(service, 1)
        for attempt in (service.check, lambda: ask(service, 1)):
            with pytest.raises(Busy):
                attempt()
        with pytest.raises(ValueError, match="6 answers are asked for at once; at most 5"):
            ask(service, *[1] * 6)
        engine.gate.set()
        await asyncio.gather(gather(first), gather(last))
        assert [s.max_new_tokens for s in engine.submitted] == [1, 2, 3, 4, 1]  # in order
        assert await gather(ask(service, 2)) == {0: [0, 1]}

    served(test)


def test_who_gives_up_is_forgotten_wherever_it_stands():
    async def test(service, engine, log):
        engine.gate.clear()
        staying = ask(service, 4)
        going = [ask(service, 50), ask(service, 50, 50)]
        await until(lambda: len(engine.inside) == 2)
        for answers in going:
            with answers:
                pass
        engine.gate.set()
        assert await gather(staying) == {0: [0, 1, 2, 3]}
        await until(lambda: not service._open)
        assert service.counters.outcomes["cancelled"] == 3
        assert [s.max_new_tokens for s in engine.submitted] == [4, 50]  # others never came in
        assert await gather(ask(service, 1)) == {0: [0]}

    served(test)


def test_a_request_that_the_engine_refuses_ends_alone():
    async def test(service, engine, log):
        good, bad = ask(service, 3), ask(service, 1001)
        with pytest.raises(ValueError, match="there is no room"):
            await gather(bad)
        assert await gather(good) == {0: [0, 1, 2]}
        assert service.counters.outcomes["error"] == 1

    served(test)


def test_a_step_that_fails_ends_those_inside_and_nobody_else():
    async def test(service, engine, log):
        engine.gate.clear()
        asked = [ask(service, 5) for _ in range(4)]
        await until(lambda: len(engine.inside) == 2)
        engine.failing.append(RuntimeError("out of\nmemory"))
        engine.gate.set()
        seen = await asyncio.gather(*map(gather, asked), return_exceptions=True)
        assert [type(one) for one in seen] == [EngineError, EngineError, dict, dict]
        assert str(seen[0]) == "the engine failed (RuntimeError: out of memory)"
        assert seen[2] == {0: [0, 1, 2, 3, 4]}
        assert service.broken is None
        assert service.gauges.healthy
        assert service.counters.engine_failures == 1
        assert service.counters.outcomes["error"] == 2
        [line] = log
        assert line.startswith("a step of the engine failed, and 2 requests with it")
        # Failures with successes in between do not add up.
        for _ in range(4):
            engine.failing.append(RuntimeError("again"))
            with pytest.raises(EngineError):
                await gather(ask(service, 2))
            assert await gather(ask(service, 2)) == {0: [0, 1]}

    served(test)


def test_three_failures_in_a_row_break_it():
    async def test(service, engine, log):
        engine.gate.clear()
        engine.failing += [RuntimeError("dead")] * 9
        asked = [ask(service, 5) for _ in range(5)]
        engine.gate.set()
        await asyncio.gather(*map(gather, asked), return_exceptions=True)
        for _ in range(3):
            try:
                await gather(ask(service, 2))
            except EngineError:
                continue
        assert service.broken == "RuntimeError: dead"
        assert not service.gauges.healthy
        with pytest.raises(EngineError, match="the engine has failed"):
            service.check()
        assert any("restart the server" in line for line in log)
        assert all("\n" not in line for line in log)

    served(test)


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError("no"), KeyboardInterrupt()])
def test_what_no_engine_should_raise_ends_all_requests(error):
    """A panic of an extension is no Exception; nobody may wait forever for it."""

    async def test(service, engine, log):
        engine.gate.clear()
        asked = [ask(service, 5) for _ in range(5)]
        await until(lambda: len(engine.inside) == 2)
        engine.failing += [error] * 3
        engine.gate.set()
        seen = await asyncio.wait_for(
            asyncio.gather(*map(gather, asked), return_exceptions=True), 10
        )
        assert all(isinstance(one, EngineError) for one in seen[:2])
        assert service.broken or isinstance(error, MemoryError)

    # After a panic the engine is not touched again, so what is in it stays there.
    served(test, emptied=isinstance(error, MemoryError))


def test_closing_waits_for_those_who_are_in():
    async def test(service, engine, log):
        slow = asyncio.create_task(gather(ask(service, 40)))
        await until(lambda: engine.inside)
        closing = asyncio.create_task(service.close(grace=10))
        await until(lambda: service.stopping)
        with pytest.raises(Stopping):
            ask(service, 1)
        assert not service.gauges.healthy
        assert await slow == {0: list(range(40))}
        await closing
        assert not service.running

    served(test)


def test_closing_ends_those_who_take_too_long():
    async def test(service, engine, log):
        asked = [asyncio.create_task(gather(ask(service, 1000))) for _ in range(4)]
        await until(lambda: len(engine.inside) == 2)
        began = time.perf_counter()
        await service.close(grace=0.2)
        seen = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, Stopping) for one in seen)
        assert time.perf_counter() - began < 5
        assert service.counters.outcomes["cancelled"] == 4

    served(test)


def test_a_step_that_never_ends_does_not_hold_the_end():
    async def main():
        engine = Fake()
        engine.gate.clear()
        service = Service(engine, queue=1, log=lambda line: None)  # pyright: ignore[reportArgumentType]
        asking = asyncio.create_task(gather(ask(service, 5)))
        await until(lambda: engine.inside)
        closing = asyncio.create_task(service.close(grace=0))
        await asyncio.sleep(0.1)
        closing.cancel()
        assert service.running  # which `serve` reports
        engine.gate.set()
        with pytest.raises(Stopping):
            await asking
        await service.close(grace=0)

    asyncio.run(main())
