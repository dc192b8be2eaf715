"""Text in and text out of one request: a folder's tokenizer, and text as tokens arrive.

A tokenizer.json is somebody else's program: its patterns may need forever, and the library panics
where it would raise. Every call into it goes through `_guarded`.
"""

import codecs
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders

from mmx.config import ModelConfig
from mmx.convert.bounded import printable, read_text
from mmx.convert.checkpoint import plain_file

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER = 64 << 20  # bytes
MAX_PROMPT = 16 << 20  # bytes of UTF-8
_UNKNOWN = "\ufffd"
# What names of special tokens become is a switch of the tokenizer, which threads may share.
_encoding = threading.Lock()
_PENDING = 8  # tokens that may wait for the rest of a character, where bytes are not known


def load_tokenizer(
    folder: Path, *, missing: str = "no such file; download the tokenizer"
) -> Tokenizer:
    """The tokenizer.json of a checkpoint folder, which neither cuts nor pads.

    Args:
      folder: nothing outside it is read.
      missing: what the message says where there is none.

    Raises:
      ValueError: it is missing, above 64 MiB, a link out of the folder, or no tokenizer.
    """
    file = plain_file(folder, TOKENIZER)
    text = read_text(file, most=MAX_TOKENIZER, missing=missing)
    tokenizer = _guarded(lambda: Tokenizer.from_str(text), f"{file}: not a tokenizer")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    text: str,
    config: ModelConfig,
    *,
    add_special_tokens: bool = True,
    names: Literal["tokens", "text"] = "tokens",
    max_bytes: int = MAX_PROMPT,
) -> list[int]:
    """Ids of a prompt.

    Args:
      tokenizer: see `load_tokenizer`.
      text: the prompt.
      config: of the model; its vocabulary bounds the ids.
      add_special_tokens: put those around it that the tokenizer was made to put; not where a chat
        template has written them.
      names: what names of special tokens in the text become: these tokens, or text like any other.
      max_bytes: of the text in UTF-8.

    Raises:
      ValueError: the text is too long or has lone surrogates, the tokenizer fails on it, or gives
        an id the model does not have.
    """
    # A character has one byte at least, so what is too long in characters need not be encoded.
    try:
        size = len(text) if len(text) > max_bytes else len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not Unicode text ({error.reason})") from None
    if size > max_bytes:
        raise ValueError(f"the prompt has {size:,} bytes; it must have at most {max_bytes:,}")

    def call() -> list[int]:
        with _encoding:
            tokenizer.encode_special_tokens = names == "text"
            # Not `encode`, which lets no other thread of the process run meanwhile.
            return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    ids = _guarded(call, "the tokenizer cannot encode the prompt")
    if ids and max(ids) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {max(ids)}; ids must be below the model's vocab_size "
            f"{config.vocab_size}, so the tokenizer is of another model"
        )
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones; bytes that are no UTF-8 become U+FFFD.

    Raises:
      ValueError: the tokenizer fails on them.
    """
    return _guarded(lambda: tokenizer.decode(list(ids)), "the tokenizer cannot decode")


def normalize(tokenizer: Tokenizer, text: str) -> str:
    """What the tokenizer's normalizer makes of a text before anything else.

    Raises:
      ValueError: it fails.
    """
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return text
    return _guarded(lambda: normalizer.normalize_str(text), "the tokenizer cannot normalize")


@dataclass
class TextStream:
    """Text of tokens as they arrive: each push gives what no later token can change.

    All pieces together are `decode` of all tokens, up to the first stop string. Byte-level
    tokenizers, as MiniMax's, are decoded byte by byte and so exactly; others over the last few
    tokens, which is exact where their decoder looks no further back. The cost is linear in the
    number of tokens.

    Attributes:
      tokenizer: whose ids are pushed.
      stop: strings that end the text. The first that is complete wins, wherever tokens end; of
        several complete at once the longest. It is cut off, and all after it.
      stopped: a stop string was found; whatever is pushed afterwards gives nothing.
    """

    tokenizer: Tokenizer
    stop: tuple[str, ...] = ()
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        kind = _Bytes if _is_bytewise(self.tokenizer) else _Window
        self._decoder = kind(self.tokenizer)
        self._steps = [_failures(text) for text in self.stop]
        self._matched = [0] * len(self.stop)  # characters of each that the text now ends with
        self._held = ""  # what may yet turn out to begin a stop string
        self._ended = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before; "" where none is.

        Raises:
          ValueError: the tokenizer fails on the tokens.
        """
        return "" if self._ended else self._scan(self._decoder.push(ids))

    def finish(self) -> str:
        """The text that was held back; the stream is at its end."""
        if self._ended:
            return ""
        piece = self._scan(self._decoder.finish())
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        self._ended = True
        return piece

    def _scan(self, piece: str) -> str:
        """Follow every stop string through new text, a character at a time (Knuth-Morris-Pratt)."""
        text = self._held + piece
        for place, character in enumerate(piece, len(self._held) + 1):
            found = 0
            for which, (stop, steps) in enumerate(zip(self.stop, self._steps, strict=True)):
                matched = self._matched[which]
                while matched and stop[matched] != character:
                    matched = steps[matched - 1]
                matched += stop[matched] == character
                self._matched[which] = matched
                if matched == len(stop):
                    found = max(found, matched)
            if found:
                self.stopped, self._ended, self._held = True, True, ""
                return text[: place - found]
        keep = len(text) - max(self._matched, default=0)
        self._held = text[keep:]
        return text[:keep]


