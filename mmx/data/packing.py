"""The global order of samples, planned from the lengths of documents alone.

Pieces of documents (a document longer than `seq_len` gives several) are drawn for a *window* of
rows, packed by best fit decreasing, and the rows shuffled. A window is a function of where it
starts, a handful of numbers a source, and of its terms. So the state of a data iterator is the
start of its window and a row number; every process plans the same rows and reads only its own.
"""

import bisect
import functools
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import UInt32

from mmx.data.mixing import Weights, most_owed

# Rows of a window, at least, unless asked otherwise, and in tokens at most: enough to pack well,
# few enough to plan in a second at any length.
_LEAST_ROWS, SHUFFLE_ROWS, _WINDOW_TOKENS = 64, 256, 1 << 26


class Piece(NamedTuple):
    """Tokens `start : start + length` of a document; `turn` counts its source's documents."""

    source: int
    turn: int
    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Cursor:
    """Where a window starts.

    Attributes:
      sample: rows before it, in the global order.
      turns: documents of each source that are drawn entirely.
      offsets: tokens already drawn of the next document of each source.
      owed: tokens by which each source is behind its share.
    """

    sample: int
    turns: tuple[int, ...]
    offsets: tuple[int, ...]
    owed: tuple[float, ...]


@dataclass(frozen=True)
class Terms:
    """What a window is planned by, besides its start.

    Attributes:
      seq_len: tokens a row.
      weights: of the sources.
      max_epochs: of each source, None: no end.
      shuffle_rows: rows of a window.
    """

    seq_len: int
    weights: Weights
    max_epochs: tuple[int | None, ...]
    shuffle_rows: int = SHUFFLE_ROWS


class Window(NamedTuple):
    """Rows of a window, where the next one starts, and the sources that ended in it."""

    rows: list[list[Piece]]
    after: Cursor
    ended: tuple[int, ...]


