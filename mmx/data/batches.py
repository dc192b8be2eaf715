"""Batches of packed rows from a corpus folder, with a state that resumes bit for bit."""

import collections
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import UInt32

from mmx.data.mixing import Weights
from mmx.data.packing import SHUFFLE_ROWS, Cursor, Piece, Planner, Terms, Window
from mmx.data.shards import SPLITS, Manifest, Shard, ShardReader, read_lengths

_STATE = 1
_AHEAD = 2  # batches made beforehand
_OPEN_SHARDS = 128
_KEPT_BYTES = 256 << 20  # of documents that have more pieces to come
_CHANGE: Mapping[str, str] = {"train": "smaller", "heldout": "larger"}


@dataclass(frozen=True)
class _Position:
    """A place in the global order: a window, a row of it, and what was handed out before."""

    cursor: Cursor
    terms: Terms
    row: int
    tokens: tuple[int, ...]


class _Made(NamedTuple):
    batch: dict[str, np.ndarray] | None
    after: _Position


class Batches(grain.DatasetIterator[dict[str, np.ndarray]]):
    """Endless batches of packed rows, or finite ones with `max_epochs`.

    `next()` gives a dict of int32 arrays [batch_size // process_count, seq_len]:
    `tokens`; `segment_ids`, 1, 2, ... for the documents packed into a row and 0 for padding; and
    `sources`, indices into `source_names` and -1 for padding. Rows of process p are rows
    `p * b : (p + 1) * b` of one global batch, which does not depend on the number of processes.

    Weights are shares of the tokens, followed to about one document. They are evaluated where rows
    are drawn; rows are then shuffled in windows of `shuffle_rows`, so a change of weights reaches
    that far. A source that has been read `max_epochs` times leaves its share to the others in
    proportion, with a warning that says at which sample; when none is left the iterator ends, its
    last batch filled up with rows of padding.

    The state is a small dict for JSON about the global order: it restores on another number of
    processes, with another batch size, and with other weights or `max_epochs`, which then take
    effect from the next window. With another `seq_len` the rest of the window is left out, so
    that no token is read twice.

    A thread makes the next two batches meanwhile; the state is of what was handed out.

    Args:
      folder: of `build_corpus`.
      seq_len: tokens a row.
      batch_size: rows of the global batch.
      weights: by sample; None is in proportion to the tokens of the sources.
      seed: of the shuffles.
      process_index: which slice of each batch.
      process_count: slices; divides `batch_size`.
      split: "train" or "heldout".
      max_epochs: of all sources, or of those named; None is no end.
      shuffle_rows: rows of a window; 64 to what 2^26 tokens hold. More keep the pieces of one long
        document further apart.

    Raises:
      ValueError: an argument is out of range, a source unknown, the split empty, or a file missing
        or corrupt: the message names it. A damaged record raises when it is reached.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seq_len: int,
        batch_size: int,
        weights: Weights | None,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        split: str = "train",
        max_epochs: int | Mapping[str, int] | None = None,
        shuffle_rows: int = SHUFFLE_ROWS,
    ):
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "batches")
        self._ahead: collections.deque[Future[_Made]] = collections.deque()
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"seq_len {seq_len} and batch_size {batch_size} must be positive")
        if not 0 <= process_index < process_count or batch_size % process_count:
            raise ValueError(
                f"process {process_index} of {process_count} with batch_size {batch_size}: the "
                "index must be below the count, and the count must divide the batch"
            )
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        manifest = Manifest.load(folder)
        totals = manifest.tokens(split)
        if not any(totals.values()):
            raise ValueError(f"{folder}: the split {split!r} is empty; {_remedy(manifest, split)}")
        self.source_names = manifest.sources
        self._warn = weights is not None
        weights = Weights.constant(totals) if weights is None else weights
        weights.check_sources(self.source_names)
        epochs = _epochs(max_epochs, self.source_names)
        _check_empty_sources(weights, totals, split)
        self._totals = tuple(totals.values())
        self._fingerprint = manifest.fingerprint(split)
        self._seed, self._batch_size = seed, batch_size
        rows = batch_size // process_count
        self._mine = slice(process_index * rows, (process_index + 1) * rows)
        self._documents = _Documents(manifest, split)
        self._planner = Planner(self.source_names, self._documents.lengths, seed=seed)
        if shuffle_rows < 1:
            raise ValueError(f"shuffle_rows is {shuffle_rows}; it must be at least 1")
        self._terms = Terms(seq_len, weights, epochs, shuffle_rows)
        tokens = (0,) * len(self.source_names)
        self._window: tuple[Cursor, Terms, Window] | None = None
        self._handed = _Position(self._planner.start(), self._terms, 0, tokens)
        self._next = self._handed

    def __next__(self) -> dict[str, np.ndarray]:
        self.start_prefetch()
        made = self._ahead[0].result()  # an interrupt here loses nothing
        self._ahead.popleft()
        if made.batch is None:
            raise StopIteration
        self._handed = made.after
        return made.batch

    def start_prefetch(self) -> None:
        """Begin to make batches; `next` does so too."""
        while len(self._ahead) < _AHEAD:
            self._ahead.append(self._thread.submit(self._make))

    def close(self) -> None:
        """Stop the thread; the iterator is of no use afterwards."""
        # Without waiting: the collector may call this in the thread itself.
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def seen(self) -> dict[str, Any]:
        """What was handed out, of all processes: samples, tokens and epochs by source."""
        names, tokens = self.source_names, self._handed.tokens
        epochs = [
            n / total if total else 0.0 for n, total in zip(tokens, self._totals, strict=True)
        ]
        return {
            "samples": self._handed.cursor.sample + self._handed.row,
            "tokens": dict(zip(names, tokens, strict=True)),
            "epochs": dict(zip(names, epochs, strict=True)),
        }

    def get_state(self) -> dict[str, Any]:
        """The state after the last batch that was handed out, for JSON; alike in all processes."""
        terms = self._handed.terms
        return {
            "version": _STATE,
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "cursor": _cursor_to_json(self._handed.cursor),
            "row": self._handed.row,
            "tokens": list(self._handed.tokens),
            "seq_len": terms.seq_len,
            "weights": terms.weights.to_json(),
            "max_epochs": list(terms.max_epochs),
            "shuffle_rows": terms.shuffle_rows,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
          ValueError: it is of other shards, another tokenizer, another seed, or no state.
        """
        if not isinstance(state, Mapping) or state.get("version") != _STATE:
            raise ValueError("this is no state of a data iterator of this version; start anew")
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(
                "the data iterator's state belongs to other shards or another tokenizer; give the "
                "corpus it was saved with, or start the data anew"
            )
        if state.get("seed") != self._seed:
            raise ValueError(
                f"the data iterator's state has seed {state.get('seed')}, this run {self._seed}; "
                "give the same seed"
            )
        try:
            position = _position_from_json(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the data iterator's state is damaged ({error})") from None
        cursor, terms = position.cursor, position.terms
        if terms.seq_len != self._terms.seq_len and position.row:
            after = self._planner.window(cursor, terms).after
            cursor = replace(after, sample=cursor.sample + position.row)
            position = replace(position, cursor=cursor, row=0)
        if position.row == 0:
            position = replace(position, terms=self._terms)
        self._halt()
        self._handed = self._next = position

    def _halt(self) -> None:
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)
        self._ahead.clear()

    # ------------------------------------------------------------ in the thread

    def _make(self) -> _Made:
        position, rows = self._next, []
        while len(rows) < self._batch_size:
            window = self._window_at(position)
            if not window.rows:
                break
            taken = window.rows[position.row : position.row + self._batch_size - len(rows)]
            rows += taken
            position = replace(position, row=position.row + len(taken))
            if position.row >= len(window.rows):
                position = replace(position, cursor=window.after, terms=self._terms, row=0)
        if not rows:
            return _Made(None, position)
        tokens = list(position.tokens)
        for piece in (piece for row in rows for piece in row):
            tokens[piece.source] += piece.length
        position = replace(position, tokens=tuple(tokens))
        batch = self._filled(rows[self._mine])
        self._next = position
        return _Made(batch, position)

    def _window_at(self, position: _Position) -> Window:
        cursor, terms = position.cursor, position.terms
        if self._window is None or self._window[:2] != (cursor, terms):
            window = self._planner.window(cursor, terms)
            self._window = cursor, terms, window
            for source in window.ended if self._warn else ():
                warnings.warn(
                    f"source {self.source_names[source]!r} has been read "
                    f"{terms.max_epochs[source]} times by sample {window.after.sample:,}; "
                    "its share goes to the others",
                    stacklevel=2,
                )
        return self._window[2]

    def _filled(self, rows: list[list[Piece]]) -> dict[str, np.ndarray]:
        shape = self._mine.stop - self._mine.start, self._terms.seq_len
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        sources = np.full(shape, -1, np.int32)
        for r, row in enumerate(rows):
            at = 0
            for number, piece in enumerate(row, 1):
                here = slice(at, at + piece.length)
                tokens[r, here] = self._documents.read(piece)
                segments[r, here] = number
                sources[r, here] = piece.source
                at += piece.length
        return {"tokens": tokens, "segment_ids": segments, "sources": sources}


