"""Requests on their way to the engine: how many there may be, who waits for whom, who has gone."""

import concurrent.futures
import json
import socket
import threading
import time
from collections import Counter

import pytest
from bad_requests import CHAT, COMPLETION, JSON
from serving import QUEUE, ROWS, call, head, quick, running

from mmx.inference import server as server_module
from mmx.inference.chat import ChatTemplate

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


class Slow:
    """Parses conversations once it is let; `begun` counts them."""

    def __init__(self, parse):
        self.begun = 0
        self.let = threading.Event()
        self._parse = parse

    def __call__(self, kind, body, served):
        if kind == "chat":
            self.begun += 1
            assert self.let.wait(60)
        return self._parse(kind, body, served)


@pytest.fixture
def slow(monkeypatch):
    it = Slow(server_module.parse_request)
    monkeypatch.setattr(server_module, "parse_request", it)
    yield it
    it.let.set()


def wait(condition):
    until = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < until
        time.sleep(0.01)


def test_who_is_parsed_is_in_the_queue_and_in_nobodys_way(slow):
    with running() as server, concurrent.futures.ThreadPoolExecutor(64) as pool:
        most = ROWS + QUEUE
        asked = [pool.submit(call, server, CHATS, CHAT) for _ in range(most - 1)]
        wait(lambda: slow.begun == 2)
        time.sleep(0.3)
        assert quick(lambda: call(server, COMPLETIONS, COMPLETION)).status == 200
        assert not any(one.done() for one in asked)
        asked += [pool.submit(call, server, CHATS, CHAT) for _ in range(11)]
        wait(lambda: sum(one.done() for one in asked) == 10)
        for path, body in ((COMPLETIONS, COMPLETION), (CHATS, CHAT)):
            answer = quick(lambda path=path, body=body: call(server, path, body))
            assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
            assert answer.headers["retry-after"] == "1"
        slow.let.set()
        assert Counter(one.result(60).status for one in asked) == {200: most, 429: 10}
        assert server.all_free()
        assert call(server, COMPLETIONS, COMPLETION).status == 200


def test_who_has_gone_is_not_parsed(slow):
    body = json.dumps(CHAT).encode()
    request = head(CHATS, JSON, f"content-length: {len(body)}") + body
    with running() as server:
        for first in range(0, 3 * (ROWS + QUEUE), 8):  # none is told that the queue is full
            wires = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
            for wire in wires:
                wire.sendall(request)
            if not first:
                wait(lambda: slow.begun == 2)
            time.sleep(0.1)
            for wire in wires:
                wire.setblocking(False)
                with pytest.raises(BlockingIOError):
                    wire.recv(1)
                wire.close()
            time.sleep(0.1)
        slow.let.set()
        assert call(server, CHATS, CHAT).status == 200
        assert slow.begun == 3
        assert server.lines == []
        assert server.all_free()


def test_three_hundred_conversations_with_a_template():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with (
        running(template=template) as server,
        concurrent.futures.ThreadPoolExecutor(300) as pool,
    ):
        asked = [pool.submit(call, server, CHATS, CHAT, timeout=60) for _ in range(300)]
        assert call(server, COMPLETIONS, COMPLETION).status in (200, 429)
        seen = Counter(one.result(60).status for one in asked)
        assert seen.keys() <= {200, 429}
        assert seen[200] >= ROWS + QUEUE
        assert server.all_free()
