"""A conversation with one model: each turn is rendered whole, and read from where it is new.

The rendered conversation begins as it did a turn before, so the engine finds the prefix it has kept
and reads on from there (`snapshots`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from mmx.data.tokenizer import BEGIN
from mmx.inference.chat import ChatTemplate, encode_chat
from mmx.inference.engine import Engine
from mmx.inference.requests import FinishReason, Sampling


@dataclass
class Conversation:
    """Messages so far, and an engine that nobody else uses.

    Attributes:
      engine: with a tokenizer.
      template: see `load_chat_template`.
      sampling: of every answer; `max_new_tokens` is cut to the room there is.
      system: the first message, where there is one.
      messages: of 'user' and 'assistant' in turn.
      finish_reason: of the last answer.

    Raises:
      ValueError: there is no chat template that fits.
    """

    engine: Engine
    template: ChatTemplate
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        if self.template.source is None and self._tokenizer.token_to_id(BEGIN) is None:
            raise ValueError(
                f"the tokenizer has no {BEGIN} and the folder no chat template; use mmx generate"
            )

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    def prompt(self, text: str) -> list[int]:
        """Ids of the conversation with one more message of the user, up to the answer.

        Raises:
          ValueError: as `encode_chat`.
        """
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*before, *self.messages, {"role": "user", "content": text}]
        return encode_chat(self.template, self._tokenizer, messages, self.engine.config)

    def ask(self, text: str, *, ended: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer to a message as it comes. Both are part of the conversation afterwards.

        Args:
          text: of the user.
          ended: asked between two steps; once it is true the answer ends as it is.

        Raises:
          ValueError: as `prompt`; there is no room; the tokenizer fails on a token. The
            conversation is as before then.
        """
        ids = self.prompt(text)
        room = self.engine.max_seq_len - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens; there is room for "
                f"{self.engine.max_seq_len} with the answer"
            )
        limit = min(self.sampling.max_new_tokens, room)
        number = self.engine.submit(ids, dataclasses.replace(self.sampling, max_new_tokens=limit))
        answer, reason = [], None
        try:
            while reason is None and not ended():
                for event in self.engine.step():
                    if event.request != number:
                        continue  # what was under way when an answer was ended
                    if event.error:
                        raise ValueError(event.error)
                    reason = event.finish_reason
                    if event.text:
                        answer.append(event.text)
                        yield event.text
        finally:
            self.engine.cancel(number)
        self.finish_reason = reason or "cancelled"
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "".join(answer)},
        ]

    def reset(self) -> None:
        """Begin anew, after the system message."""
        self.messages.clear()
