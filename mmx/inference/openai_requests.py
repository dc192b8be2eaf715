"""Requests in OpenAI's form: JSON of somebody else in, prompts of ids and `Sampling` out.

A field that is not known, or that asks for what there is not, is refused by its name: silence would
be an answer to another question. `null` is as good as leaving a field away.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmx.config import ModelConfig
from mmx.convert.bounded import printable
from mmx.inference.openai_json import ApiError, bad, parse_body
from mmx.inference.openai_prompts import Served, chat_prompt, completion_prompts
from mmx.inference.requests import MAX_STOPS, BadOption, Sampling

MAX_N = 16
# Accepted and without any effect on the answer.
IGNORED = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}
    | {"parallel_tool_calls", "prompt_cache_retention"}
)
# Known, with the values that ask for nothing there is not.
_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# Names here and of `Sampling`.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "ignore_eos": "ignore_eos",
    "logit_bias": "logit_bias",
    "stop": "stop",
    "stop_token_ids": "stop_ids",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
_BOTH = {"model", "n", "stream", "stream_options", "logprobs", "return_token_ids"}
_COMPLETION = {"prompt", "best_of", "echo", "suffix"}
_CHAT = {"messages", "top_logprobs", "max_completion_tokens"}


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
      prompts: int32 ids; each is answered n times.
      samplings: one a prompt.
      logprobs: whether they are asked for.
      token_ids: whether the ids of prompts and answers are shown.
    """

    kind: Literal["completion", "chat"]
    prompts: list[np.ndarray]
    samplings: list[Sampling]
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    token_ids: bool

    def each(self) -> tuple[list[np.ndarray], list[Sampling]]:
        """Prompts and samplings of all answers, those of one prompt together; seeds count up."""
        prompts, samplings = [], []
        for prompt, sampling in zip(self.prompts, self.samplings, strict=True):
            for number in range(self.n):
                seed = None if sampling.seed is None else sampling.seed + number
                prompts.append(prompt)
                samplings.append(dataclasses.replace(sampling, seed=seed))
        return prompts, samplings


def parse_request(kind: Literal["completion", "chat"], body: bytes, served: Served) -> Asked:
    """A request for an answer, checked; prompts become ids here, which may take seconds.

    Raises:
      ApiError: it cannot be answered; says which field and why.
    """
    fields = parse_body(body, served.max_seq_len)
    own, other = (_COMPLETION, _CHAT) if kind == "completion" else (_CHAT, _COMPLETION)
    known = (_BOTH | _SAMPLING.keys() | _ONLY.keys() | IGNORED) - other | own
    for name in fields:
        if name not in known:
            name = printable(name)
            raise bad(name, f"{name} is no field of this request", "unknown_field")
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_model(fields, served)
    n = _integer(fields, "n", 1, MAX_N, 1)
    for name, allowed in _ONLY.items():
        if name in fields:
            _check_only(name, fields[name], (n,) if name == "best_of" else allowed)
    stream, token_ids = _flag(fields, "stream"), _flag(fields, "return_token_ids")
    include_usage = _include_usage(fields, stream)
    # What the server takes may be less than the model does.
    config = dataclasses.replace(served.config, max_seq_len=served.max_seq_len)
    options = _sampling_options(fields, config)
    options["logprobs"] = _logprobs(kind, fields, served.config)
    if kind == "completion":
        prompts, param = completion_prompts(fields, n, served), "prompt"
        options.setdefault("max_new_tokens", 16)
    else:
        prompts, param = [chat_prompt(fields, n, served)], "messages"
    samplings = [_sampling(options, prompt, n, served, param) for prompt in prompts]
    return Asked(
        kind=kind,
        prompts=prompts,
        samplings=samplings,
        n=n,
        stream=stream,
        include_usage=include_usage,
        logprobs=options["logprobs"] is not None,
        token_ids=token_ids,
    )


# ---------------------------------------------------------------- fields


def _check_only(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    # Python takes False for 0.
    if not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
    ):
        wanted = " or ".join(["null", *map(json.dumps, allowed)])
        raise bad(name, f"{name} is not supported; it must be {wanted}", "unsupported")


