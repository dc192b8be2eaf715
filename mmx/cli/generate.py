"""`mmx generate`: continue a prompt with a checkpoint."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    partition_of,
    sampling_of,
    show,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mmx.config import ModelConfig
    from mmx.inference.engine import Engine
    from mmx.inference.requests import Event, Sampling

_STDIN = Path("-")
_TOKEN = 64  # bytes of text a token stands for at most, where the tokenizer sets no bound
_SHORT = 1024  # up to here chunks of 256 cost little, and need the fewest programs


@dataclass(frozen=True, kw_only=True)
class Generate(Loading, Choices):
    """Continue a prompt with a checkpoint: text to stdout as it comes, all else to stderr."""

    path: tyro.conf.Positional[Path]
    """The checkpoint folder."""
    prompt: str | None = None
    """Text to continue; needs a tokenizer.json in the folder. Without a prompt stdin is read."""
    prompt_file: Path | None = None
    """File with the text to continue, as it is; - is stdin."""
    context_file: Path | None = None
    """File with text that comes before the prompt, of any length the model and memory allow."""
    tokens: str | None = None
    """Token ids to continue, as 1,2,3; prints ids."""


def main(arguments: Sequence[str]) -> int:
    """Print the continuation."""
    options = tyro.cli(Generate, prog="mmx generate", args=arguments)
    _check(options)
    from mmx.convert.load import load_config
    from mmx.inference import text
    from mmx.inference.requests import check_prompt

    tokenizer = None
    config = load_config(options.path)
    if options.tokens is not None:
        ids = _parse_ids(options.tokens)
    else:
        wanted = "no such file; give --tokens 1,2,3 instead of --prompt"
        tokenizer = text.load_tokenizer(options.path, missing=wanted)
        ids = _encode(options, tokenizer, config)
    prompt = check_prompt(ids, config)
    sampling = sampling_of(options)
    sampling.check(config)
    total = prompt.size + options.max_new_tokens
    if total > config.max_seq_len:
        raise ValueError(
            f"a prompt of {prompt.size} tokens and --max-new-tokens {options.max_new_tokens} are "
            f"{total} tokens; the model has room for {config.max_seq_len} together, so for a "
            f"prompt of {max(config.max_seq_len - options.max_new_tokens, 0)}"
        )

    pages = -(-total // PAGE)
    chunk = 256 if prompt.size <= _SHORT else 2048
    room = Room(
        1, pages, PAGE, pages * PAGE, chunk, decode_steps=4, snapshots=0,
        kv_dtype=kv_dtype_of(options),
    )  # fmt: skip
    partition = partition_of(options, config)
    with memory_explained(options.path, config, options, room, partition):
        config, params = load_model(options.path, options, partition)
        check_memory(config, params, room, partition, show=options.context_file is not None)
        engine = room.engine(config, params, tokenizer=tokenizer, partition=partition)
        return _print(_stream(engine, prompt.tolist(), sampling), as_ids=tokenizer is None)


def _check(options: Generate) -> None:
    """Where the prompt is from: one place, and text alone has a context and stop strings."""
    given = [options.prompt, options.prompt_file, options.tokens]
    count = sum(one is not None for one in given)
    if count > 1 or (count == 0 and (sys.stdin is None or sys.stdin.isatty())):
        raise ValueError(
            "give one of --prompt TEXT, --prompt-file FILE and --tokens 1,2,3, or text on stdin"
        )
    if options.tokens is not None and (options.context_file is not None or options.stop):
        raise ValueError("--context-file and --stop are text; give --prompt instead of --tokens")


def _encode(options: Generate, tokenizer: "Tokenizer", config: "ModelConfig") -> list[int]:
    """Ids of context and prompt, which are one text.

    Raises:
      ValueError: more bytes than so many tokens can stand for, not UTF-8, or as `encode`.
    """
    from mmx.inference.text import encode, longest_token

    most = (longest_token(tokenizer) or _TOKEN) * config.max_seq_len
    context = "" if options.context_file is None else _read(options.context_file, most)
    prompt = options.prompt
    if prompt is None:
        prompt = _read(options.prompt_file or _STDIN, most)
    return encode(tokenizer, context + prompt, config, max_bytes=most)


def _read(file: Path, most: int) -> str:
    """A text of at most so many bytes, as it is; - is stdin."""
    try:
        if file == _STDIN:
            content = sys.stdin.buffer.read(most + 1)
        else:
            with open(file, "rb") as opened:
                content = opened.read(most + 1)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; give a file of text") from None
    name = "stdin" if file == _STDIN else file
    if len(content) > most:
        raise ValueError(
            f"{name}: more than {most:,} bytes, more tokens than the model has room for"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start:,} is no UTF-8; give a file of text") from None


def _stream(engine: "Engine", prompt: list[int], sampling: "Sampling") -> "Iterator[Event]":
    """Events of one request; meanwhile a bar of the prompt where somebody watches."""
    import jax
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from mmx.inference.decoding import chunk_size

    engine.submit(prompt, sampling)
    console = Console(stderr=True)
    watched = console.is_terminal and len(prompt) > engine.sizes.chunk
    columns = "prompt", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not watched) as bar:
        task = bar.add_task("prompt", total=len(prompt))
        read = 0
        # The last chunk gives a token, which is looked at below.
        while watched and len(prompt) - read > engine.sizes.chunk:
            yield from engine.step()
            jax.block_until_ready(engine.pool)  # what was sent off is not yet done
            read += chunk_size(len(prompt) - read, engine.sizes.chunk)
            bar.update(task, completed=read)
    while not engine.idle:
        yield from engine.step()


def _print(events: "Iterator[Event]", *, as_ids: bool) -> int:
    """Write what comes; the line is ended whatever happens."""
    from mmx.inference.requests import Event

    comma = ""
    last: Event | None = None
    try:
        for last in events:
            if last.error:
                break
            if not as_ids:
                show(last.text)
            elif last.token is not None:
                show(f"{comma}{last.token}")
                comma = ","
    finally:
        show("\n")
    if last is not None and last.error:
        raise ValueError(last.error)
    return 0


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        shown = text if len(text) < 60 else text[:60] + "..."
        raise ValueError(f"--tokens is {shown!r}; it must be integers, as 1,2,3") from None
    for i in ids:
        if not -(2**63) <= i < 2**63:
            raise ValueError(f"--tokens contains {i}; it must be ids of the vocabulary")
    return ids
