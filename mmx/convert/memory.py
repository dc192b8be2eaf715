"""How much memory this process has, and a budget that threads share."""

import math
import os
import re
import resource
import threading
from pathlib import Path

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
          **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]*)")


def parse_size(text: str, name: str) -> int:
    """Bytes from text as '3GiB', '500MB' or '1000'.

    Raises:
      ValueError: it is none, or not at least one byte; `name` says whose.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or (size := math.floor(float(match[1]) * unit)) < 1:
        raise ValueError(f"{name} {text}: is no size; give one as 8GiB, 500MB or plain bytes")
    return size


def resident() -> int:
    """Bytes of memory this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_resident()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most it has held; not that of the process that started it, as `getrusage` would say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    peak = re.search(r"VmHWM:\s*([0-9]+) kB", status)
    kilobytes = int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024


class Budget:
    """Bytes that may be in use at once; `take` waits until they are free."""

    def __init__(self, size: int):
        self.size = size
        self._free = size
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait for so many bytes; at most `size` in all."""
        assert size <= self.size, "more than there is would be waited for in vain"
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size

    def give(self, size: int) -> None:
        """Return bytes that were taken."""
        with self._changed:
            self._free += size
            self._changed.notify_all()
