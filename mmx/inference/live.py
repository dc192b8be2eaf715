"""One request while an engine has it: where it stands, and what it has been given."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mmx.inference.pool import RowMemory
from mmx.inference.requests import Event, FinishReason, Sampling, TokenLogprob
from mmx.inference.rows import Chosen, Rows
from mmx.inference.text import TextStream

State = Literal["waiting", "reading", "running", "away"]


@dataclass(eq=False)
class Live:
    """A request and its place.

    Attributes:
      number, prompt, sampling: as submitted.
      ends: ids that end it.
      text: what turns its tokens into text, of an engine with a tokenizer.
      state: 'reading' its prompt, 'running', or 'away': moved to the host.
      row, pages: what it holds; -1 and none where it is not at work.
      read: tokens of the prompt that were read, or are by what is under way.
      issued: tokens it has been given, or will be by what is under way, at most.
      memory, place: while away, what its row and pages held, and its entries of the batch.
      reason: why it ended.
    """

    number: int
    prompt: np.ndarray
    sampling: Sampling
    ends: frozenset[int]
    text: TextStream | None
    state: State = "waiting"
    row: int = -1
    pages: list[int] = field(default_factory=list)
    read: int = 0
    issued: int = 0
    memory: RowMemory | None = None
    place: Rows | None = None
    reason: FinishReason | None = None

    @property
    def reach(self) -> int:
        """Tokens whose keys and values are in the pages; the last token given is not read yet."""
        return self.read + max(self.issued - 1, 0)

    @property
    def decodes(self) -> bool:
        """Whether more tokens are to be asked for; never of one that has ended."""
        return (
            self.reason is None
            and self.state == "running"
            and self.issued < self.sampling.max_new_tokens
        )

    @property
    def longest(self) -> int:
        """Tokens it can come to, prompt and output."""
        return self.prompt.size + self.sampling.max_new_tokens

    def page_row(self, length: int) -> np.ndarray:
        """Its entry of a page table with so many columns."""
        row = np.zeros(length, np.int32)
        row[: len(self.pages)] = self.pages
        return row

    def event(self, chosen: Chosen, step: int, column: int) -> Event:
        """The token of a step and column, and whether it ends the request."""
        token = int(chosen.tokens[step, column])
        reason: FinishReason | None = None
        if not chosen.running[step, column]:
            reason = "stop" if token in self.ends else "length"
        logprob = None
        if self.sampling.logprobs is not None:
            ids = chosen.top_tokens[step, column, : self.sampling.logprobs]
            values = chosen.top_logprobs[step, column, : self.sampling.logprobs]
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            logprob = TokenLogprob(token, float(chosen.logprobs[step, column]), top)
        try:
            text, reason = self._text(token, reason)
        except ValueError as error:
            return Event(self.number, token, logprob, "", "error", str(error))
        return Event(self.number, token, logprob, text, reason)

    def _text(self, token: int, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        if self.text is None:
            return "", reason
        piece = "" if reason == "stop" else self.text.push([token])
        if self.text.stopped:
            return piece, "stop"
        if reason:
            piece += self.text.finish()
        return piece, "stop" if self.text.stopped else reason
