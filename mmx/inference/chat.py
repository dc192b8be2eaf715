"""A conversation as one prompt: the chat template of a checkpoint folder, or MiniMax-01's own.

A template is a program of somebody else. It runs in jinja2's sandbox in a process of its own
(`chat_process`), which is ended when it takes too long or too much.
"""

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from mmx.config import ModelConfig
from mmx.convert.bounded import printable, read_text
from mmx.convert.checkpoint import plain_file, read_json
from mmx.data.tokenizer import BEGIN, END
from mmx.inference.chat_process import ask
from mmx.inference.text import encode, normalize

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE = 1 << 20  # bytes
MAX_MESSAGES = 10_000
MAX_TEXT = 16 << 20  # characters of all messages, and of what is rendered
_MEMORY = 1 << 30  # bytes of the process that renders
# A template may make a token's name of a role, as <|user|>: no other words get that far.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# The headers of MiniMax-Text-01 and MiniMax-VL-01, by role.
_HEADERS = {
    "system": "system ai_setting=assistant",
    "user": "user name=user",
    "assistant": "ai name=assistant",
}


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes a prompt.

    Attributes:
      source: a jinja2 template; None is MiniMax-01's format.
      bos_token, eos_token: what the template knows by these names.
      file: where it is from, for messages.
    """

    source: str | None = None
    bos_token: str = BEGIN
    eos_token: str = END
    file: str = "the chat template"


def load_chat_template(folder: Path) -> ChatTemplate:
    """The template of a folder: chat_template.jinja, else what tokenizer_config.json says.

    A folder with neither has MiniMax-01's format.

    Raises:
      ValueError: a file is too large, a link out of the folder, or not what it should be.
    """
    fields: dict[str, Any] = {}
    if _is_there(folder / TOKENIZER_CONFIG):
        fields = read_json(folder, TOKENIZER_CONFIG)
    file, source = folder / TOKENIZER_CONFIG, _default(fields.get("chat_template"))
    if _is_there(folder / TEMPLATE):
        file = plain_file(folder, TEMPLATE)
        source = read_text(file, most=MAX_TEMPLATE)
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{file}: chat_template is a {type(source).__name__}; a text is wanted")
    if source is not None and len(source) > MAX_TEMPLATE:
        raise ValueError(f"{file}: chat_template has more than {MAX_TEMPLATE:,} characters")
    tokens = {}
    for name, usual in (("bos_token", BEGIN), ("eos_token", END)):
        value = fields.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        tokens[name] = value if isinstance(value, str) else usual
    return ChatTemplate(source, file=str(file), **tokens)


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    max_characters: int = MAX_TEXT,
    seconds: float = 5.0,
) -> str:
    """The text of a conversation; `encode_chat` makes ids of it.

    Args:
      template: see `load_chat_template`.
      messages: each has a 'role' and a 'content', a text or a list of
        {'type': 'text', 'text': ...}; whichever a template expects is what it gets.
      add_generation_prompt: end with the header of the answer.
      max_characters: of the messages together, and of the prompt.
      seconds: that a template may take.

    Raises:
      ValueError: messages that are none or too long; a template that fails, reaches for what is not
        its own, or needs more than it may. One line.
    """
    plain = _checked(messages, max_characters)
    if template.source is None:
        text = _minimax(plain, add_generation_prompt)
        if len(text) > max_characters:
            raise ValueError(f"the prompt has more than {max_characters:,} characters")
        return text
    answer = _rendered(template, plain, add_generation_prompt, max_characters, seconds)
    if "text" not in answer:
        raise _failure(template, answer)
    return answer["text"]


def check_template(template: ChatTemplate, *, seconds: float = 5.0) -> None:
    """Refuse a template that can render no conversation, before a model is loaded for it.

    One that refuses a conversation itself (`raise_exception`), or lacks what another one may have,
    is not refused.

    Raises:
      ValueError: one line, as of `render_chat`, and what to do.
    """
    if template.source is None:
        return
    user, system, answer = ({"role": r, "content": r} for r in ("user", "system", "assistant"))
    for messages in ([user], [system, user], [user, answer, user], [system, user, answer, user]):
        found = _rendered(template, messages, True, MAX_TEXT, seconds)
        if "text" in found or found.get("kind") == "refused":
            return
        if found.get("kind") != "undefined":
            break
    failure = _failure(template, found)
    raise ValueError(f"{failure}; mend it, or take it away for MiniMax-01's own format")


def _rendered(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    most: int,
    seconds: float,
) -> dict[str, str]:
    """What the process that renders answers: a text, or an error and its kind."""
    question = {
        "template": template.source,
        "variables": {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": template.bos_token,
            "eos_token": template.eos_token,
        },
        "most": most,
        "seconds": math.ceil(seconds),
        "memory": _MEMORY,
    }
    return ask(question, seconds)


def _failure(template: ChatTemplate, answer: Mapping[str, str]) -> ValueError:
    reason = printable(" ".join(answer["error"].split()))
    return ValueError(f"{template.file}: the chat template fails ({reason})")


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    config: ModelConfig,
    *,
    max_characters: int = MAX_TEXT,
    seconds: float = 5.0,
) -> list[int]:
    """Ids of a conversation up to the answer; its control tokens come from the template alone.

    They are those of the rendered text as a whole, unless a message would add a control token to
    it by a name or a part of one. Then the template's text and such messages are encoded apart,
    and a name in a message is text like any other.

    Args:
      template, messages, max_characters, seconds: see `render_chat`; a template is rendered once
        more where a message looks as if it named a control token.
      tokenizer, config: see `mmx.inference.text.encode`.

    Raises:
      ValueError: as `render_chat` and `encode`; a role that is not known; a message that names a
        control token where the template changes it, or where the tokenizer cannot write it as text.
    """
    plain = _checked(messages, max_characters)
    for number, message in enumerate(plain):
        if message["role"] not in ROLES:
            role = printable(repr(message["role"]))
            raise ValueError(f"message {number} has role {role}; it must be in {', '.join(ROLES)}")

    def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
        return render_chat(template, messages, max_characters=max_characters, seconds=seconds)

    def ids(text: str, names: Literal["tokens", "text"] = "tokens") -> list[int]:
        most = 4 * max_characters  # a character has 4 bytes of UTF-8 at most
        return encode(
            tokenizer, text, config, add_special_tokens=False, names=names, max_bytes=most
        )

    text = rendered(plain)
    whole = ids(text)
    control = _control_tokens(template, tokenizer, config)
    word = secrets.token_hex(16)
    marked, taken = _marked(plain, tokenizer, control, word)
    if not taken:
        return whole
    remedy = "write the name of that token in another way"
    pieces = _pieces(text, re.split(f"{word}n([0-9]+)n", rendered(marked)), taken)
    if pieces is None:
        raise ValueError(
            f"a message names a control token, and the chat template changes it; {remedy}"
        )
    made = [i for piece, ours in pieces if not ours for i in ids(piece) if i in control]
    if made == [i for i in whole if i in control]:
        return whole
    apart = [ids(piece, "text" if ours else "tokens") for piece, ours in pieces]
    if made != [i for part in apart for i in part if i in control]:
        raise ValueError(
            f"a message names a control token, and the tokenizer cannot write it as text; {remedy}"
        )
    return [i for part in apart for i in part]


def _control_tokens(
    template: ChatTemplate, tokenizer: Tokenizer, config: ModelConfig
) -> dict[int, str]:
    """Names by id of the tokens that no message may make."""
    known = (template.bos_token, template.eos_token)
    found = {
        token: entry.content
        for token, entry in tokenizer.get_added_tokens_decoder().items()
        if entry.special or entry.content in known or token in config.end_token_ids
    }
    # What unknown characters become is any text's to make: two that no vocabulary has.
    unknown = encode(tokenizer, "\U00012345\U0010ffff", config, add_special_tokens=False)
    return {token: name for token, name in found.items() if token not in unknown}


def _marked(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, control: Mapping[int, str], word: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages with placeholders for the texts that may make control tokens; and these texts.

    Those hold a name, or begin or end with a part of one, which other text could complete.
    """
    names = {form for name in control.values() for form in (name, normalize(tokenizer, name))}
    heads = {name[:end] for name in names for end in range(1, len(name))}
    tails = {name[end:] for name in names for end in range(1, len(name))}
    longest = max(map(len, names), default=0)
    taken: list[str] = []

    def mark(text: str) -> str:
        for form in (text.strip(), normalize(tokenizer, text).strip()):
            edges = range(1, min(longest, len(form)) + 1)
            if any(name in form for name in names) or any(
                form[:size] in tails or form[-size:] in heads for size in edges
            ):
                taken.append(text)
                return f"{word}n{len(taken) - 1}n"
        return text

    marked = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part["text"] for part in content]
        texts = [mark(text) for text in parts]
        whole = isinstance(content, str)
        new = texts[0] if whole else [{"type": "text", "text": text} for text in texts]
        marked.append({**message, "content": new})
    return marked, taken


