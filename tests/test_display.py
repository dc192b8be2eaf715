"""What a person sees of a run: lines in a log, a bar on a terminal."""

import io
import types

import pytest
from rich.console import Console

from mmx.training import display
from mmx.training.display import Display


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(display, "monotonic", lambda: now.seconds)
    return now


def show(width, *, terminal, total=100, every=10, tokens=None, first=1):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    shown = Display(
        total_steps=total, first_step=first, tokens_per_step=tokens, every=every, console=console
    )
    return shown, console.file


def test_a_log_gets_a_line_every_few_steps_and_where_something_happens(clock):
    shown, file = show(40, terminal=False)
    shown.opening([("parameters", "1,234"), ("run", "[bold]x")])
    for step in range(1, 101):
        record = {"step": step, "loss": 4 - step / 50, "tokens_per_second": 12345.6, "mfu": 0.4123}
        record |= {"data_wait": 0.001, "skipped": float(step == 33), "num_skipped": step // 33}
        if step == 45:
            record["heldout_loss"] = 3.25
        shown.update(record)
        clock.seconds += 90
    shown.note("done [all]")
    shown.close()
    opening, run, *steps, note = file.getvalue().splitlines()
    assert (opening, run, note) == ("parameters  1,234", "run         [bold]x", "done [all]")
    numbers = [int(line.split()[1].split("/")[0]) for line in steps]
    assert numbers == [1, 10, 20, 30, 33, 40, 45, 50, 60, 70, 80, 90, 100]
    assert steps[6] == (
        "step 45/100  loss 3.1000  held-out 3.2500  ETA 1:22:30  12.3k tokens/s  41.2% of peak  "
        "data wait 0.1%  skipped 1"
    )


def test_the_time_left_forgets_the_first_compile_and_the_steps_before_a_resume(clock):
    shown, file = show(80, terminal=False, total=1000, every=1, tokens=2000, first=500)
    for step in range(500, 500 + 3 * 64):
        clock.seconds += 600 if step == 500 else 2 if step < 600 else 4
        shown.update({"step": step, "loss": None})
    first, second, *_, last = file.getvalue().splitlines()
    assert first == "step 500/1,000  loss not finite"
    # 499 steps of 2 s; 2000 tokens in each.
    assert second == "step 501/1,000  loss not finite  ETA 0:16:38  1.00k tokens/s"
    assert "ETA 0:20:36" in last  # 309 steps of 4 s
    assert "500 tokens/s" in last


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_gets_a_bar_that_fits(clock, width):
    shown, file = show(width, terminal=True, total=2000)
    shown.opening([("run", "[x]")])
    for step in (1, 2):
        clock.seconds += 1
        shown.update(
            {"step": step, "loss": 5.0 - step, "tokens_per_second": 5000.0, "heldout_loss": 2.5}
        )
    shown.note("a note")
    shown.close()
    text = file.getvalue()
    bar = [line for line in text.splitlines() if "loss" in line][-1]
    assert "step 2/2,000" in bar
    assert "loss 3.000" in bar
    assert "…" not in bar
    assert ("tok/s" in bar) == (width >= 80)
    assert "[x]" in text
    assert "a note" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (1.5e8, "150M"),
        (3e16, "30000T"),
    ],
)
def test_numbers_in_three_digits(number, text):
    assert display._count(number) == text


def test_durations():
    assert display._duration(59.6) == "0:01:00"
    assert display._duration(2 * 86400 + 3 * 3600 + 4 * 60 + 5) == "2d 3:04:05"
