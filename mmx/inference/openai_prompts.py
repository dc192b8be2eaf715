"""Prompts of OpenAI's requests as ids: texts, ids, conversations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmx.config import ModelConfig
from mmx.convert.bounded import printable
from mmx.data.tokenizer import BEGIN
from mmx.inference.chat import MAX_MESSAGES, ChatTemplate, encode_chat
from mmx.inference.openai_json import ApiError, bad
from mmx.inference.requests import check_prompt
from mmx.inference.text import encode

_ROLES = ("system", "developer", "user", "assistant")
# Of a message, beside role and content: a name is not shown to the model, the others must be null.
_MESSAGE = {"role", "content", "name", "refusal", "tool_calls", "function_call", "audio"}


@dataclass(frozen=True)
class Served:
    """The model that is served, as far as a request must know it.

    Attributes:
      name: by which requests ask for it.
      max_seq_len: tokens of prompt and answer together.
      max_answers: that one request may ask for.
      max_characters: of a prompt: more are more tokens than fit, whichever they are. None where
        the tokenizer sets no bound.
      created: when, in seconds since 1970.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    max_seq_len: int
    max_answers: int
    max_characters: int | None
    created: int


def completion_prompts(fields: Mapping[str, Any], n: int, served: Served) -> list[np.ndarray]:
    """Prompts of a completion as int32 ids: a text, ids, or a list of either.

    Raises:
      ApiError: none, something else, too many for n answers to each, or too long.
    """
    given = fields.get("prompt")
    if isinstance(given, list) and given:
        if all(type(one) is int for one in given):
            given = [given]
    elif isinstance(given, str):
        given = [given]
    else:
        raise bad("prompt", "prompt must be a text, a list of token ids, or a list of either")
    if len(given) * n > served.max_answers:
        param = "prompt" if len(given) > served.max_answers else "n"
        asked = f"{len(given)} prompts and n={n}" if len(given) > 1 else f"n is {n}"
        raise bad(param, f"{asked}; at most {served.max_answers} answers")
    return [_prompt(one, served) for one in given]


def _prompt(given: object, served: Served) -> np.ndarray:
    if isinstance(given, str):
        _check_length([given], served, "prompt")
        try:
            ids = encode(served.tokenizer, given, served.config)
        except ValueError as error:
            raise bad("prompt", str(error)) from None
    elif isinstance(given, list) and all(type(one) is int for one in given):
        ids = given
    else:
        raise bad("prompt", "prompt must be a text, a list of token ids, or a list of either")
    if len(ids) >= served.max_seq_len:
        raise _too_long("prompt", f"{len(ids)} tokens", served)
    try:
        return check_prompt(ids, served.config)
    except (ValueError, OverflowError) as error:
        raise bad("prompt", str(error)) from None


def chat_prompt(fields: Mapping[str, Any], n: int, served: Served) -> np.ndarray:
    """A conversation as int32 ids. Names of control tokens in its messages stay text.

    Raises:
      ApiError: no messages, one that is not text, a template that refuses them, or too long.
    """
    template, tokenizer = served.template, served.tokenizer
    if template.source is None and tokenizer.token_to_id(BEGIN) is None:
        raise bad("messages", "this model has no chat template; use /v1/completions", "no_chat")
    given = fields.get("messages")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_MESSAGES:
        raise bad("messages", f"messages must be a list of 1 to {MAX_MESSAGES} messages")
    if n > served.max_answers:
        raise bad("n", f"n is {n}; at most {served.max_answers} answers")
    messages = [_message(number, message) for number, message in enumerate(given)]
    texts = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    _check_length(texts, served, "messages")
    try:
        ids = encode_chat(template, tokenizer, messages, served.config)
    except ValueError as error:
        raise bad("messages", str(error)) from None
    if len(ids) >= served.max_seq_len:
        raise _too_long("messages", f"{len(ids)} tokens", served)
    return check_prompt(ids, served.config)


def _message(number: int, given: object) -> dict[str, Any]:
    """Role and content of a message; the rest must say nothing."""
    where = f"messages[{number}]"
    if not isinstance(given, dict):
        raise bad(where, f"{where} must be an object with a role and a content")
    for name, value in given.items():
        if name not in _MESSAGE:
            name = printable(name)
            raise bad(f"{where}.{name}", f"{name} is no field of a message", "unknown_field")
        if value is not None and name not in ("role", "content", "name"):
            raise bad(f"{where}.{name}", f"{name} is not supported", "unsupported")
    role, content = given.get("role"), given.get("content")
    if role not in _ROLES:
        raise bad(f"{where}.role", f"role must be one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        parts = content if isinstance(content, list) and content else [None]
        for part in parts:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise bad(
                    f"{where}.content",
                    'content must be a text or a list of {"type": "text", "text": ...}',
                )
    return {"role": "system" if role == "developer" else role, "content": content}


def _check_length(texts: list[str], served: Served, param: str) -> None:
    """Refuse what must be too long before it is encoded."""
    size, most = sum(map(len, texts)), served.max_characters
    if most is not None and size > most:
        raise _too_long(param, f"{size:,} characters", served)


def _too_long(param: str, what: str, served: Served) -> ApiError:
    return bad(
        param,
        f"{param} has {what}; at most {served.max_seq_len - 1} tokens can be read",
        "context_length_exceeded",
    )
