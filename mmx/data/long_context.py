"""Long documents for the extension of the context, and their shares (paper, section 4.3, table 6).

Long documents are rare in a small corpus, so they are made from what is there: neighbouring
documents joined to a length, and questions about facts that lie anywhere in a text of that length.
The facts are in the words of the source 'synthetic' (`embedded.py`), so that what a model has
learnt there at short distance is what it has to do at a long one.
"""

import functools
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx.data import tokenizer as bpe
from mmx.data.corpus import build_corpus
from mmx.data.facts import Draw, Ids, draw_facts, fact, filler, line_starts, question, scatter
from mmx.data.mixing import Weights
from mmx.data.parts import Recipe
from mmx.data.shards import (
    Manifest,
    ShardReader,
    file_sha256,
    read_lengths,
    temporary,
    write_atomic,
)

SHORT_TEXT = "short-text"
# Shares of short, medium and long text in the stages of 128K, 512K and 1M tokens (table 6). Short
# is below a quarter of the first stage's length, medium up to that length, long above.
LENGTH_MIXES = ((0.30, 0.70, 0.00), (0.35, 0.35, 0.30), (0.30, 0.30, 0.40))
QA_SHARE, QA_PART = 0.1, 0.2  # of the tokens in the last part of each stage

_MADE = 1  # version of what is generated
_SHORTEST = 128  # room for some facts, questions and text between them
_FACTS = 4, 16  # of a document; there are sixteen places


def long_text(length: int) -> str:
    """The source of joined documents of this length."""
    return f"long-text-{length}"


def long_qa(length: int) -> str:
    """The source of questions about facts in texts of this length."""
    return f"long-qa-{length}"


# ---------------------------------------------------------------- shares


def extension_weights(
    lengths: Sequence[int],
    samples: Sequence[int],
    *,
    mixes: Sequence[tuple[float, float, float]] = LENGTH_MIXES,
    transition: float = 0.05,
) -> tuple[Weights, ...]:
    """Shares of the sources of `build_long_corpus` in each stage.

    A stage goes linearly from the shares at the end of the stage before to its own, and in its last
    fifth to 90 % of these and 10 % questions of its own length.

    Args:
      lengths: tokens a row in each stage, rising.
      samples: rows of each stage, at least 5; samples of the result count from its beginning.
      mixes: shares of short, medium and long text in each stage.
      transition: part of a stage that either change takes, at most 0.2.

    Raises:
      ValueError: not one of each for every stage, or an argument out of range.
    """
    _check_lengths(lengths)
    if not len(lengths) == len(samples) == len(mixes):
        raise ValueError(
            f"{len(lengths)} lengths, {len(samples)} numbers of samples and {len(mixes)} mixes; "
            "give one of each for every stage"
        )
    if min(samples) < 5 or not 0 <= transition <= QA_PART:
        raise ValueError(
            f"samples are {tuple(samples)} and transition is {transition}; a stage needs at least "
            f"5 samples, and the transition must be in [0, {QA_PART}]"
        )
    staged, before = [], None
    for length, number, (short, medium, long) in zip(lengths, samples, mixes, strict=True):
        mix = {SHORT_TEXT: short, long_text(lengths[0]): medium}
        # In the first stage text of its length is what the paper calls medium.
        mix[long_text(length)] = mix.get(long_text(length), 0.0) + long
        total = sum(mix.values())
        with_qa = {name: (1 - QA_SHARE) * share / total for name, share in mix.items()}
        with_qa[long_qa(length)] = QA_SHARE
        own = ((0, mix),) if before is None else ((0, before), (1, mix))
        last = number - round(QA_PART * number)
        staged.append(Weights((*own, (last, with_qa)), transition=int(transition * number)))
        before = with_qa
    return tuple(staged)


# ---------------------------------------------------------------- the corpus


class _Making(NamedTuple):
    """All that determines the documents of one input file.

    `amount` is of documents, or of tokens for short text; `base` is the base's fingerprint.
    """

    source: str
    kind: str
    length: int
    amount: int
    seed: int
    base: str

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([_MADE, *self]).encode()).hexdigest()

    def draw(self, number: int) -> Draw:
        # `random` of a seeded generator is alike in all Python versions; its other methods are not.
        return random.Random(f"mmx {self.source} {self.seed} {number}").random


