"""`mmx serve`: answer requests over HTTP, as OpenAI's clients send them."""

import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mmx.cli.models import (
    Loading,
    Room,
    check_memory,
    kv_dtype_of,
    load_model,
    memory_explained,
    note,
    partition_of,
)

if TYPE_CHECKING:
    from mmx.config import ModelConfig
    from mmx.inference.engine import Engine

_LOCAL = ("127.0.0.1", "::1", "localhost")
_KEY = 4096  # characters of an API key
_LEAST = dict(rows=1, queue=0, max_seq_len=1, pages=1, page_size=1, decode_steps=1, snapshots=0,
              max_body=1, connections=1, grace=0)  # fmt: skip
_MOST = dict(rows=4096, pages=2**31 - 1, page_size=1 << 20)  # pages have 32-bit numbers


@dataclass(frozen=True, kw_only=True)
class Serve(Loading):
    """Answer requests over HTTP, as OpenAI's clients send them, until SIGTERM or Ctrl-C."""

    path: tyro.conf.Positional[Path]
    """The checkpoint folder, with its tokenizer.json."""
    host: str = "127.0.0.1"
    """Address to listen on; this machine alone can reach the default."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """File with the key that every route but /health asks for; none without."""
    model_name: str | None = None
    """Name that requests give as `model`; the folder's name by default."""
    rows: int = 8
    """Sequences that decode together; at most 4096."""
    queue: int = 64
    """Requests that may wait beyond these; more are told 429."""
    max_seq_len: int | None = None
    """Longest prompt and answer together; the checkpoint's by default."""
    pages: int | None = None
    """Pages of keys and values for all sequences; room for the longest one by default."""
    page_size: int = 256
    """Tokens a page."""
    chunk: int = 2048
    """Tokens of a prompt that are read at once."""
    decode_steps: int = 4
    """Tokens a sequence gets between two looks at what else there is to do."""
    snapshots: int = 8
    """Prefixes of prompts that are kept for later ones."""
    warm_up: bool = True
    """Compile all programs before the first request."""
    max_body: int = 16 << 20
    """Bytes of a request at most."""
    connections: int = 512
    """Connections at once; more are told 503."""
    grace: float = 30.0
    """Seconds that requests have to end when the server is stopped."""


def main(arguments: Sequence[str]) -> int:
    """Serve until told to stop."""
    options = tyro.cli(Serve, prog="mmx serve", args=arguments)
    try:
        import h11  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ValueError("serving needs more packages; pip install 'mmx[serve]'") from None
    _check(options)
    key = None if options.api_key_file is None else _read_key(options.api_key_file)
    listener = _listen(options.host, options.port)
    try:
        return _serve(options, key, listener)
    finally:
        listener.close()


def _check(options: Serve) -> None:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    for name, most in _MOST.items():
        value = getattr(options, name)
        if value is not None and value > most:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}; it must be at most {most}")
    if options.chunk < 256 or options.chunk & (options.chunk - 1):
        raise ValueError(f"--chunk is {options.chunk}; it must be a power of two of at least 256")


def _serve(options: Serve, key: str | None, listener: socket.socket) -> int:
    from mmx.convert.load import load_config
    from mmx.inference.text import load_tokenizer

    config = load_config(options.path)  # a folder that is none is named as that
    tokenizer = load_tokenizer(options.path)

    import asyncio
    import dataclasses

    from mmx.inference.chat import check_template, load_chat_template
    from mmx.inference.http_limits import Limits
    from mmx.inference.openai_prompts import Served
    from mmx.inference.server import serve
    from mmx.inference.text import longest_token

    template = load_chat_template(options.path)
    check_template(template)
    # Where it lies is nobody's business out there.
    template = dataclasses.replace(template, file="the model")
    room = _room(options, config)
    partition = partition_of(options, config)
    with memory_explained(options.path, config, options, room, partition):
        config, params = load_model(options.path, options, partition)
        check_memory(config, params, room, partition, show=True)
        engine = room.engine(config, params, tokenizer=tokenizer, partition=partition)
        if options.warm_up:
            _warm_up(engine)
    longest = longest_token(tokenizer)
    served = Served(
        name=options.model_name or options.path.resolve().name,
        config=config,
        tokenizer=tokenizer,
        template=template,
        max_seq_len=engine.max_seq_len,
        max_answers=options.rows + options.queue,
        max_characters=None if longest is None else longest * engine.max_seq_len,
        created=int(time.time()),
    )
    if key is None and options.host not in _LOCAL:
        note(f"whoever can reach {options.host} can use this server; give --api-key-file")
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listener.getsockname()[1]}"

    def ready(_: object) -> None:
        print(f"mmx: serving {served.name} at {address}/v1", flush=True)

    most = options.max_body
    limits = Limits(body=most, bodies=8 * most, connections=options.connections)
    ended = asyncio.run(
        serve(
            engine,
            served,
            listener,
            queue=options.queue,
            key=key,
            limits=limits,
            grace=options.grace,
            ready=ready,
            log=note,
        )
    )
    if not ended:
        # A step still runs, compiling perhaps: Python cannot end with a thread in there.
        sys.stdout.flush()
        os._exit(0)
    return 0


def _room(options: Serve, config: "ModelConfig") -> Room:
    """Pages for one sequence of the longest kind, or for all rows with 4096 tokens each."""
    longest = min(options.max_seq_len or config.max_seq_len, config.max_seq_len)
    pages = options.pages or -(-max(longest, options.rows * 4096) // options.page_size)
    return Room(
        options.rows, pages, options.page_size, longest, options.chunk, options.decode_steps,
        options.snapshots, kv_dtype_of(options),
    )  # fmt: skip


def _warm_up(engine: "Engine") -> None:
    """Every program once: a prompt of each length that is read at once, and some decoding."""
    from mmx.inference.decoding import PADDED
    from mmx.inference.pool import put_back, take_out
    from mmx.inference.requests import Sampling
    from mmx.inference.rows import warm_up

    sizes: list[int] = list(PADDED)
    while sizes[-1] < engine.sizes.chunk:
        sizes.append(2 * sizes[-1])
    room = engine.max_seq_len - engine.decode_steps - 1
    sampling = Sampling(max_new_tokens=engine.decode_steps + 1, ignore_eos=True)
    for size, smaller in zip(sizes, [0, *sizes[:-1]], strict=True):
        # Short prompts are padded to a size, long ones are read in chunks of just that.
        length = min(size, room) if size in PADDED else size
        if not smaller < length <= room:
            break
        engine.snapshots.clear()  # or most of the prompt would not be read again
        engine.generate([[0] * length], sampling)
        if engine.snapshots.step <= length < room:
            engine.generate([[0] * (length + 1)], sampling)  # a prefix is found
    engine.rows = warm_up(engine.rows)
    engine.pool = put_back(engine.pool, take_out(engine.pool, 0, [0]), 0, [0])  # of a row sent away
    engine.snapshots.clear()
    engine.snapshots.hits = engine.snapshots.saved_tokens = 0


def _read_key(file: Path) -> str:
    from mmx.convert.bounded import read_text

    key = read_text(file, most=_KEY).strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{file}: an API key is a line of printable ASCII without spaces")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Take the address now: loading a model in vain would take long. Connections wait for nobody:
    they are refused until the server is ready.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"--port is {port}; it must be 0 to 65535")
    listener = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"cannot listen on {host}:{port} ({reason}); choose another --host or --port"
        ) from None
