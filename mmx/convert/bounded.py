"""Files of others: opened without waiting, read up to a size, parsed in bounded time and memory.

Python's JSON parser needs up to 44 bytes of memory for one byte of text, so only pieces of a
bounded size are handed to it; `walk_object` goes through the members of a large object one by one.
"""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SHOWN = 400  # characters of a text in a message
_space = re.compile(r"[ \t\n\r]*+").match
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class JsonError(ValueError):
    """Text that is not the JSON that is wanted; the message names no file."""


def printable(text: str) -> str:
    """A text out of a checkpoint as one short line that cannot move the cursor."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 2 :]}"
    return text if text.isprintable() else ascii(text)


def open_plain(file: Path, *, missing: str = "no such file; check the path") -> int:
    """A descriptor of a plain file, for reading; what is none is refused without waiting for it.

    Whether links may be followed is for the caller to decide beforehand.

    Raises:
      ValueError: no such file (the message is `missing`), not a plain file, or not readable.
    """
    try:
        # Looked at before it is opened: opening a pipe waits, opening a device may set it off.
        _check_plain(file, os.stat(file).st_mode)
        handle = os.open(
            os.path.realpath(file), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except FileNotFoundError:
        raise ValueError(f"{file}: {missing}") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); check the file") from None
    try:
        _check_plain(file, os.fstat(handle).st_mode)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_plain(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "no plain file")
        raise ValueError(f"{file}: is {kind}; put the file itself there")


def read_exactly(handle: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer of bytes from this offset of a file; returns the bytes there were.

    Raises:
      OSError: the file cannot be read.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_text(file: Path, *, most: int, missing: str = "no such file; check the path") -> str:
    """The text of a file of at most this many bytes of UTF-8.

    Raises:
      ValueError: no plain file, larger, or not UTF-8.
    """
    handle = open_plain(file, missing=missing)
    try:
        size = os.fstat(handle).st_size
        if size > most:
            raise ValueError(
                f"{file}: has {size:,} bytes, and at most {most:,} are read; download it again"
            )
        content = bytearray(size)
        done = read_exactly(handle, memoryview(content), 0)
        return str(memoryview(content)[:done], "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error.reason}); download it again") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); check the file") from None
    finally:
        os.close(handle)


def parse(text: str) -> Any:
    """JSON of a bounded size, without objects that name a member twice.

    Raises:
      JsonError: not JSON, nested too deep, or a name that is there twice.
    """
    value, end = parse_at(text, 0)
    if skip_space(text, end) != len(text):
        raise JsonError(f"more text after the end, at character {end}")
    return value


def parse_at(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins here, and where it ends; see `parse`."""
    try:
        return _DECODER.raw_decode(text, skip_space(text, position))
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("nested too deep") from None
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise JsonError(str(error)) from None


def parse_member(text: str, position: int, *, most: int, what: str) -> tuple[Any, int]:
    """The JSON value that begins here, of at most this many bytes, and where it ends.

    Raises:
      JsonError: see `parse`; or it is larger.
    """
    # One more character than allowed: what ends there is too long, whether or not it is JSON.
    piece = text[position : position + most + 1]
    try:
        value, end = parse_at(piece, 0)
    except JsonError:
        if len(piece) <= most:
            raise
        value, end = None, len(piece)
    if len(piece[:end].encode("utf-8", "surrogatepass")) > most:
        raise JsonError(f"{what} has more than {most:,} bytes")
    return value, position + end


def skip_space(text: str, position: int) -> int:
    """The first character from here on that is no white space of JSON."""
    match = _space(text, position)
    assert match is not None
    return match.end()


def walk_object(
    text: str, position: int, member: Callable[[str, int], int], *, most: int, what: str
) -> int:
    """Go through the object that begins here; returns where it ends.

    Args:
      text: JSON.
      position: of the '{'.
      member: called with the name of each member and the position of its value; returns the
        position after the value.
      most: members that are allowed.
      what: what a member is, in the plural, for the message.

    Raises:
      JsonError: not an object, a name that is there twice, or more members than allowed.
    """
    if text[position : position + 1] != "{":
        raise JsonError(f"an object is wanted at character {position}")
    seen: set[str] = set()
    position = skip_space(text, position + 1)
    if text[position : position + 1] == "}":
        return position + 1
    while True:
        name, position = parse_string(text, position)
        if name in seen:
            raise JsonError(f"{printable(name)} is there twice")
        if len(seen) == most:
            raise JsonError(f"more than {most:,} {what}")
        seen.add(name)
        position = skip_space(text, position)
        if text[position : position + 1] != ":":
            raise JsonError(f"a colon is wanted at character {position}")
        position = skip_space(text, member(name, skip_space(text, position + 1)))
        mark = text[position : position + 1]
        if mark == "}":
            return position + 1
        if mark != ",":
            raise JsonError(f"a comma or a brace is wanted at character {position}")
        position = skip_space(text, position + 1)


def parse_string(text: str, position: int) -> tuple[str, int]:
    """The JSON string that begins here, and where it ends.

    Raises:
      JsonError: there is none.
    """
    if text[position : position + 1] != '"':
        raise JsonError(f"a string is wanted at character {position}")
    try:
        return _DECODER.raw_decode(text, position)  # of what begins with a quote: a string
    except ValueError as error:
        raise JsonError(str(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise JsonError(f"{printable(name)} is there twice")
        found[name] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
