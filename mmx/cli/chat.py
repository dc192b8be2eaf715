"""`mmx chat`: talk with a checkpoint in a terminal, or line by line through a pipe."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mmx.cli.models import (
    PAGE,
    Choices,
    Loading,
    Room,
    check_memory,
    kv_dtype_of,
    load_model,
    memory_explained,
    note,
    partition_of,
    sampling_of,
    show,
)

if TYPE_CHECKING:
    from mmx.inference.conversation import Conversation

_HELP = "/reset begins anew, /exit or Ctrl-D ends; Ctrl-C ends an answer"
_SNAPSHOTS = 4  # prefixes of the conversation


@dataclass(frozen=True, kw_only=True)
class Chat(Loading, Choices):
    """Talk with a checkpoint: a message a line, the answer as it comes. /help names commands."""

    path: tyro.conf.Positional[Path]
    """The checkpoint folder, with its tokenizer.json and chat template."""
    system: str | None = None
    """The first message: who the model is to be."""
    max_new_tokens: int = 1024
    """Tokens of an answer at most."""
    max_seq_len: int = 32_768
    """Tokens of the conversation at most."""


def main(arguments: Sequence[str]) -> int:
    """Answer lines until there are no more."""
    options = tyro.cli(Chat, prog="mmx chat", args=arguments)
    if options.max_seq_len < 1:
        raise ValueError(f"--max-seq-len is {options.max_seq_len}; it must be 1 or more")
    conversation = _open(options)
    watched = sys.stdin.isatty() and sys.stdout.isatty()
    if watched:
        with suppress(ImportError):
            import readline  # noqa: F401 - keys of a line that is being typed
        note(_HELP)
    while (line := _next_line(watched)) is not None:
        message = line.strip()
        if message in ("/exit", "/quit"):
            break
        if message == "/reset":
            conversation.reset()
        elif message == "/help":
            note(_HELP)
        elif message.startswith("/"):
            note(f"{message.split()[0]} is no command; {_HELP}")
        elif message:
            _answer(conversation, message)
    return 0


def _open(options: Chat) -> "Conversation":
    from mmx.convert.load import load_config
    from mmx.inference.chat import check_template, load_chat_template
    from mmx.inference.conversation import Conversation
    from mmx.inference.text import load_tokenizer

    config = load_config(options.path)
    tokenizer = load_tokenizer(options.path)
    template = load_chat_template(options.path)
    check_template(template)
    most = min(options.max_new_tokens, config.max_seq_len)  # the default, too, where it is more
    sampling = replace(sampling_of(options), max_new_tokens=most)
    sampling.check(config)
    longest = min(options.max_seq_len, config.max_seq_len)
    chunk = 256 if longest <= 1024 else 2048
    room = Room(
        1, -(-longest // PAGE), PAGE, longest, chunk, decode_steps=4, snapshots=_SNAPSHOTS,
        kv_dtype=kv_dtype_of(options),
    )  # fmt: skip
    partition = partition_of(options, config)
    with memory_explained(options.path, config, options, room, partition):
        config, params = load_model(options.path, options, partition)
        check_memory(config, params, room, partition)
        engine = room.engine(config, params, tokenizer=tokenizer, partition=partition)
    return Conversation(engine, template, sampling, options.system)


def _next_line(watched: bool) -> str | None:
    """The next message; None at the end. Ctrl-C gives up a line that is being typed."""
    while True:
        try:
            if watched:
                return input("> ")
            return sys.stdin.readline() or None
        except EOFError:
            show("\n")
            return None
        except KeyboardInterrupt:
            if not watched:
                raise
            show("\n")


def _answer(conversation: "Conversation", message: str) -> None:
    """Write the answer to a message; what cannot be answered is said, and the talk goes on."""
    from mmx.planning.exhausted import MemoryExhausted, explained, of_engine

    def running():
        engine = conversation.engine
        return of_engine(
            engine.config, engine.params, rows=1, tokens=engine.max_seq_len,
            partition=engine.partition,
        )  # fmt: skip

    with _interrupts() as seen:
        try:
            with explained(running):
                for piece in conversation.ask(message, ended=lambda: bool(seen)):
                    show(piece)
        except MemoryExhausted:
            raise
        except ValueError as error:
            note(str(error))
            return
        show("\n")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted: no step of the engine is left in the middle. A second one ends it all."""
    seen: list[int] = []

    def noted(number: int, frame: object) -> None:
        if seen:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        seen.append(number)

    before = signal.signal(signal.SIGINT, noted)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
