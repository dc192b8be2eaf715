"""The server with too many callers, callers who go, parts that fail, and at its end."""

import asyncio
import concurrent.futures
import json
import resource
import signal
import socket
import threading
import time
from collections import Counter

import bad_requests
import pytest
from bad_requests import COMPLETION, JSON
from serving import (
    NAME,
    QUEUE,
    ROWS,
    TOKENIZER,
    Gate,
    call,
    head,
    make_engine,
    probe,
    quick,
    running,
)
from sweeps import sweep

from mmx.inference import server as server_module
from mmx.inference.chat import ChatTemplate

COMPLETIONS = "/v1/completions"
LONG = {"model": NAME, "prompt": [5, 6], "max_tokens": 240, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with running() as it:
        yield it


# ---------------------------------------------------------------- the queue


def test_a_full_queue_says_when_to_come_again():
    engine = make_engine()
    gate = Gate(engine)
    with running(engine=engine) as server, concurrent.futures.ThreadPoolExecutor(32) as pool:
        gate.shut()
        capacity = ROWS + QUEUE
        body = {**COMPLETION, "max_tokens": 2}
        asked = [pool.submit(call, server, COMPLETIONS, body) for _ in range(capacity)]
        until = time.perf_counter() + 20
        while len(server.service._open) < capacity:
            assert time.perf_counter() < until
            time.sleep(0.01)
        for path, extra in ((COMPLETIONS, {}), (COMPLETIONS, {"stream": True})):
            answer = quick(lambda path=path, extra=extra: call(server, path, body | extra))
            assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
            assert answer.headers["retry-after"] == "1"
            assert answer.json["error"]["type"] == "rate_limit_error"
        assert call(server, "/health").status == 200
        assert b"mmx_requests_total" in call(server, "/metrics").body
        assert server.service.counters.outcomes["busy"] == 2
        gate.open()
        answers = [one.result(60) for one in asked]
        assert {a.status for a in answers} == {200}
        assert len({json.dumps(a.json["choices"]) for a in answers}) == 1
        assert server.all_free()


# ---------------------------------------------------------------- who goes away


def test_two_hundred_disconnects_free_everything(server):
    """In the middle of streams, of answers in one piece, in the queue, and with pipelined bytes."""
    before = probe(server)
    counted = server.service.counters.outcomes["cancelled"]

    async def go(index):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps({**LONG, "stream": index % 2 == 0}).encode()
        request = head(COMPLETIONS, JSON, f"content-length: {len(body)}") + body
        writer.write(request * (2 if index % 5 == 4 else 1))
        await writer.drain()
        if index % 2 == 0:
            line = await reader.readline()
            if b"200" in line:
                await reader.readuntil(b"data: ")
            else:
                assert b"429" in line
        else:
            await asyncio.sleep(0.02 * (index % 4))
        if index % 3:
            writer.transport.abort()
        else:
            writer.close()

    async def main():
        for first in range(0, 200, 8):
            await asyncio.gather(*(go(i) for i in range(first, first + 8)))

    asyncio.run(main())
    # 240 tokens of a request take far longer than this, were they not cancelled.
    assert server.all_free()
    assert server.service.counters.outcomes["cancelled"] - counted >= 100
    assert probe(server) == before
    assert server.lines == []


def test_who_pipelines_and_goes_is_noticed():
    engine = make_engine()
    gate = Gate(engine)
    with running(engine=engine) as server:
        gate.shut()
        body = json.dumps(LONG).encode()
        request = head(COMPLETIONS, JSON, f"content-length: {len(body)}") + body
        with socket.create_connection(("127.0.0.1", server.port)) as wire:
            wire.sendall(request + request)
            until = time.perf_counter() + 10
            while not server.service._open:
                assert time.perf_counter() < until
                time.sleep(0.01)
            time.sleep(0.1)
        until = time.perf_counter() + 10
        while not server.service._given_up:  # while the engine stands still
            assert time.perf_counter() < until, "the client has gone and nobody has seen it"
            time.sleep(0.01)
        gate.open()
        assert server.all_free()


# ---------------------------------------------------------------- overload


def overload(server, seconds, clients):
    """So many clients that ask again as soon as they are answered; outcomes, and what was wrong."""
    seen, wrong = Counter(), []
    sizes = (1, 4, 16, 30)
    until = time.perf_counter() + seconds

    def ask(index):
        number = 0
        while time.perf_counter() < until:
            number += 1
            most = sizes[(index + number) % 4]
            body = {
                "model": NAME, "prompt": [index % 300, number % 300], "max_tokens": most,
                "ignore_eos": True, "return_token_ids": True,
            }  # fmt: skip
            answer = call(server, COMPLETIONS, body, timeout=120)
            seen[answer.status] += 1
            if answer.status == 200:
                whole = len(answer.json["choices"][0]["token_ids"]) == most
                if not whole:
                    wrong.append(answer)
            elif answer.status not in (429, 503) or "retry-after" not in answer.headers:
                wrong.append(answer)
            else:
                time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen, wrong


@pytest.mark.parametrize("seconds", sweep((4, 60), lambda seconds: seconds < 60))
def test_overload(server, seconds):
    """Ten times what fits, all the time: who is let in is answered, others must wait."""
    before = probe(server)
    overload(server, 1, 20)  # whatever is allocated once
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen, wrong = overload(server, seconds, 10 * (ROWS + QUEUE))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    assert wrong == []
    assert seen[200] >= ROWS + QUEUE
    assert seen[429] > 0
    assert grown < 100 << 10  # KiB; the clients' 160 threads are in there
    assert server.all_free()
    assert probe(server) == before
    assert server.lines == []


# ---------------------------------------------------------------- templates, tokenizers, failures


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
    ids=["loops", "reaches", "raises", "none"],
)
def test_a_bad_template_fails_its_request_alone(source, said):
    template = ChatTemplate(source, file="the model")
    with running(template=template) as server:
        before = probe(server)
        answer = call(server, "/v1/chat/completions", bad_requests.CHAT)
        assert answer.status == 400
        error = answer.json["error"]
        assert error["param"] == "messages"
        assert error["message"].startswith("the model: the chat template fails (")
        assert said in error["message"]
        assert probe(server) == before