class Planner:
    """Plans windows over the documents of some sources.

    Args:
      names: of the sources, fixing their indices.
      lengths: tokens of each source's documents.
      seed: of the shuffles.
    """

    def __init__(
        self,
        names: Sequence[str],
        lengths: Sequence[UInt32[np.ndarray, "documents"]],
        *,
        seed: int,
    ):
        self._names, self._lengths, self._seed = tuple(names), list(lengths), seed

    def start(self) -> Cursor:
        """The beginning of the order."""
        zeros = (0,) * len(self._names)
        return Cursor(0, zeros, zeros, (0.0,) * len(self._names))

    def window(self, cursor: Cursor, terms: Terms) -> Window:
        """The window at a cursor; it has no rows when all sources with a share have ended.

        A source that reaches its `max_epochs` leaves its share to the others, in proportion.
        """
        pieces, turns, offsets, owed = self._draw(cursor, terms)
        rows = best_fit([piece.length for piece in pieces], terms.seq_len)
        rows = self._arranged(rows, pieces, cursor.sample)
        ended = tuple(
            s
            for s in range(len(self._names))
            if not self._has_ended(s, cursor.turns[s], terms)
            and self._has_ended(s, turns[s], terms)
        )
        after = Cursor(cursor.sample + len(rows), tuple(turns), tuple(offsets), tuple(owed))
        return Window([[pieces[i] for i in row] for row in rows], after, ended)

    def _has_ended(self, source: int, turn: int, terms: Terms) -> bool:
        epochs = terms.max_epochs[source]
        count = len(self._lengths[source])
        return count == 0 or (epochs is not None and turn >= epochs * count)

    def _draw(self, cursor: Cursor, terms: Terms):
        """Pieces in the order of drawing, and where each source is afterwards."""
        turns, offsets, owed = list(cursor.turns), list(cursor.offsets), list(cursor.owed)
        rows = max(_LEAST_ROWS, min(terms.shuffle_rows, _WINDOW_TOKENS // terms.seq_len))
        wanted = terms.seq_len * rows
        pieces: list[Piece] = []
        total, row, among, shares = 0, -1, [], []
        while total < wanted:
            if row != total // terms.seq_len:
                row = total // terms.seq_len
                among, shares = self._shares(cursor.sample + row, turns, terms)
            if not among:
                break
            source = most_owed(owed, shares, among)
            piece = self._piece(source, turns[source], offsets[source], terms.seq_len)
            pieces.append(piece)
            total += piece.length
            for s in among:
                owed[s] += shares[s] * piece.length
            owed[source] -= piece.length
            offsets[source] += piece.length
            if offsets[source] == self._lengths[source][piece.document]:
                turns[source] += 1
                offsets[source] = 0
                if self._has_ended(source, turns[source], terms):
                    row = -1  # divide the shares anew
        return pieces, turns, offsets, owed

    def _shares(
        self, sample: int, turns: Sequence[int], terms: Terms
    ) -> tuple[list[int], list[float]]:
        """Sources to draw from at a sample, and the shares of all, with sum 1 over these."""
        weights = terms.weights.at(sample)
        shares = [weights.get(name, 0.0) for name in self._names]
        among = [
            s
            for s, share in enumerate(shares)
            if share > 0 and not self._has_ended(s, turns[s], terms)
        ]
        total = sum(shares[s] for s in among)
        return among, [share / total if total else 0.0 for share in shares]

    def _piece(self, source: int, turn: int, offset: int, seq_len: int) -> Piece:
        lengths = self._lengths[source]
        name = self._names[source]
        document = shuffled(turn, count=len(lengths), seed=self._seed, name=name)
        left = int(lengths[document]) - offset
        return Piece(source, turn, document, offset, min(left, seq_len))

    def _arranged(self, rows: list[list[int]], pieces: list[Piece], sample: int) -> list[list[int]]:
        """Shuffle rows, then put those with pieces of one document back into its order.

        All pieces of a document but its last fill a row each. So it is enough to move the row of
        the last one behind the others and to sort the others among their places.
        """
        places = [
            shuffled(i, count=len(rows), seed=self._seed, name=f"rows {sample}")
            for i in range(len(rows))
        ]
        by_document: dict[tuple[int, int], list[int]] = defaultdict(list)
        row_of = {i: r for r, row in enumerate(rows) for i in row}
        for i, piece in enumerate(pieces):
            by_document[piece[:2]].append(row_of[i])
        full: dict[int, list[int]] = defaultdict(list)  # rows that must come before a row
        split = [rows_of for rows_of in by_document.values() if len(rows_of) > 1]
        for *before, last in split:
            full[last] += before
        for last, before in full.items():
            latest = max(before, key=lambda r: places[r])
            if places[latest] > places[last]:
                places[latest], places[last] = places[last], places[latest]
        for *before, _ in split:
            for r, place in zip(before, sorted(places[r] for r in before), strict=True):
                places[r] = place
        ordered: list[list[int]] = [[] for _ in rows]
        for r, row in enumerate(rows):
            ordered[places[r]] = sorted(row)  # within a row, in the order of drawing
        return ordered


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Pack items into rows of `seq_len`, the longest first, each where the least room remains.

    Args:
      lengths: of the items, each in 1..seq_len.
      seq_len: tokens a row.

    Returns:
      The indices of the items of each row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect.bisect_left(room, (lengths[i], -1))
        if found < len(room):
            left, row = room.pop(found)
        else:
            left, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > lengths[i]:
            bisect.insort(room, (left - lengths[i], row))
    return rows


def shuffled(index: int, *, count: int, seed: int, name: str) -> int:
    """The document at `index` of a source's endless order: a new permutation every epoch.

    Args:
      index: >= 0; `index // count` is the epoch.
      count: documents of the source.
      seed: of the run.
      name: of the source, so that its order does not depend on what other sources there are.
    """
    epoch, place = divmod(index, count)
    key = _key(f"{seed}/{name}/{epoch}")
    return grain.experimental.index_shuffle(place, max_index=count - 1, seed=key, rounds=4)


@functools.lru_cache(maxsize=4096)
def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
