"""A tiny model with a tokenizer, and a server of it in a thread of the test's own process."""

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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


def make_engine() -> Engine:
    return Engine(
        CONFIG, PARAMS, rows=ROWS, pages=40, page_size=16, decode_steps=2, tokenizer=TOKENIZER
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


@contextmanager
def running(*, key=None, limits=None, queue=QUEUE, grace=5.0, engine=None) -> Iterator[Running]:
    """A server that drains at the end of the block."""
    engine = engine or make_engine()
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
            engine, served(engine), listener, queue=queue, key=key, limits=limits or Limits(),
            grace=grace, ready=ready, log=lines.append, stop=stop,
        )  # fmt: skip

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert up.wait(20)
    service, loop, stop = found
    try:
        yield Running(listener.getsockname()[1], engine, service, lines)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