class Panicking:
    """A tokenizer whose library gives up: what Rust's panics are to Python is no Exception."""

    class Panic(BaseException):
        pass

    def __init__(self, panics):
        self.panics = panics

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def __setattr__(self, name, value):
        if name == "panics":
            self.__dict__[name] = value
        else:
            setattr(TOKENIZER, name, value)

    def encode_batch_fast(self, texts, **options):
        if self.panics == "encode" and "boom" in texts[0]:
            raise self.Panic("index out of bounds")
        return TOKENIZER.encode_batch_fast(texts, **options)

    def id_to_token(self, token):
        if self.panics == "decode" and token == 77:
            raise self.Panic("index out of bounds")
        return TOKENIZER.id_to_token(token)


def test_a_tokenizer_that_panics_on_a_prompt():
    with running(tokenizer=Panicking("encode")) as server:
        before = probe(server)
        for path, body in (
            (COMPLETIONS, {**COMPLETION, "prompt": "boom"}),
            (
                "/v1/chat/completions",
                {**bad_requests.CHAT, "messages": [{"role": "user", "content": "boom"}]},
            ),
        ):
            answer = call(server, path, body)
            assert answer.status == 400
            assert "the tokenizer cannot encode the prompt" in answer.json["error"]["message"]
            assert answer.json["error"]["param"] in ("prompt", "messages")
        assert probe(server) == before


