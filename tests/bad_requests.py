"""Requests without an answer: bodies, each with the field at fault, and bytes that are no HTTP."""

import json
import random
from typing import NamedTuple

from serving import CONFIG, NAME

COMPLETION = {"model": NAME, "prompt": "The quick", "max_tokens": 3, "temperature": 0}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
HUGE = 10**4000
DEEP = "[" * 5000
FAR = [1e999, -1e999, HUGE, -HUGE]
TYPES = ["x", [], {}, [1], True]


class Bad(NamedTuple):
    """A body, where it goes, and the field of the error; None where no field is at fault."""

    path: str
    body: bytes
    param: str | None = None
    statuses: tuple[int, ...] = (400,)


# Values of fields that both kinds of request have.
VALUES: dict[str, list] = {
    "n": [0, -1, 17, 1.5, "2", [], True, HUGE, -HUGE],
    "max_tokens": [0, -1, 1e3, "9", 2**31, HUGE, [], {}, True],
    "temperature": [-1, 101, "hot", [], True, *FAR],
    "top_p": [0, -0.1, 1.1, "x", False, *FAR],
    "top_k": [-1, 1.0, "3", True],
    "min_p": [-0.1, 1.1, "x", *FAR],
    "repetition_penalty": [0, -1, 1e6, "x", *FAR],
    "seed": [2**63, -(2**63) - 1, 1.0, "1", True, HUGE],
    "stop": [[""], "", "x" * 257, ["x"] * 17, [1], 3, {}, [None], [["x"]]],
    "stop_token_ids": [[-1], [CONFIG.vocab_size], [1.0], ["1"], 3, "1", [1] * 17, [True], {}],
    "logit_bias": [
        {"x": 1}, {"-1": 1}, {"1.0": 1}, {str(CONFIG.vocab_size): 1}, {"1": "2"}, {"1": 101},
        {"1": -101}, {"1": None}, {"1": True}, {"9" * 400: 1}, [1], "x", 3, {"": 0}, {"\u0661": 1},
        {str(i): 0 for i in range(301)}, {"1": 1e999},
    ],
    "stream": ["yes", 1, 0, [], {}],
    "stream_options": [{}, "x", [], {"include_usage": "yes"}, {"other": True}, 1][1:],
    "ignore_eos": ["x", 1, []],
    "return_token_ids": ["x", 1],
    "frequency_penalty": [0.1, 2, -1, False, "0"],
    "presence_penalty": [0.1, "x", True],
    "nonsense": [1, [], {}],
    "Prompt": ["x"],
    "model ": [NAME],
    "": [1],
    "response_format": [{"type": "json_object"}, {}, "text"],
    "tools": [[{"type": "function"}], {}, "x", 0],
    "tool_choice": ["required", {"type": "function"}, 1],
    "functions": [[{"name": "f"}]],
    "store": [True, 0],
    "modalities": [["audio"], []],
    "audio": [{}],
    "prediction": [{}],
}  # fmt: skip
OF_COMPLETION: dict[str, list] = {
    "prompt": [
        "", [], [[]], [""], {}, 3, True, [1.0], [None], ["x", 1], [1, "x"], [[1], "x", 2],
        [[1, [2]]], [True], [-1], [CONFIG.vocab_size], [2**31], [2**63], [2**64], [HUGE], [[-1]],
        [1] * 256, "x" * 100_000, ["a"] * 17, [[1]] * 17, "\ud800", ["ok", "\udfff"], [["x"]],
    ],
    "logprobs": [-1, 21, True, False, "1", 1.5, [], HUGE],
    "best_of": [2, 0, "1", True],
    "echo": [True, 0, "x"],
    "suffix": ["x", 1],
    "messages": [[{"role": "user", "content": "hi"}]],
    "top_logprobs": [1],
    "max_completion_tokens": [3],
}  # fmt: skip
OF_CHAT: dict[str, list] = {
    "messages": [[], {}, "hi", 3, [{"role": "user", "content": "x" * 100_000}],
                 [{"role": "user", "content": "\ud800"}]],
    "top_logprobs": [1, 21, -1],
    "logprobs": [1, "x", 0],
    "max_completion_tokens": [0, "x", HUGE],
    "prompt": ["x"],
    "echo": [True],
}  # fmt: skip
MESSAGES: list[tuple[object, str]] = [
    (3, ""), ("hi", ""), (None, ""), ([], ""), ({}, ".role"),
    ({"role": "user"}, ".content"), ({"content": "x"}, ".role"),
    ({"role": "root", "content": "x"}, ".role"), ({"role": 1, "content": "x"}, ".role"),
    ({"role": [], "content": "x"}, ".role"), ({"role": {}, "content": "x"}, ".role"),
    ({"role": "tool", "content": "x"}, ".role"), ({"role": "user", "content": 3}, ".content"),
    ({"role": "user", "content": []}, ".content"), ({"role": "user", "content": {}}, ".content"),
    ({"role": "user", "content": ["x"]}, ".content"),
    ({"role": "user", "content": [{"type": "text"}]}, ".content"),
    ({"role": "user", "content": [{"type": "text", "text": 1}]}, ".content"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ".content"),
    ({"role": "user", "content": "x", "extra": 1}, ".extra"),
    ({"role": "assistant", "content": "x", "tool_calls": [{}]}, ".tool_calls"),
]  # fmt: skip


def _dumped(body: dict) -> bytes:
    return json.dumps(body).replace("Infinity", "1e999").encode()


