"""The `mmx` command: one file a sub-command, imported when it is called.

Nothing here imports jax, so that `mmx --help` answers at once.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

COMMANDS = {
    "info": "layers, parameters and memory of a checkpoint or a preset",
    "plan": "whether a program fits a machine that is not here, and how fast it could be",
    "generate": "continue a prompt with a checkpoint or a run",
    "chat": "talk with a checkpoint in a terminal",
    "serve": "answer requests over HTTP, as OpenAI's clients send them",
    "train": "train a preset from text to a checkpoint, or go on",
    "extend": "extend the context of a run in stages",
    "convert": "Hugging Face <-> Orbax at any size",
    "verify": "check every byte of a checkpoint, or compare two",
    "inspect": "what a checkpoint holds, from its headers",
    "data": "build token shards from text",
    "plot": "draw the curves of a run",
}
# Commands that are recipes: found by name, since nothing here may import what stands above it.
RECIPES = {"train": "recipes.pretrain", "extend": "recipes.extend_context"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; bad input ends in one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can be caught
    except BrokenPipeError:
        # Keep the interpreter from complaining about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"mmx {version('mmx')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    warnings.showwarning = _show_warning
    try:
        return importlib.import_module(RECIPES.get(name, f"mmx.cli.{name}")).main(rest)
    except (ValueError, NotImplementedError) as error:
        return _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.strerror is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: mmx COMMAND [OPTIONS]\n\n"
        "MiniMax-01 in JAX: exact hybrid linear-attention models.\n\n"
        f"commands:\n{commands}\n\n"
        "mmx COMMAND --help says more; mmx --version names the version."
    )


def report_error(message: str) -> None:
    """One line on stderr."""
    print(f"mmx: error: {' '.join(message.split())}", file=sys.stderr)


def _fail(message: str) -> int:
    report_error(message)
    return 2


def _show_warning(message: Warning | str, *unused: object) -> None:
    text = " ".join(str(message).split())
    print(f"mmx: note: {text if text.isprintable() else ascii(text)}", file=sys.stderr)