def build_long_corpus(
    base: Path,
    out: Path,
    *,
    lengths: Sequence[int],
    documents: int,
    seed: int,
    workers: int,
    wait: bool = False,
) -> Manifest:
    """Build a corpus of short and long documents from the train split of another one.

    Its sources are `short-text`, documents cut at lines to a quarter of the first length;
    `long-text-N`, neighbouring documents joined to N tokens; and `long-qa-N`, texts of N tokens,
    every second one generated, with facts all over them and the questions at the end. No document
    has more than N tokens, its end token included, and all but a line of them; the tokenizer is the
    base's. There is no held-out split: that of the base stays unseen.

    What is done is kept, as in `build_corpus`: the bytes depend on the base and the arguments, not
    on `workers` or interruptions. With `workers > 1` scripts need `if __name__ == "__main__":`.

    Args:
      base: a corpus folder.
      out: another folder; made where it is missing. The text is kept below `input`.
      lengths: N, in tokens, rising, at least 128.
      documents: of each length and kind; short text has at most as many tokens as all long ones.
      seed: of all choices.
      workers: processes.
      wait: see `build_corpus`.

    Raises:
      ValueError: an argument out of range, no corpus in `base`, or see `build_corpus`.
      OSError: the folder cannot be written to.
    """
    _check_lengths(lengths)
    if documents < 1:
        raise ValueError(f"documents is {documents}; at least one of each kind is needed")
    if out.resolve() == base.resolve():
        raise ValueError(f"{out}: is the base itself; give another folder")
    manifest = Manifest.load(base)
    # Facts of generated documents would contradict those that are put between them.
    texts = _Texts(manifest, [name for name in manifest.sources if name != "synthetic"])
    made_from = manifest.fingerprint("train")
    makings = [_Making(SHORT_TEXT, "short", lengths[0] // 4, documents * sum(lengths), seed,
                       made_from)]  # fmt: skip
    for kind, name in (("text", long_text), ("qa", long_qa)):
        makings += [
            _Making(name(length), kind, length, documents, seed, made_from) for length in lengths
        ]
    folder = out / "input"
    folder.mkdir(parents=True, exist_ok=True)
    for making in makings:
        _make(folder, making, _Texts(manifest) if making.kind == "short" else texts)
    inputs = tuple(f"{making.source}={folder / making.source}.jsonl" for making in makings)
    end = texts.tokenizer.id_to_token(manifest.end_id)
    recipe = Recipe(inputs, tokenizer=manifest.tokenizer_file, end_token=end, heldout=0.0)
    return build_corpus(recipe, out, workers=workers, wait=wait)


def _check_lengths(lengths: Sequence[int]) -> None:
    if not lengths or lengths[0] < _SHORTEST or list(lengths) != sorted(set(lengths)):
        raise ValueError(
            f"lengths are {tuple(lengths)}; they must rise, from {_SHORTEST} tokens or more"
        )


def _make(folder: Path, making: _Making, texts: "_Texts") -> None:
    """Write the jsonl file of a source, then its marker, unless both are there."""
    file, marker = folder / f"{making.source}.jsonl", folder / f"{making.source}.json"
    try:
        done = json.loads(marker.read_bytes())
        if done["fingerprint"] == making.fingerprint() and done["sha256"] == file_sha256(file):
            return
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # to be made
    made = _short_texts(making, texts) if making.kind == "short" else _fitted(making, texts)
    draft = temporary(file)
    with draft.open("w", encoding="utf-8") as lines:
        for number, text in enumerate(made):
            row = {"id": f"{making.source}:{number}", "text": text}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    draft.replace(file)
    done = {"fingerprint": making.fingerprint(), "sha256": file_sha256(file)}
    write_atomic(marker, json.dumps(done).encode())


