"""Which source comes next: shares of the tokens as a function of the place in the global order.

A *sample* is one row of a batch, `seq_len` tokens of packed pieces; weights are shares of the
tokens. Shares change with the sample's index alone, so a run that is resumed, or that runs on
another number of hosts, mixes alike.
"""

import bisect
import difflib
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weights:
    """Shares of the sources by stage, with linear transitions as in MiniMax-01's context stages.

    Attributes:
      stages: `(start_sample, {source: weight})`, the first one from 0, starts increasing. Weights
        need not sum to one; a source that is not named has weight 0.
      transition: samples from the start of a stage over which the shares go linearly from those of
        the stage before; 0 changes at once.

    Raises:
      ValueError: stages out of order, overlapping transitions, or weights that are negative, not
        finite, or zero together.
    """

    stages: tuple[tuple[int, Mapping[str, float]], ...]
    transition: int = 0

    def __post_init__(self):
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"stages start at samples {starts}; they must be 0 and increase")
        for start, weights in self.stages:
            bad = {s: w for s, w in weights.items() if not (math.isfinite(w) and w >= 0)}
            if bad:
                raise ValueError(f"weights of the stage from sample {start}: {bad}; want >= 0")
            if not sum(weights.values()) > 0:
                raise ValueError(
                    f"weights of the stage from sample {start} sum to zero: {dict(weights)}; "
                    "give one source at least a positive weight"
                )
        shortest = min((b - a for a, b in itertools.pairwise(starts[1:])), default=math.inf)
        if not 0 <= self.transition <= shortest:
            raise ValueError(
                f"transition is {self.transition} samples; it must be >= 0 and no longer than "
                f"the stages it leads into ({shortest} samples)"
            )

    @classmethod
    def constant(cls, weights: Mapping[str, float]) -> "Weights":
        """The same weights at every sample."""
        return cls(((0, dict(weights)),))

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        """All sources that a stage names, sorted."""
        return tuple(sorted({name for _, weights in self.stages for name in weights}))

    def at(self, sample: int) -> dict[str, float]:
        """Shares at a sample, >= 0, with sum 1, of every source that a stage names."""
        stage = bisect.bisect_right([start for start, _ in self.stages], sample) - 1
        shares = self._shares(max(stage, 0))
        since = sample - self.stages[stage][0]
        if stage <= 0 or since >= self.transition:
            return shares
        before, part = self._shares(stage - 1), since / self.transition
        return {s: (1 - part) * before[s] + part * shares[s] for s in shares}

    def check_sources(self, known: Sequence[str]) -> None:
        """Compare the names with those of a corpus.

        Raises:
          ValueError: a source is unknown; the message suggests the nearest.
        """
        for name in self.sources:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"weights name the source {name!r}; {hint}The corpus has {', '.join(known)}"
                )

    def to_json(self) -> dict[str, Any]:
        """As JSON; `from_json` is its inverse."""
        stages = [[start, dict(weights)] for start, weights in self.stages]
        return {"stages": stages, "transition": self.transition}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Weights":
        """From what `to_json` gave."""
        return cls(tuple((start, dict(w)) for start, w in data["stages"]), data["transition"])

    def _shares(self, stage: int) -> dict[str, float]:
        weights = self.stages[stage][1]
        total = sum(weights.values())
        return {name: weights.get(name, 0.0) / total for name in self.sources}


def most_owed(owed: Sequence[float], shares: Sequence[float], among: Iterable[int]) -> int:
    """The source that is furthest behind its share, the one with the larger share at a tie.

    With `owed[s] += share[s] * tokens` for all sources and `owed[chosen] -= tokens` after each
    choice, every source stays within about one piece of its share of the tokens: for n tokens the
    deviation is O(1/n), where random choices would give O(1/sqrt(n)).
    """
    return max(among, key=lambda s: (owed[s], shares[s], -s))