def test_a_tokenizer_that_panics_on_a_token():
    engine = make_engine(tokenizer=Panicking("decode"))
    with running(engine=engine) as server:
        before = probe(server)
        body = {**COMPLETION, "logit_bias": {"77": 100}}
        answer = call(server, COMPLETIONS, body)
        assert answer.status == 500
        assert answer.json["error"]["code"] == "engine_error"
        assert "tokenizer" in answer.json["error"]["message"]
        answer = call(server, COMPLETIONS, {**body, "stream": True})
        assert answer.status == 200
        *_, last = answer.body.decode().strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
        assert b"[DONE]" not in answer.body
        assert server.service.counters.outcomes["error"] == 2
        assert probe(server) == before
        assert server.all_free()


def test_an_engine_that_fails_for_good():
    engine = make_engine()
    with running(engine=engine) as server:
        probe(server)
        step, failing = engine.step, [RuntimeError("device lost")]

        def fails():
            if failing:
                raise failing.pop()
            return step()

        engine.step = fails
        answer = call(server, COMPLETIONS, COMPLETION)
        assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")
        assert probe(server)  # one failure is survived
        failing += [RuntimeError("device lost")] * 3
        assert {call(server, COMPLETIONS, COMPLETION).status for _ in range(4)} == {500}
        health = call(server, "/health")
        assert (health.status, health.json) == (503, {"status": "failed"})
        assert b"mmx_healthy 0" in call(server, "/metrics").body
        assert any("restart the server" in line for line in server.lines)


# ---------------------------------------------------------------- the end


def test_those_who_are_in_are_answered_before_the_end():
    engine = make_engine()
    gate = Gate(engine)
    with concurrent.futures.ThreadPoolExecutor(4) as pool, running(engine=engine) as server:
        gate.shut()
        body = {**LONG, "max_tokens": 40, "return_token_ids": True}
        whole = pool.submit(call, server, COMPLETIONS, body)
        stream = pool.submit(call, server, COMPLETIONS, body | {"stream": True})
        until = time.perf_counter() + 20
        while len(server.service._open) < 2:
            assert time.perf_counter() < until
            time.sleep(0.01)
        server.stop()
        while not server.service.stopping:
            time.sleep(0.01)
        answer = call(server, COMPLETIONS, COMPLETION)
        assert (answer.status, answer.json["error"]["code"]) == (503, "stopping")
        assert answer.headers["retry-after"] == "1"
        assert call(server, "/health").json == {"status": "stopping"}
        gate.open()
        assert len(whole.result(60).json["choices"][0]["token_ids"]) == 40
        assert stream.result(60).body.endswith(b"data: [DONE]\n\n")


def test_those_who_take_longer_than_the_grace_are_told():
    engine = make_engine()
    step = engine.step
    engine.step = lambda: (time.sleep(0.05), step())[1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool, running(engine=engine, grace=0.3) as it:
        whole = pool.submit(call, it, COMPLETIONS, LONG)
        stream = pool.submit(call, it, COMPLETIONS, LONG | {"stream": True})
        until = time.perf_counter() + 20
        while len(it.service._open) < 2:
            assert time.perf_counter() < until
            time.sleep(0.01)
        it.stop()
        assert whole.result(30).status == 503
        *_, last = stream.result(30).body.decode().strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert engine.idle
    engine.snapshots.clear()
    assert engine.pages.free == engine.pages.count


def test_a_second_signal_ends_the_grace(monkeypatch):
    made = []

    class Watched(server_module._Uvicorn):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(server_module, "_Uvicorn", Watched)
    engine = make_engine()
    step = engine.step
    engine.step = lambda: (time.sleep(0.05), step())[1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool, running(engine=engine, grace=100) as it:
        whole = pool.submit(call, it, COMPLETIONS, LONG)
        while not it.service._open:
            time.sleep(0.01)
        made[0].handle_exit(signal.SIGTERM, None)
        while not it.service.stopping:
            time.sleep(0.01)
        assert call(it, COMPLETIONS, COMPLETION).status == 503
        assert not whole.done()
        began = time.perf_counter()
        made[0].handle_exit(signal.SIGTERM, None)
        assert whole.result(30).json["error"]["code"] == "stopping"
        assert time.perf_counter() - began < 5
    assert engine.idle