class _Texts:
    """Documents of a corpus' train split, as ids without the token that ends them."""

    def __init__(self, manifest: Manifest, sources: Sequence[str] | None = None):
        self.tokenizer = bpe.load_tokenizer(manifest.tokenizer_file)
        wanted = manifest.sources if sources is None else sources
        folder = manifest.folder
        shards = [shard for shard in manifest.splits["train"] if shard.source in wanted]
        if not shards:
            raise ValueError(f"{folder}: no text to train on but 'synthetic'; build it from more")
        lengths = [read_lengths(folder, shard) for shard in shards]
        self._readers = [ShardReader(folder, shard) for shard in shards]
        self._firsts = np.cumsum([0, *(len(part) for part in lengths)])
        self.lengths = np.concatenate(lengths)
        self.ends = np.cumsum(self.lengths, dtype=np.int64)

    def __getitem__(self, document: int) -> Ids:
        shard = int(np.searchsorted(self._firsts, document, side="right")) - 1
        length = int(self.lengths[document])
        index = document - int(self._firsts[shard])
        return self._readers[shard].read(index, length=length).ids[:-1]

    def stretch(self, draw: Draw, tokens: int) -> Ids:
        """So many tokens at least: neighbouring documents, from a random line of a random one."""
        place = int(draw() * self.ends[-1])
        document = int(np.searchsorted(self.ends, place, side="right"))
        ids = self[document]
        # The beginning of a document, where that is long enough to choose from within it.
        latest = max(0, len(ids) - tokens)
        starts = line_starts(self.tokenizer, ids)
        starts = starts[starts <= latest]
        parts = [ids[starts[int(draw() * len(starts))] :]]
        size, between = len(parts[0]), np.tile(bpe.encode(self.tokenizer, "\n"), 2)
        while size < tokens:
            document = (document + 1) % len(self.lengths)
            parts += [between, self[document]]
            size += len(between) + len(parts[-1])
        return np.concatenate(parts)

    def cut(self, ids: Ids, tokens: int) -> Ids:
        """At most so many tokens from the beginning, whole lines unless the first is longer."""
        if len(ids) <= tokens:
            return ids
        # A line break before indentation is one token with it: the cut is before that token.
        latest = line_starts(self.tokenizer, ids[:tokens])[-1]
        for place in range(tokens, latest, -1):
            if self.decode(ids[place : place + 1]).startswith("\n"):
                return ids[:place]
        return ids[: latest or tokens]

    def decode(self, ids: Ids) -> str:
        """The text, without parts of a character at either end."""
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text.strip("\N{REPLACEMENT CHARACTER}")


def _short_texts(making: _Making, texts: _Texts) -> Iterator[str]:
    """Documents in random order, in pieces, until there are `making.amount` tokens."""
    order = list(range(len(texts.lengths)))
    draw, left = making.draw(0), making.amount
    while order and left > 0:
        other = int(draw() * len(order))
        order[other], order[-1] = order[-1], order[other]
        rest = texts[order.pop()]
        while len(rest) and left > 0:
            piece = texts.cut(rest, making.length - 1)
            rest = rest[len(piece) :]
            left -= len(piece)
            yield texts.decode(piece)


def _fitted(making: _Making, texts: _Texts) -> Iterator[str]:
    """Documents of at most `making.length` tokens, the one that ends them included."""
    one = {"text": _joined, "qa": _asked}[making.kind]
    for number in range(making.amount):
        room = making.length - 1
        while True:
            text = texts.decode(one(making.draw(number), texts, room, number))
            # Where parts were joined, tokens of the whole may be others than those of the parts.
            excess = len(bpe.encode(texts.tokenizer, text)) - (making.length - 1)
            if excess <= 0:
                break
            room -= excess
        yield text


def _joined(draw: Draw, texts: _Texts, tokens: int, number: int) -> Ids:
    del number
    return texts.cut(texts.stretch(draw, tokens), tokens)


def _asked(draw: Draw, texts: _Texts, tokens: int, number: int) -> Ids:
    """Generated text or, in every second document, that of the corpus; facts in it; questions."""
    least, most = _FACTS
    encode = functools.partial(bpe.encode, texts.tokenizer)
    # A fact and its question have at most 77 characters, each of them a token at worst.
    count = min(least + int(draw() * (most + 1 - least)), max(1, tokens // 96))
    facts = draw_facts(draw, count)
    asked = facts[:]
    for last in range(count - 1, 0, -1):
        other = int(draw() * (last + 1))
        asked[last], asked[other] = asked[other], asked[last]
    end = encode("".join(f"{question(place)}{value}.\n" for place, value in asked))
    inserts = [((i + draw()) / count, encode(fact(*f) + "\n")) for i, f in enumerate(facts)]
    line_break = encode("\n")
    room = tokens - len(line_break) - len(end) - sum(len(ids) for _, ids in inserts)
    pool = texts.stretch(draw, room) if number % 2 else filler(draw, texts.tokenizer, room)
    text = np.append(texts.cut(pool, room), line_break)
    return np.concatenate([scatter(text, line_starts(texts.tokenizer, text), inserts), end])
