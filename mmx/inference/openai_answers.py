"""Answers in OpenAI's form: events of an engine in, objects of JSON out."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmx.inference.openai_json import ApiError
from mmx.inference.openai_requests import Asked
from mmx.inference.requests import Event, TokenLogprob
from mmx.inference.text import Spelling

_LOWEST = -9999.0  # JSON has no infinity; OpenAI's stand-in for it


@dataclass
class Answer:
    """What one request gets, in one piece (`whole`) or as it comes (`opening`, `chunk`, `closing`).

    Attributes:
      asked, model: the request, and the name of the model.
      spelling: what tokens stand for, for log-probabilities.
    """

    asked: Asked
    model: str
    spelling: Spelling
    created: int = field(default_factory=lambda: int(time.time()))
    _generated: int = 0
    _offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chat = self.asked.kind == "chat"
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, events: Mapping[int, Sequence[Event]]) -> dict[str, Any]:
        """The answer from all events of each of its choices.

        Raises:
          ApiError: one ended with an error.
        """
        choices = []
        for index in sorted(events):
            self._count(events[index])
            choice = self._choice(index, events[index])
            text = "".join(event.text for event in events[index])
            if self._chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            if self.asked.token_ids:
                choice["prompt_token_ids"] = self.asked.prompts[index // self.asked.n].tolist()
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    def opening(self) -> bytes:
        """What a stream begins with: in a chat, who speaks."""
        if not self._chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        count = len(self.asked.prompts) * self.asked.n
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(count)
        ]
        return b"".join(self._part([choice]) for choice in choices)

    def chunk(self, index: int, event: Event) -> bytes:
        """One event of a stream; nothing where it has nothing to say.

        Raises:
          ApiError: the choice ended with an error.
        """
        self._count([event])
        choice = self._choice(index, [event])
        silent = not (event.text or event.finish_reason)
        if silent and not (self.asked.logprobs or self.asked.token_ids):
            return b""
        if self._chat:
            choice["delta"] = {"content": event.text} if event.text else {}
        else:
            choice["text"] = event.text
        return self._part([choice])

    def closing(self) -> bytes:
        """What a stream ends with: the usage, where it was asked for, and OpenAI's end mark."""
        usage = self._part([], self._usage()) if self.asked.include_usage else b""
        return usage + b"data: [DONE]\n\n"

    # ------------------------------------------------------------ parts

    def _count(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.finish_reason == "error":
                raise ApiError(500, event.error or "the answer failed", code="engine_error")
            self._generated += event.token is not None

    def _usage(self) -> dict[str, int]:
        prompt = sum(prompt.size for prompt in self.asked.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self.created, "model": self.model}

    def _part(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        part = {**self._head(kind), "choices": choices}
        if self.asked.include_usage:
            part["usage"] = usage
        return sse(part)

    def _choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """All of a choice but its text."""
        reason = events[-1].finish_reason
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
        if self.asked.logprobs:
            found = [event.logprob for event in events if event.logprob is not None]
            choice["logprobs"] = (
                {"content": [self._chat_logprob(one) for one in found], "refusal": None}
                if self._chat
                else self._logprobs(index, found)
            )
        if self.asked.token_ids:
            choice["token_ids"] = [event.token for event in events if event.token is not None]
        return choice

    def _chat_logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.spelling(token)
        text = spelled.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(spelled)}

    def _logprobs(self, index: int, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The older form: lists beside each other, and offsets as if tokens were whole texts."""
        offset, offsets = self._offsets.get(index, 0), []
        for one in found:
            offsets.append(offset)
            offset += len(self.spelling(one.token).decode(errors="replace"))
        self._offsets[index] = offset
        tops: list[dict[str, float]] = []
        for one in found:
            top: dict[str, float] = {}
            for token, value in one.top:  # two tokens may have one spelling: the likelier stays
                top.setdefault(self._name(token), _finite(value))
            tops.append(top)
        return {
            "tokens": [self._name(one.token) for one in found],
            "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """A token in the older form: parts of characters would all be the same text."""
        spelled = self.spelling(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def sse(part: Mapping[str, Any]) -> bytes:
    """One server-sent event. What is no ASCII is escaped, so no text can end the line."""
    return b"data: " + json.dumps(part, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # NaN as well