def _check_model(fields: Mapping[str, Any], served: Served) -> None:
    name = fields.get("model")
    if not isinstance(name, str):
        raise bad("model", f"model must be a text; {served.name} is served")
    if name != served.name:
        raise ApiError(
            404, f"there is no model {printable(name)}; {served.name} is served", param="model",
            code="model_not_found",
        )  # fmt: skip


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int, usual: int) -> int:
    value = fields.get(name, usual)
    if type(value) is not int or not low <= value <= high:
        raise bad(name, f"{name} must be an integer from {low} to {high}")
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise bad(name, f"{name} must be true or false")
    return value


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options", {})
    known = ("include_usage", "include_obfuscation")
    if not isinstance(options, dict) or any(
        name not in known or not isinstance(value, bool | None) for name, value in options.items()
    ):
        raise bad("stream_options", 'stream_options must be {"include_usage": true or false}')
    if options and not stream:
        raise bad("stream_options", "stream_options needs stream: true")
    return bool(options.get("include_usage"))


def _sampling_options(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Fields of `Sampling` that were given, each checked by itself: so its name here is known."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": None}
    for name, ours in _SAMPLING.items():
        if name not in fields:
            continue
        value: Any = fields[name]
        if name == "stop":
            value = _tuple(name, [value] if isinstance(value, str) else value, "texts, or a text")
        elif name == "stop_token_ids":
            value = _tuple(name, value, "token ids")
        elif name == "ignore_eos":
            value = _flag(fields, name)
        elif name == "logit_bias":
            value = _bias(value)
        if ours in options and ours == "max_new_tokens" and options[ours] != value:
            raise bad(name, "max_tokens and max_completion_tokens differ; give one of them")
        try:
            dataclasses.replace(Sampling(), **{ours: value}).check(config)
        except ValueError as error:
            raise _refused(error, ours, name) from None
        options[ours] = value
    return options


def _tuple(name: str, value: Any, wanted: str) -> tuple[Any, ...]:
    """What `Sampling` takes for a list; one too many is enough to be refused."""
    if not isinstance(value, list):
        raise bad(name, f"{name} is {_shown(value)}; it must be a list of {wanted}")
    return tuple(value[: MAX_STOPS + 1])


def _bias(value: Any) -> Any:
    """Ids as keys: JSON has texts alone."""
    if not isinstance(value, dict):
        wanted = "an object of token ids and numbers"
        raise bad("logit_bias", f"logit_bias is {_shown(value)}; it must be {wanted}")
    found = {}
    for key, bias in value.items():
        if not re.fullmatch("[0-9]{1,9}", key):
            raise bad("logit_bias", f"logit_bias has the key {printable(key)}; ids are wanted")
        found[int(key)] = bias
    return found


def _logprobs(kind: str, fields: Mapping[str, Any], config: ModelConfig) -> int | None:
    if kind == "completion":
        value = fields.get("logprobs")
        # A yes or no is what chat has here; the old form of a request means a number.
        name = "logprobs"
    else:
        asked, name = _flag(fields, "logprobs"), "top_logprobs"
        if not asked and fields.get(name):
            raise bad(name, "top_logprobs needs logprobs: true")
        value = fields.get(name, 0) if asked else None
    try:
        Sampling(logprobs=value).check(config)
    except ValueError as error:
        raise _refused(error, "logprobs", name) from None
    return value


def _refused(error: ValueError, ours: str, name: str) -> ApiError:
    """What `Sampling` says, in the words of JSON and of the request."""
    said = str(error)
    if isinstance(error, BadOption):
        said = f"{error.name} is {_shown(error.value)}; it must be {error.wanted}"
    return bad(name, said.replace(ours, name, 1))


def _shown(value: object) -> str:
    """A value of JSON as one short line: an integer may have more digits than Python writes."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def _sampling(
    options: Mapping[str, Any], prompt: np.ndarray, n: int, served: Served, param: str
) -> Sampling:
    """The sampling of one prompt: an answer without a limit may fill the room there is."""
    room = served.max_seq_len - prompt.size
    asked = options.get("max_new_tokens", max(room, 1))
    if asked > room:
        shorter = served.max_seq_len - asked
        other = f", or for a prompt of {shorter} with as much output" if shorter > 0 else ""
        raise bad(
            param,
            f"a prompt of {prompt.size} tokens and {asked} tokens of output are too many; there is "
            f"room for {served.max_seq_len} together, and for {room} of output after this prompt"
            f"{other}",
            "context_length_exceeded",
        )
    sampling = Sampling(**{**options, "max_new_tokens": asked})
    seed = None if sampling.seed is None else sampling.seed + n - 1
    try:
        dataclasses.replace(sampling, seed=seed).check(served.config)
    except ValueError as error:
        raise _refused(error, "seed", "seed") from None
    return sampling