def _pieces(text: str, split: list[str], taken: list[str]) -> list[tuple[str, bool]] | None:
    """A text as (piece, whether it is of a message), neighbours of one kind together.

    Args:
      text: as rendered.
      split: the text with placeholders at these: a piece of the template, a number, a piece, ...
      taken: texts by number. A template may have stripped them.

    Returns:
      None where the text is not that of the template with these texts.
    """
    if not text.startswith(split[0]):
        return None
    pieces, at = [(split[0], False)], len(split[0])
    for number, after in zip(split[1::2], split[2::2], strict=True):
        one = taken[int(number)]
        forms = (one, one.strip(), one.lstrip(), one.rstrip())
        form = next((form for form in forms if text.startswith(form + after, at)), None)
        if form is None:
            return None
        at += len(form) + len(after)
        if pieces[-1] == ("", False) and len(pieces) > 1:  # two texts side by side
            pieces[-2:] = [(pieces[-2][0] + form, True)]
        else:
            pieces.append((form, True))
        pieces.append((after, False))
    return pieces if at == len(text) else None


def _checked(messages: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """Roles and contents alone, as plain values."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"there are {len(messages):,} messages; at most {MAX_MESSAGES:,} are read")
    plain, size = [], 0
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not 1 <= len(role) <= 64:
            raise ValueError(f"message {number} needs a role, a text of 1 to 64 characters")
        texts = _texts(number, message.get("content"))
        size += sum(map(len, texts))
        if size > most:
            raise ValueError(f"the messages have more than {most:,} characters")
        whole = isinstance(message["content"], str)
        parts = [{"type": "text", "text": text} for text in texts]
        plain.append({"role": role, "content": texts[0] if whole else parts})
    return plain


def _texts(number: int, content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list | tuple) else [None]
    if len(parts) > MAX_MESSAGES:
        raise ValueError(f"message {number} has {len(parts):,} parts; at most {MAX_MESSAGES:,}")
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in parts
    ]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise ValueError(
            f"the content of message {number} must be a text or a list of "
            "{'type': 'text', 'text': ...}"
        )
    return found


def _minimax(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    blocks = []
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role not in _HEADERS:
            raise ValueError(
                f"message {number} has role {printable(repr(role))}; it must be one of "
                f"{', '.join(_HEADERS)}"
            )
        parts = [content] if isinstance(content, str) else [part["text"] for part in content]
        blocks.append(f"{BEGIN}{_HEADERS[role]}\n{''.join(parts)}{END}\n")
    if add_generation_prompt:
        blocks.append(f"{BEGIN}{_HEADERS['assistant']}\n")
    return "".join(blocks)


def _default(found: object) -> object:
    """The template of this name, where there are several: a list of {name, template}."""
    if not isinstance(found, list):
        return found
    named = {
        entry.get("name"): entry.get("template")
        for entry in found
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    return named.get("default", found)


def _is_there(file: Path) -> bool:
    return file.is_symlink() or file.exists()
