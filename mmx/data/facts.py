"""Facts in a text and questions for them, in the words of the source 'synthetic' (`embedded.py`).

Long training documents and the measure of retrieval both use these, so that a small model is
measured on what it could learn.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, UInt32
from tokenizers import Tokenizer

from mmx.data import embedded
from mmx.data import tokenizer as bpe

Draw = Callable[[], float]  # a number in [0, 1), another at each call
Ids = UInt32[np.ndarray, "T"]


def fact(place: str, number: int) -> str:
    """A sentence that says a place's number."""
    return f"The number of {place} is {number}."


def question(place: str) -> str:
    """A question for a place's number and the beginning of the answer; the number follows."""
    return f"What is the number of {place}? It is "


def draw_facts(draw: Draw, count: int) -> list[tuple[str, int]]:
    """Different places in random order, each with a number of four digits.

    Raises:
      ValueError: `count` is below 1 or above the number of places.
    """
    places = list(embedded.PLACES)
    if not 1 <= count <= len(places):
        raise ValueError(f"{count} facts are wanted; there must be 1 to {len(places)}")
    chosen = [places.pop(int(draw() * len(places))) for _ in range(count)]
    return [(place, 1000 + int(draw() * 9000)) for place in chosen]


def filler(draw: Draw, tokenizer: Tokenizer, tokens: int) -> Ids:
    """At least so many tokens of generated sentences, a line each; the last line is whole."""
    parts, size = [], 0
    while size < tokens:
        lines, characters = [], 0
        while characters < 4 * (tokens - size):
            words = embedded.WORDS
            line = " ".join(words[int(draw() * len(words))] for _ in range(6 + int(draw() * 8)))
            lines.append(f"{line.capitalize()}.\n")
            characters += len(lines[-1])
        parts.append(bpe.encode(tokenizer, "".join(lines)))
        size += len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def line_starts(tokenizer: Tokenizer, ids: Ids) -> Int[np.ndarray, "lines"]:
    """Where lines begin: 0, and each place behind a token that ends with a line break."""
    found, at = np.unique(ids, return_inverse=True)
    texts = tokenizer.decode_batch([[int(i)] for i in found], skip_special_tokens=False)
    ends = np.array([text.endswith("\n") for text in texts], bool)
    return np.concatenate([[0], np.flatnonzero(ends[at]) + 1]).astype(np.int64)


def scatter(
    text: Ids, starts: Int[np.ndarray, "lines"], inserts: Sequence[tuple[float, Ids]]
) -> Ids:
    """Put lines into a text, each before the line nearest to its depth.

    Args:
      text: what they are put into.
      starts: where its lines begin, rising.
      inserts: pairs of a depth, 0 for the beginning of the text and 1 for its end, and of ids.
    """
    places = np.append(starts[starts < len(text)], len(text))
    cuts = [int(places[np.argmin(np.abs(places - depth * len(text)))]) for depth, _ in inserts]
    parts, at = [], 0
    for i in sorted(range(len(inserts)), key=lambda i: (cuts[i], inserts[i][0])):
        parts += [text[at : cuts[i]], inserts[i][1]]
        at = cuts[i]
    return np.concatenate([*parts, text[at:]])