def bodies() -> list[Bad]:
    """All of a fixed list, and bytes of good bodies that were cut, flipped or doubled."""
    found: list[Bad] = []
    for path, base, own in (
        ("/v1/completions", COMPLETION, OF_COMPLETION),
        ("/v1/chat/completions", CHAT, OF_CHAT),
    ):
        for name, values in (VALUES | own).items():
            found += [Bad(path, _dumped({**base, name: value}), name) for value in values]
        for model, status in ((None, 400), (3, 400), ([], 400), ("other", 404), ("", 404)):
            found.append(Bad(path, _dumped({**base, "model": model}), "model", (status,)))
        found.append(Bad(path, _dumped({**base, "n": 16, "stop": ["x"] * 99}), "stop"))
        found += [Bad(path, body) for body in _broken(_dumped(base))]
    for message, where in MESSAGES:
        body = {**CHAT, "messages": [CHAT["messages"][0], message]}
        found.append(Bad("/v1/chat/completions", _dumped(body), f"messages[1]{where}"))
    return found


def _broken(good: bytes) -> list[bytes]:
    """What is no JSON object: made by hand, and by chance."""
    by_hand = [
        b"", b" ", b"null", b"[]", b"3", b'"x"', b"true", b"{", b"}", b"{}}", good + b"x",
        b"\xef\xbb\xbf" + good, b"\xff\xfe" + good.decode().encode("utf-16-le"), b"\x00" * 64,
        good.replace(b'"', b"'"), good.replace(b"}", b',}'), DEEP.encode(), b'{"a":' * 3000,
        b'{"model": NaN}', b'{"model": Infinity}', b'{"prompt": "\xc3\x28"}', b'{"a": "\n"}',
        b'{"n": ' + b"9" * 5000 + b"}", b'{"n": 01}', b'{"n": +1}', b'{"n": 1e}', b"[{}" * 50_001,
        b'{"a": [' + b"{}," * 100_001 + b"1]}", b"\x1f\x8b\x08\x00", b"--x\r\n\r\n--x--",
        b"model=a&prompt=b", b'{"a": "\\ud8"}', b'{"a": "\\x41"}', b'{"a" 1}', b"{1: 2}",
    ]  # fmt: skip
    chance = random.Random(len(good))
    by_chance: list[bytes] = []
    while len(by_chance) < 40:
        body = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(body))
            kind = chance.randrange(3)
            if kind == 0:
                body[at] = chance.randrange(256)
            elif kind == 1:
                del body[at : at + chance.randint(1, 9)]
            else:
                body[at:at] = body[: chance.randint(1, 9)]
            body = body or bytearray(b"-")
        try:
            if isinstance(json.loads(bytes(body)), dict):
                continue  # perhaps a good request after all
        except (ValueError, RecursionError):
            pass
        by_chance.append(bytes(body))
    return by_hand + by_chance


JSON = "content-type: application/json"
_BODY = _dumped(COMPLETION)
_LENGTH = f"content-length: {len(_BODY)}"


def _post(*lines: str, body: bytes = b"", path="/v1/completions", start="POST {} HTTP/1.1"):
    return "\r\n".join([start.format(path), "host: x", *lines, "", ""]).encode("latin-1") + body


def heads() -> list[bytes]:
    """Bytes on the wire that a server must refuse by itself: heads and bodies that lie."""
    chunked = "transfer-encoding: chunked"
    return [
        b"\r\n\r\n\r\nx\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nhost x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", b"G\0T / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na: \0\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        _post("x: " + "y" * 20_000), _post(*[f"x{i}: y" for i in range(2000)]),
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"A" * 20_000,
        _post(JSON, "content-length: -5"), _post(JSON, "content-length: x"),
        _post(JSON, "content-length: 5", "content-length: 6", body=b"123456"),
        _post(JSON, "content-length: 5, 6", body=b"123456"),
        _post(JSON, "content-length: " + "9" * 30), _post(JSON, "content-length: 99999999999"),
        _post(JSON, chunked, body=b"zz\r\n\r\n"), _post(JSON, chunked, body=b"-1\r\nx\r\n"),
        _post(JSON, chunked, body=b"5\r\n{\"a\":1}\r\n0\r\n\r\n"),
        _post(JSON, chunked, body=b"f" * 40 + b"\r\n"), _post(JSON, chunked, body=b"\r\n\r\n"),
        _post(JSON, "transfer-encoding: gzip, chunked", body=b"0\r\n\r\n"),
        _post(JSON, "transfer-encoding: gzip", body=b"0\r\n\r\n"),
        _post(JSON, chunked, body=b"0\r\n\r\n"), _post(JSON, "content-length: 0"), _post(JSON),
        _post("content-type: text/plain", _LENGTH, body=_BODY),
        _post(_LENGTH, body=_BODY),
        _post("content-type: application/json-seq", _LENGTH, body=_BODY),
        _post("content-type: multipart/form-data; boundary=x", "content-length: 2", body=b"{}"),
        *[
            _post(JSON, _LENGTH, body=_BODY, start=f"{method} {{}} HTTP/1.1")
            for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW")
        ],
        *[
            _post(JSON, "content-length: 2", body=b"{}", path=path)
            for path in ("/", "*", "//", "/v1", "/v1/completions/", "/../etc/passwd", "/%00",
                         "/v1/%63ompletions/x", "/V1/completions", "http://y/v1/x", "/health",
                         "/metrics", "/v1/models", "/%ff%fe", "/v1/models/%0d%0aset-cookie:x")
        ],
        _post("upgrade: websocket", "connection: upgrade", "sec-websocket-version: 13",
              "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="),
        _post(JSON, "expect: 100-continue", "content-length: 99999999999"),
    ]  # fmt: skip
