"""What a person sees while a run trains: a bar on a terminal, plain lines in a log."""

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

_PACE_STEPS = 64  # the time left follows from so many of the last steps
_SLOW_DATA = 0.01  # share of a step's time from which waiting for data is worth a word on the bar


class Display:
    """Progress on stderr.

    On a terminal a bar that is always up to date. Elsewhere one line every few steps, and at the
    first and last step, at skipped ones and where the held-out loss was measured.

    Args:
      total_steps: of the run.
      first_step: the step that the run begins or goes on with.
      tokens_per_step: for tokens/s where a record does not say; None when it varies.
      every: steps a line, where there is no terminal.
      console: of rich; stderr when None.

    Raises:
      ValueError: `every` is not positive.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int,
        tokens_per_step: int | None,
        every: int = 10,
        console: Console | None = None,
    ):
        if every < 1:
            raise ValueError(f"every is {every}; a line can come every 1 or more steps")
        self._total, self._tokens, self._every = total_steps, tokens_per_step, every
        self._console = console or Console(stderr=True)
        self._times: deque[tuple[int, float]] = deque(maxlen=_PACE_STEPS + 1)
        self._lines = 0
        self._heldout: float | None = None
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = _bar(self._console)
            done = max(0, first_step - 1)
            self._task = self._progress.add_task(
                "", total=total_steps, completed=done, numbers="first step: compiling"
            )

    def opening(self, rows: Sequence[tuple[str, str]]) -> None:
        """A small table of what is about to be trained: names and values."""
        if self._progress is None:
            width = max((len(name) for name, _ in rows), default=0)
            for name, value in rows:
                self._line(f"{name:<{width}}  {value}")
            return
        table = Table(show_header=False)
        for name, value in rows:
            # Text takes brackets in a value literally, a string would read them as markup.
            table.add_row(Text(name), Text(value))
        self._console.print(table)
        self._progress.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a step: its record, as written to the logbook."""
        step = record["step"]
        self._times.append((step, monotonic()))
        measured = record.get("heldout_loss")
        if measured is not None:
            self._heldout = measured
        if self._progress is not None:
            self._progress.start()  # where there was no opening
            numbers = self._fitting(self._numbers(record, short=True))
            self._progress.update(self._task, completed=step, numbers=numbers)
            return
        due = step % self._every == 0 or step >= self._total or not self._lines
        if due or record.get("skipped") or measured is not None:
            self._lines += 1
            numbers = "  ".join(self._numbers(record, short=False))
            self._line(f"step {step:,}/{self._total:,}  {numbers}")

    def note(self, message: str) -> None:
        """A line of its own, above the bar."""
        self._line(message)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back; also after an error."""
        if self._progress is not None and self._progress.live.is_started:
            self._progress.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _pace(self) -> float | None:
        """Seconds a step, saves and evaluations included; None before the second update."""
        # Not from the step times: those of the first compile would stay in the mean for ever.
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return (end - begin) / (last - first) if last > first else None

    def _fitting(self, numbers: list[str]) -> str:
        """The first of them, as many as there is room for beside the bar."""
        room = (
            self._console.width
            - _bar_width(self._console)
            - len(f"step {self._total:,}/{self._total:,}")
            - 2
        )
        while len(numbers) > 1 and len("  ".join(numbers)) > room:
            numbers = numbers[:-1]
        return "  ".join(numbers)

    def _numbers(self, record: Mapping[str, Any], *, short: bool) -> list[str]:
        """What there is to say, most important first."""
        loss, mfu, wait = record.get("loss"), record.get("mfu"), record.get("data_wait")
        skipped, pace = record.get("num_skipped"), self._pace()
        digits = 3 if short else 4
        numbers = [f"loss {loss:.{digits}f}" if loss is not None else "loss not finite"]
        heldout = self._heldout if short else record.get("heldout_loss")
        if heldout is not None:
            numbers.append(f"held-out {heldout:.{digits}f}")
        if pace is not None:
            numbers.append(f"ETA {_duration(pace * max(0, self._total - record['step']))}")
        tokens = record.get("tokens_per_second")
        if tokens is None and self._tokens is not None and pace:
            tokens = self._tokens / pace
        if tokens is not None:
            numbers.append(f"{_count(tokens)} {'tok/s' if short else 'tokens/s'}")
        if mfu is not None:
            numbers.append(f"{mfu:.1%} of peak")
        if wait is not None and (wait >= _SLOW_DATA or not short):
            numbers.append(f"data wait {wait:.1%}")
        if skipped:
            numbers.append(f"skipped {skipped:,.0f}")
        return numbers


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}", markup=False),
        BarColumn(bar_width=_bar_width(console)),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=console,
        refresh_per_second=4,
        # What is printed while the bar is up goes above it, but never from a pipe to the terminal.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def _bar_width(console: Console) -> int:
    return 8 if console.width < 100 else 20


def _count(number: float) -> str:
    """A number in three digits or so: 950, 12.3k, 1.23M."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    digits = 0 if not unit or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{unit}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, days where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d " * (days > 0) + f"{hour}:{minute:02}:{second:02}"
