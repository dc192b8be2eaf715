"""How a recipe becomes a command: a preset by name, every field of it a flag."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from mmx.cli.lists import gather_repeated
from sharding.processes import Processes


def parse[Recipe](
    command: str, about: str, presets: Mapping[str, Recipe], arguments: Sequence[str]
) -> tuple[Recipe, Processes] | None:
    """What `mmx COMMAND PRESET [OPTIONS]` asks for, and of whom; None when it asked for help.

    Raises:
      ValueError: an unknown preset; the message suggests the nearest.
    """
    name, *rest = arguments or ["--help"]
    names = ", ".join(presets)
    if name in ("-h", "--help"):
        print(f"usage: mmx {command} PRESET [OPTIONS]\n\n{about}\npresets: {names}")
        return None
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}The presets are {names}")
    default = presets[name]
    # Flags of both without a prefix, in one list.
    recipe, processes = (
        Annotated[kind, tyro.conf.arg(name="")] for kind in (type(default), Processes)
    )
    both: Any = tuple[recipe, processes]
    return tyro.cli(
        both,
        prog=f"mmx {command} {name}",
        description=type(default).__doc__,
        args=gather_repeated(type(default), rest),
        default=(default, Processes()),
    )
