"""Byte-level BPE: train one, or take any tokenizer.json; text to ids."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmx.convert.bounded import printable

# MiniMax's names of the tokens around a message; the second one also ends a document.
BEGIN, END = "<beginning_of_sentence>", "<end_of_sentence>"
SPECIAL_TOKENS = (END, BEGIN)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
END_TOKENS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")

# Longer texts are encoded in parts: an encoding takes some hundred bytes a token meanwhile.
_PART_CHARACTERS = 1 << 20


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: any bytes can be encoded, digits are single tokens.

    The result depends on the texts alone, not on their order or on threads.

    Args:
      texts: the sample.
      vocab_size: tokens at most, special ones and the 256 bytes included.

    Raises:
      ValueError: `vocab_size` leaves no room for the bytes.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size}; 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {SMALLEST_VOCAB}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(file: str | Path) -> Tokenizer:
    """Read a tokenizer.json, without what it says about cutting and padding texts.

    Raises:
      ValueError: it is missing or not a tokenizer.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a tokenizer.json is wanted")
    tokenizer = _guarded(lambda: Tokenizer.from_file(str(file)), f"{file}: not a tokenizer")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def without_limits(data: bytes) -> bytes:
    """A tokenizer.json that neither cuts nor pads: the same bytes, unless it says that it does.

    Whoever reads the copy in a corpus, with whatever library, then gets the ids of the shards.
    """
    content = json.loads(data)
    limits = [name for name in ("truncation", "padding") if content.get(name) is not None]
    if not limits:
        return data
    return json.dumps(content | dict.fromkeys(limits), ensure_ascii=False, indent=2).encode()


def vocab_size(tokenizer: Tokenizer) -> int:
    """The highest id plus one: what an embedding needs, also where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_id(tokenizer: Tokenizer, token: str | None = None) -> int:
    """The id of the token that ends a document.

    Args:
      tokenizer: any.
      token: its text; None looks for the usual ones (`END_TOKENS`).

    Raises:
      ValueError: the tokenizer has none of them.
    """
    for name in END_TOKENS if token is None else (token,):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    if token is None:
        raise ValueError(
            f"the tokenizer has none of {', '.join(END_TOKENS)}; name the token that ends a "
            "document with --end-token"
        )
    raise ValueError(f"the tokenizer has no token {token!r} to end a document with")


def encode(tokenizer: Tokenizer, text: str) -> UInt32[np.ndarray, "T"]:
    """Ids of a text. Names of special tokens in it are plain text and give no special id.

    Texts above 2^20 characters are encoded in parts that end with a line, where there is one.

    Raises:
      ValueError: the tokenizer fails, as one does that has no token for what it does not know.
    """
    tokenizer.encode_special_tokens = True

    def call() -> list[list[int]]:
        return [tokenizer.encode(part, add_special_tokens=False).ids for part in _parts(text)]

    parts = _guarded(call, "the tokenizer cannot encode the text")
    return np.array([i for part in parts for i in part] if len(parts) > 1 else parts[0], np.uint32)


def _guarded[Result](call: Callable[[], Result], what: str) -> Result:
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare Exception; a panic is not even that
        raise ValueError(f"{what} ({printable(str(error)) or type(error).__name__})") from None


def _parts(text: str) -> list[str]:
    parts, start = [], 0
    while len(text) - start > _PART_CHARACTERS:
        stop = text.rfind("\n", start, start + _PART_CHARACTERS) + 1
        stop = stop if stop > start else start + _PART_CHARACTERS
        parts.append(text[start:stop])
        start = stop
    return [*parts, text[start:]]