class _Documents:
    """Token ids of pieces; keeps shards open, and documents of which more pieces will come."""

    def __init__(self, manifest: Manifest, split: str):
        self._folder = manifest.folder
        self._shards: list[list[Shard]] = []
        self._ends: list[np.ndarray] = []
        self.lengths: list[UInt32[np.ndarray, "documents"]] = []
        for source in manifest.sources:
            shards = [shard for shard in manifest.splits[split] if shard.source == source]
            for shard in shards:
                ShardReader.check(manifest.folder, shard)
            lengths = [read_lengths(manifest.folder, shard) for shard in shards]
            self.lengths.append(np.concatenate([np.zeros(0, np.uint32), *lengths]))
            self._shards.append(shards)
            self._ends.append(np.cumsum([shard.documents for shard in shards]))
        self._open: collections.OrderedDict[str, ShardReader] = collections.OrderedDict()
        self._kept: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
        self._kept_bytes = 0

    def read(self, piece: Piece) -> UInt32[np.ndarray, "length"]:
        key = piece.source, piece.document
        whole = int(self.lengths[piece.source][piece.document])
        ids = self._kept.pop(key, None)
        if ids is None:
            ids = self._load(piece.source, piece.document, whole)
        else:
            self._kept_bytes -= ids.nbytes
        if piece.start + piece.length < whole:
            self._kept[key] = ids
            self._kept_bytes += ids.nbytes
            while self._kept_bytes > _KEPT_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return ids[piece.start : piece.start + piece.length]

    def _load(self, source: int, document: int, length: int) -> UInt32[np.ndarray, "T"]:
        number = int(np.searchsorted(self._ends[source], document, side="right"))
        shard = self._shards[source][number]
        reader = self._open.pop(shard.file, None) or ShardReader(self._folder, shard)
        self._open[shard.file] = reader
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        first = int(self._ends[source][number]) - shard.documents
        return reader.read(document - first, length=length).ids


