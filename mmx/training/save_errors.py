"""A failed save as Orbax and tensorstore tell it: the cause in a few words, the rest unheard.

They write many files at once. Where the disk is full the first that fails ends Orbax's event loop,
and each of the others then has nobody to tell: a traceback a file, after the one line that matters.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_LONGEST = 120
_MOMENTS = 10.0  # seconds
_open: list[None] = []  # one for each caller of `silence`
_quiet_until = 0.0


def cause_of(error: Exception) -> str:
    """The system's own words where they are in it, else the beginning of the message."""
    if found := _OS_ERROR.search(str(error)):
        return os.strerror(int(found[1]))
    told = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((told or type(error).__name__).split())[:_LONGEST]


def silence() -> None:
    """Leave unsaid what belongs to failed saves, until `restore` is called as often."""
    _open.append(None)
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _matters not in logger.filters:
            logger.addFilter(_matters)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def restore() -> None:
    """The end of a `silence`; what a failed save still has to say comes moments later."""
    global _quiet_until
    _open.pop()
    _quiet_until = time.monotonic() + _MOMENTS


def _silent() -> bool:
    return bool(_open) or time.monotonic() < _quiet_until


def _matters(record: logging.LogRecord) -> bool:
    if not _silent():
        return True
    # Orbax logs the traceback of a failed save; the caller gets one line, as SaveFailed.
    if record.name == "absl":
        return record.levelno < logging.ERROR or "orbax" not in record.pathname
    return "was never retrieved" not in record.getMessage()


class _Hook:
    """`sys.unraisablehook`, which gets what callbacks of tensorstore's threads raise."""

    def __init__(self, before: Callable[[Any], object]):
        self.before = before

    def __call__(self, said: Any) -> None:
        late = said.exc_type is RuntimeError and str(said.exc_value) == "Event loop is closed"
        if not (late and _silent()):
            self.before(said)
