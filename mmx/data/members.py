"""Members of JSON objects that others may have changed: all there, and of the right types."""

import reprlib
from collections.abc import Mapping
from typing import Any

_WANTED = {
    int: "a whole number, 0 or more,",
    str: "a string",
    dict: "an object",
    list: "a list",
}


def check_members(data: Any, types: Mapping[str, type], what: str) -> dict[str, Any]:
    """The object, which has these members and no others, each of its type.

    Args:
      data: parsed JSON.
      types: of the members: int (0 or more; true and false are none), str, dict or list.
      what: the object's name in messages.

    Raises:
      ValueError: it is not so; the message says which member of what.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what} is {reprlib.repr(data)}; an object is wanted")
    for name in types:
        if name not in data:
            raise ValueError(f"{what} has no {name!r}")
    for name, value in data.items():
        if name not in types:
            raise ValueError(f"{what} has {reprlib.repr(name)}, which does not belong there")
        kind = types[name]
        if type(value) is not kind or (kind is int and value < 0):
            shown = reprlib.repr(value)
            raise ValueError(f"{name!r} of {what} is {shown}; {_WANTED[kind]} is wanted")
    return data
