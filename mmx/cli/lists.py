"""Options that take a list, given once with all its values or several times."""

from collections.abc import Sequence
from typing import get_args, get_origin, get_type_hints


def gather_repeated(options: type, arguments: Sequence[str]) -> list[str]:
    """The command line with all values of a list option behind the place where it is given first.

    tyro takes `--input A B`, and of `--input A --input B` the last alone, without a word; it can
    take the second form instead of the first, but not both.

    Args:
      options: a dataclass; its fields of type `tuple[..., ...]` are the list options.
      arguments: the command line.
    """
    lists = {
        f"--{name.replace('_', '-')}"
        for name, kind in get_type_hints(options).items()
        if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    }
    found: dict[str, list[str]] = {}
    current: list[str] = []
    groups = [current]  # an option and its values each
    for token in arguments:
        flag, assigned, value = token.partition("=")
        flag = flag.replace("_", "-")
        if flag in found:
            current = found[flag]
            current += [value] if assigned else []
        elif token.startswith("-") and token.lstrip("-")[:1].isalpha():
            current = [token]
            groups.append(current)
            if flag in lists:
                found[flag] = current
        else:
            current.append(token)
    return [token for group in groups for token in group]
