"""What a corpus is made from, and how it is cut into parts that workers make independently."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmx.data import embedded
from mmx.data.documents import Document, Reading, Unit, find_units, read_documents

_EMBEDDED_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """What a corpus is made from.

    Attributes:
      inputs: files and folders, each `PATH` or `NAME=PATH`; none takes the embedded corpus.
      tokenizer: a tokenizer.json; None trains one on the train split.
      vocab_size: tokens of a trained tokenizer, at most.
      end_token: the token that ends a document; None finds it.
      heldout: fraction of documents, by hash, that no train shard contains.
      text_field: the field of jsonl and column of parquet that holds the text.
      on_bad: stop at binary or malformed documents, or count and skip them.
      part_bytes: text a part, about; a part is made by one worker, a shard for each source.
      sample_bytes: text that a tokenizer is trained on, about.
    """

    inputs: tuple[str, ...] = ()
    tokenizer: Path | None = None
    vocab_size: int = 8192
    end_token: str | None = None
    heldout: float = 0.05
    text_field: str = "text"
    on_bad: Literal["error", "skip"] = "error"
    part_bytes: int = 32 << 20
    sample_bytes: int = 8 << 20

    def __post_init__(self):
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}; it must be in [0, 1)")
        if min(self.part_bytes, self.sample_bytes) < 1:
            raise ValueError("part_bytes and sample_bytes must be positive")

    @property
    def reading(self) -> Reading:
        """How documents are read."""
        return Reading(self.text_field, self.on_bad)


def cut_parts(recipe: Recipe) -> list[tuple[Unit, ...]]:
    """The input in parts, each of one default source and of about `part_bytes`.

    Raises:
      ValueError: an input does not exist or holds nothing that can be read.
    """
    if recipe.inputs:
        most = recipe.part_bytes
        units = find_units(recipe.inputs, unit_bytes=most)
    else:
        most = min(recipe.part_bytes, _EMBEDDED_PART_BYTES)
        units = embedded.find_embedded()
    parts: list[tuple[Unit, ...]] = []
    part: list[Unit] = []
    size = 0
    for unit in units:
        if part and (size + unit.weight > most or unit.source != part[0].source):
            parts.append(tuple(part))
            part, size = [], 0
        part.append(unit)
        size += unit.weight
    return [*parts, tuple(part)] if part else parts


def part_documents(
    units: tuple[Unit, ...], reading: Reading, tally: Counter[str]
) -> Iterator[Document]:
    """The documents of a part, in order; `tally` counts what is left out.

    Raises:
      ValueError: see `documents.read_documents`.
    """
    for unit in units:
        if unit.kind in embedded.SOURCES:
            yield from (d for d in embedded.read_embedded(unit) if d.text.strip())
        else:
            yield from read_documents(unit, reading, tally)