def _remedy(manifest: Manifest, split: str) -> str:
    """What gives a split documents: chance alone has left it without, or --heldout has."""
    again = f"build it again with `mmx data build --out {manifest.folder}`"
    if split == "heldout" and manifest.recipe.get("heldout") == 0:
        return f"{again}, the same input, and --heldout above 0, as 0.05"
    return f"{again} from more text, or with a {_CHANGE[split]} --heldout"


def _epochs(
    max_epochs: int | Mapping[str, int] | None, names: tuple[str, ...]
) -> tuple[int | None, ...]:
    if isinstance(max_epochs, Mapping):
        Weights.constant(dict.fromkeys(max_epochs, 1.0)).check_sources(names)
        epochs = tuple(max_epochs.get(name) for name in names)
    else:
        epochs = (max_epochs,) * len(names)
    if any(n is not None and n < 1 for n in epochs):
        raise ValueError(f"max_epochs is {max_epochs}; each must be at least 1, or None for no end")
    return epochs


def _check_empty_sources(weights: Weights, totals: Mapping[str, int], split: str) -> None:
    for name in weights.sources:
        if not totals[name] and any(stage.get(name, 0) > 0 for _, stage in weights.stages):
            raise ValueError(f"source {name!r} has a weight, but no text in the split {split!r}")


def _cursor_to_json(cursor: Cursor) -> dict[str, Any]:
    lists = {"turns": cursor.turns, "offsets": cursor.offsets, "owed": cursor.owed}
    return {"sample": cursor.sample} | {name: list(values) for name, values in lists.items()}


def _position_from_json(state: Mapping[str, Any]) -> _Position:
    at = state["cursor"]
    cursor = Cursor(at["sample"], tuple(at["turns"]), tuple(at["offsets"]), tuple(at["owed"]))
    weights = Weights.from_json(state["weights"])
    epochs = tuple(state["max_epochs"])
    terms = Terms(state["seq_len"], weights, epochs, state["shuffle_rows"])
    return _Position(cursor, terms, state["row"], tuple(state["tokens"]))
