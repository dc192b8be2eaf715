"""A tiny model with a tokenizer, and a server of it in a thread of the test's own process."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

from random_models import random_params, small_config

from mmx.data.tokenizer import train_tokenizer
from mmx.inference.chat import ChatTemplate
from mmx.inference.engine import Engine
from mmx.inference.http_limits import Limits
from mmx.inference.openai_prompts import Served
from mmx.inference.server import serve
from mmx.inference.service import Service
from mmx.inference.text import longest_token

TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.\n",
    "system ai_setting=assistant user name=user ai name=assistant\n",
    "深度学习模型在长上下文中保持精确。\n",
]
TOKENIZER = train_tokenizer(TEXTS * 3, vocab_size=340)
CONFIG = small_config("ls", vocab_size=TOKENIZER.get_vocab_size(), max_seq_len=256, eos_token_id=0)
PARAMS = random_params(CONFIG, 0)
NAME = "tiny/model"
ROWS = 4
QUEUE = 12


def make_engine(tokenizer=TOKENIZER) -> Engine:
    return Engine(
        CONFIG, PARAMS, rows=ROWS, pages=40, page_size=16, decode_steps=2, tokenizer=tokenizer
    )


def served(engine: Engine, **changes) -> Served:
    longest = longest_token(TOKENIZER)
    assert longest is not None
    it = Served(
        name=NAME,
        config=CONFIG,
        tokenizer=TOKENIZER,
        template=ChatTemplate(),
        max_seq_len=engine.max_seq_len,
        max_answers=ROWS + QUEUE,
        max_characters=longest * engine.max_seq_len,
        created=1_700_000_000,
    )
    return dataclasses.replace(it, **changes)


@dataclasses.dataclass
class Running:
    """A server that answers: where, and what is behind it."""

    port: int
    engine: Engine
    service: Service
    lines: list[str]  # what it has logged
    stop: Callable[[], object]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def all_free(self, seconds: float = 10.0) -> bool:
        """Whether nothing is held any more, within some time."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            gauges = self.service.gauges
            if not (gauges.working or gauges.waiting or self.service._open):
                self.engine.snapshots.clear()
                return self.engine.pages.free == self.engine.pages.count
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(
    *, key=None, limits=None, queue=QUEUE, grace=5.0, engine=None, **changes
) -> Iterator[Running]:
    """A server that drains at the end of the block; changes are of what is `served`."""
    engine = engine or make_engine()
    engine.generate([[5, 6]], max_new_tokens=3)  # compiling is not what is timed
    engine.snapshots.clear()
    listener = socket.create_server(("127.0.0.1", 0))
    found: list = []
    up = threading.Event()
    lines: list[str] = []

    async def main() -> None:
        stop = asyncio.Event()

        def ready(service: Service) -> None:
            found.extend([service, asyncio.get_running_loop(), stop])
            up.set()

        assert await serve(
            engine, served(engine, **changes), listener, queue=queue, key=key,
            limits=limits or Limits(), grace=grace, ready=ready, log=lines.append, stop=stop,
        )  # fmt: skip

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert up.wait(20)
    service, loop, stop = found
    try:
        port = listener.getsockname()[1]
        yield Running(port, engine, service, lines, lambda: loop.call_soon_threadsafe(stop.set))
    finally:
        with contextlib.suppress(RuntimeError):  # it may have been stopped in the block
            loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()


class Gate:
    """Holds an engine between two steps while it is shut."""

    def __init__(self, engine: Engine):
        self._open = threading.Event()
        self._open.set()
        step = engine.step
        engine.step = lambda: (self._open.wait(60), step())[1]

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@dataclasses.dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


def call(server: Running, path: str, body=None, *, method=None, headers=(), timeout=30) -> Answered:
    """One request on a connection of its own; a body that is no bytes is sent as JSON."""
    wire = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        sent = {} if body is None else {"content-type": "application/json"}
        sent.update(headers)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        wire.request(method or ("GET" if body is None else "POST"), path, body, sent)
        response = wire.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answered(response.status, found, response.read())
    finally:
        wire.close()


def raw(
    server: Running, *pieces: bytes, pause=0.0, timeout=30, half_close=False
) -> Answered | None:
    """Bytes as they are; what comes back until the server closes or has answered once."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as wire:
        try:
            for piece in pieces:
                wire.sendall(piece)
                time.sleep(pause)
            if half_close:
                wire.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused in the middle: the answer may be there all the same
        return read_answer(wire)


def read_answer(wire: socket.socket) -> Answered | None:
    """The next answer on a connection; None where it ends without one."""
    response = http.client.HTTPResponse(wire)
    try:
        response.begin()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answered(response.status, found, response.read())
    except (ConnectionError, http.client.HTTPException):
        return None
    finally:
        response.close()


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    """The head of a request, as it is said."""
    all_lines = [f"{method} {path} HTTP/1.1", "host: x", *lines, "", ""]
    return "\r\n".join(all_lines).encode("latin-1")


def probe(server):
    """What an answer is made of, but its time and number."""
    body = {
        "model": NAME,
        "prompt": "The quick",
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 3,
        "return_token_ids": True,
    }
    answer = call(server, "/v1/completions", body)
    assert answer.status == 200, answer.body
    return answer.json["choices"], answer.json["usage"]


def quick(ask):
    """The answer to a request that must have one within a second."""
    for _ in range(3):
        began = time.perf_counter()
        answer = ask()
        if time.perf_counter() - began < 1:
            return answer
    raise AssertionError("an answer took more than a second, three times")
