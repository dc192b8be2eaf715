"""The server among strangers: what they send, how slowly, and how much."""

import concurrent.futures
import contextlib
import json
import re
import socket
import time
from collections import Counter

import bad_requests
import pytest
from bad_requests import COMPLETION, JSON
from serving import NAME, call, head, probe, quick, raw, read_answer, running

from mmx.inference.http_limits import Limits

COMPLETIONS = "/v1/completions"
LONG = {"model": NAME, "prompt": [5, 6], "max_tokens": 240, "ignore_eos": True}
# Clocks short enough to be waited for, and long enough for a busy machine.
LIMITS = Limits(
    body=64 << 10, bodies=256 << 10, head=16 << 10, head_seconds=1.5, body_seconds=1.5,
    idle_seconds=1.0, unread_seconds=0.5, linger_seconds=0.5, connections=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with running() as it:
        yield it


@pytest.fixture(scope="module")
def strict():
    """A server with small limits."""
    with running(limits=LIMITS) as it:
        yield it


# ---------------------------------------------------------------- malformed requests


def test_malformed_requests_are_refused_and_change_nothing(server):
    bodies, wires = bad_requests.bodies(), bad_requests.heads()
    assert len(bodies) + len(wires) >= 500
    before = probe(server)
    seen = Counter()
    for bad in bodies:
        answer = quick(lambda bad=bad: call(server, bad.path, bad.body))
        said = answer.body.decode()
        assert answer.status in bad.statuses, (bad.path, bad.body[:200], said)
        error = json.loads(said)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].isprintable()
        assert len(error["message"]) < 700
        assert error["param"] == bad.param, (bad.body[:200], said)
        seen[answer.status] += 1
    for wire in wires:
        answer = quick(lambda wire=wire: raw(server, wire))
        assert answer is not None, wire[:200]
        assert 400 <= answer.status < 500, (wire[:200], answer)
        if not wire.startswith(b"HEAD"):
            assert json.loads(answer.body)["error"]["message"].isprintable()
        seen[answer.status] += 1
    assert {400, 404, 405, 413, 415, 431} <= set(seen)
    assert probe(server) == before
    assert server.service.counters.outcomes["error"] == 0
    assert server.lines == []
    assert server.all_free()


# ---------------------------------------------------------------- limits


def test_a_body_has_a_largest_size(strict):
    before = probe(strict)
    most = LIMITS.body
    fits = json.dumps({**COMPLETION, "user": ""}).encode()
    fits = fits.replace(b'"user": ""', b'"user": "' + b"x" * (most - len(fits)) + b'"')
    assert len(fits) == most
    assert call(strict, COMPLETIONS, fits).status == 200
    for body in (fits + b" ", fits * 20):
        answer = quick(lambda body=body: call(strict, COMPLETIONS, body))
        assert (answer.status, answer.json["error"]["code"]) == (413, "body_too_large")
        # Without a length, as it comes.
        chunk = b"%x\r\n%b\r\n" % (len(body), body)
        answer = raw(strict, head(COMPLETIONS, JSON, "transfer-encoding: chunked"), chunk)
        assert answer.status == 413
    assert probe(strict) == before


def test_bodies_together_have_a_largest_size(strict):
    """Held by many who send all but the last byte."""
    size = 60_000
    begun = head(COMPLETIONS, JSON, f"content-length: {size}")
    with contextlib.ExitStack() as stack:
        wires = []
        for _ in range(8):
            wire = socket.create_connection(("127.0.0.1", strict.port), timeout=20)
            stack.enter_context(wire)
            wire.sendall(begun + b"x" * (size - 1))
            wires.append(wire)
        seen = Counter(read_answer(wire).status for wire in wires)
    # 4 x 60,000 are less than 256 KiB, five are more; those who wait are told that they are late.
    assert seen == {408: 4, 503: 4}
    assert probe(strict)