class Spelling:
    """What single tokens stand for, special ones too.

    Exact for byte-level tokenizers; of others it is the text of the token alone, which may lack the
    space before a word.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._bytewise = _is_bytewise(tokenizer)

    def __call__(self, token: int) -> bytes:
        """The bytes of a token; of a special one, its name."""
        name = _name(self._tokenizer, token) or ""
        if token in self._special:
            return name.encode()
        return _spelled(name) if self._bytewise else decode(self._tokenizer, [token]).encode()


class _Bytes:
    """Text of a byte-level tokenizer: its tokens are bytes, spelled as printable characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self._utf8.decode(self._bytes(token)) for token in ids)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        name = _name(self._tokenizer, token)
        return b"" if name is None or token in self._special else _spelled(name)


class _Window:
    """Text of any tokenizer: the tokens of the last piece are decoded again with the new ones.

    The ones before give the decoder its context: a word's first token loses its space at the start
    of a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._context: list[int] = []
        self._pending: list[int] = []
        self._before = ""  # the text of the context

    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(self._step, ids))

    def finish(self) -> str:
        return self._release(self._text()) if self._pending else ""

    def _step(self, token: int) -> str:
        if token in self._special:
            return ""
        self._pending.append(token)
        text = self._text()
        if text.endswith(_UNKNOWN) and len(self._pending) < _PENDING:
            return ""
        # Nothing new, as of a token that is unknown: it may matter to the next one.
        if len(text) <= len(self._before) and len(self._pending) < _PENDING:
            return ""
        return self._release(text)

    def _text(self) -> str:
        return decode(self._tokenizer, self._context + self._pending)

    def _release(self, text: str) -> str:
        piece = text[len(self._before) :]
        self._context, self._pending = self._pending, []
        self._before = decode(self._tokenizer, self._context)
        return piece


def _guarded[Result](call: Callable[[], Result], what: str) -> Result:
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare Exception; a panic is not even that
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise ValueError(f"{what} ({reason})") from None


def _name(tokenizer: Tokenizer, token: int) -> str | None:
    return _guarded(lambda: tokenizer.id_to_token(token), "the tokenizer cannot decode")


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Bytes of text that one token can stand for; None where there is no bound to be seen.

    That is where a tokenizer drops or joins text before or after it looks tokens up.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        not _is_bytewise(tokenizer)
        or tokenizer.normalizer is not None
        or any(entry.lstrip or entry.rstrip for entry in added)
    ):
        return None
    return max(len(name.encode()) for name in tokenizer.get_vocab(with_added_tokens=True))


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of tokens that are no text."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, entry in added.items() if entry.special)


def _is_bytewise(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def _spelled(name: str) -> bytes:
    """The bytes of a byte-level token."""
    spelled = _byte_of_character()
    try:
        return bytes(spelled[character] for character in name)
    except KeyError:  # a token that was added is spelled as it reads
        return name.encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's spelling: Latin-1's visible characters stand for themselves, the other bytes
    are the characters from 256 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


def _failures(pattern: str) -> list[int]:
    """For each beginning of a pattern, the longest shorter beginning that it ends with."""
    steps, matched = [0], 0
    for character in pattern[1:]:
        while matched and pattern[matched] != character:
            matched = steps[matched - 1]
        matched += pattern[matched] == character
        steps.append(matched)
    return steps
