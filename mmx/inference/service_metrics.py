"""Numbers of a service in the text format of Prometheus: written by hand, since it is a page."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

# How a request ended: an answer with 'stop' or 'length'; a caller that went; the engine or the
# tokenizer failed; refused for want of room or for what it asked.
Outcome = Literal["stop", "length", "cancelled", "error", "busy", "refused"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "cancelled", "error", "busy", "refused")
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds
EACH_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """Counts of observations up to each bound, and above all of them."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {total}"


@dataclass(frozen=True)
class Gauges:
    """What holds now.

    Attributes:
      working, waiting: requests that have a row, and that wait for one.
      rows: sequences that can decode together.
      pages_free, pages: of the pool. Pages of kept prefixes are not free, but make way.
      prefix_hits, prefix_tokens: prompts that began as an earlier one, and tokens not read again.
      healthy: whether requests are answered.
    """

    working: int
    waiting: int
    rows: int
    pages_free: int
    pages: int
    prefix_hits: int
    prefix_tokens: int
    healthy: bool


@dataclass
class Counters:
    """What has happened since the start.

    Attributes:
      outcomes: of requests; one with n answers counts n times, unless it was refused as a whole.
      prompt_tokens, generated_tokens: of requests that were let in.
      first_token: seconds from being let in to the first token.
      each_token: seconds a token after the first, the mean of a request.
      engine_failures: steps of the engine that raised.
    """

    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN))
    each_token: Histogram = field(default_factory=lambda: Histogram(EACH_TOKEN))
    engine_failures: int = 0


def metrics_page(counters: Counters, gauges: Gauges) -> str:
    """The page of /metrics: the same names and labels in the same order at all times."""
    lines: list[str] = []

    def head(name: str, kind: str, says: str) -> None:
        lines.extend([f"# HELP {name} {says}", f"# TYPE {name} {kind}"])

    def number(name: str, kind: str, says: str, value: float) -> None:
        head(name, kind, says)
        lines.append(f"{name} {value}")

    def histogram(name: str, says: str, value: Histogram) -> None:
        head(name, "histogram", says)
        lines.extend(value.lines(name))

    head("mmx_requests_total", "counter", "Requests by outcome.")
    for outcome in OUTCOMES:
        lines.append(f'mmx_requests_total{{outcome="{outcome}"}} {counters.outcomes[outcome]}')
    for name, says, value in [
        ("mmx_prompt_tokens_total", "Tokens of prompts let in.", counters.prompt_tokens),
        ("mmx_generated_tokens_total", "Tokens generated.", counters.generated_tokens),
        ("mmx_prefix_hits_total", "Prompts that began as an earlier one.", gauges.prefix_hits),
        ("mmx_prefix_tokens_total", "Prompt tokens not read again.", gauges.prefix_tokens),
        ("mmx_engine_failures_total", "Steps that raised.", counters.engine_failures),
    ]:
        number(name, "counter", says, value)
    for name, says, value in [
        ("mmx_requests_working", "Requests that have a row.", gauges.working),
        ("mmx_requests_waiting", "Requests that wait for a row.", gauges.waiting),
        ("mmx_rows", "Sequences that can decode together.", gauges.rows),
        ("mmx_pages_free", "Pages of keys and values nobody holds.", gauges.pages_free),
        ("mmx_pages", "Pages of keys and values.", gauges.pages),
        ("mmx_healthy", "Whether requests are answered.", int(gauges.healthy)),
    ]:
        number(name, "gauge", says, value)
    histogram("mmx_time_to_first_token_seconds", "From being let in.", counters.first_token)
    histogram(
        "mmx_time_per_output_token_seconds", "After the first, mean of a request.",
        counters.each_token,
    )  # fmt: skip
    return "\n".join(lines) + "\n"