def test_a_head_has_a_largest_size_however_it_comes(strict):
    start = head("/health", method="GET")
    most = head("/health", "x: " + "y" * (LIMITS.head - len(start) - 5), method="GET")
    assert len(most) == LIMITS.head
    assert raw(strict, most).status == 200
    far = [head("/health", "x: " + "y" * size, method="GET") for size in (LIMITS.head, 40_000)]
    far.append(head("/health", *["x: y"] * 4000, method="GET"))
    for wire in far:
        answer = quick(lambda wire=wire: raw(strict, wire))
        assert answer.status == 431
        assert "its head has more than 16,384 bytes" in answer.json["error"]["message"]
        with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as both:
            both.sendall(start + wire + start)  # in one piece with requests around it
            came = b"".join(iter(lambda both=both: both.recv(1 << 16), b""))
        assert re.findall(rb"HTTP/1.1 (\d+)", came) == [b"200", b"431"]
    assert strict.lines == []


def test_late_heads_and_bodies_are_told_so(strict):
    begun = [
        b"",
        b"POST /v1/comp",
        head(COMPLETIONS, JSON)[:-4],
        head(COMPLETIONS, JSON, "content-length: 50") + b'{"model"',
        head(COMPLETIONS, JSON, "transfer-encoding: chunked") + b"ff\r\nx",
    ]
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(begun)) as pool:
        for answer in pool.map(lambda some: raw(strict, some), begun):
            assert answer.status == 408
            assert 1.4 < time.perf_counter() - began < 10
            assert "in time" in answer.json["error"]["message"]
    # A byte now and then is no progress.
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as wire:
        began = time.perf_counter()
        with contextlib.suppress(OSError):
            for byte in head(COMPLETIONS, JSON, "x: " + "y" * 500):
                wire.sendall(bytes([byte]))
                time.sleep(0.05)
                if time.perf_counter() - began > 3:
                    break
        assert read_answer(wire).status == 408


def test_connections_end_when_nothing_comes(strict):
    """After an answer, also where the rest of a refused body came after it."""
    good = json.dumps(COMPLETION).encode()
    whole = head(COMPLETIONS, JSON, f"content-length: {len(good)}") + good
    refused = head(COMPLETIONS, "content-type: text/plain", "content-length: 6")
    for first, rest, status in [(whole, b"", 200), (refused, b"123456", 415)]:
        with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as wire:
            wire.sendall(first)
            assert read_answer(wire).status == status
            wire.sendall(rest)
            if not rest:  # the connection serves again
                wire.sendall(whole)
                assert read_answer(wire).status == 200
            began = time.perf_counter()
            assert wire.recv(1) == b""
            assert time.perf_counter() - began < 8


def test_too_many_connections_are_told_so(strict):
    with contextlib.ExitStack() as stack:
        wires = []
        for _ in range(LIMITS.connections + 5):
            wire = socket.create_connection(("127.0.0.1", strict.port), timeout=20)
            stack.enter_context(wire)
            wires.append(wire)
            if len(wires) <= LIMITS.connections:
                wire.sendall(b"G")  # holds its place for as long as a head may take
        answers = []
        for wire in wires[LIMITS.connections :]:
            wire.sendall(head("/health", method="GET"))
            answers.append(read_answer(wire))
    assert [a.status for a in answers] == [503] * 5
    assert all(a.headers["retry-after"] == "1" for a in answers)
    assert all(a.headers["connection"] == "close" for a in answers)
    until = time.perf_counter() + 10
    while call(strict, "/health").status != 200:
        assert time.perf_counter() < until
        time.sleep(0.05)


def test_a_reader_that_does_not_read_is_let_go(strict):
    """Its row is free as soon as its tokens are there; its connection after some time."""
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(20)
        wire.connect(("127.0.0.1", strict.port))
        for _ in range(3):  # more than the buffers between us hold
            body = json.dumps(
                {**LONG, "n": 4, "stream": True, "logprobs": 20, "return_token_ids": True}
            ).encode()
            wire.sendall(head(COMPLETIONS, JSON, f"content-length: {len(body)}") + body)
        assert strict.all_free(60)
        time.sleep(1)
        wire.settimeout(5)
        seen = 0
        with contextlib.suppress(ConnectionError):
            while piece := wire.recv(1 << 16):
                seen += len(piece)
        assert 0 < seen < 4_000_000
    assert probe(strict)
