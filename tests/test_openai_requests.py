"""What clients of OpenAI's form are told: the field at fault, in words of JSON."""

import json
from types import SimpleNamespace

import pytest
from bad_requests import COMPLETION
from serving import CONFIG, served

from mmx.inference.openai_json import ApiError
from mmx.inference.openai_requests import parse_request
from mmx.inference.requests import check_prompt

IT = served(SimpleNamespace(max_seq_len=100), max_answers=3)  # pyright: ignore
LAST = CONFIG.vocab_size - 1
IDS = f"ids are 0 to {LAST}"
# Changes of a request, the field at fault, and what is said.
CASES = [
    (dict(max_tokens=100, prompt=[1, 2, 3]), "prompt",
     "a prompt of 3 tokens and 100 tokens of output are too many; there is room for 100 together, "
     "and for 97 of output after this prompt"),
    (dict(max_tokens=99, prompt=[1, 2, 3]), "prompt",
     "a prompt of 3 tokens and 99 tokens of output are too many; there is room for 100 together, "
     "and for 97 of output after this prompt, or for a prompt of 1 with as much output"),
    (dict(max_tokens=999_999_999_999), "max_tokens",
     "max_tokens is 999999999999; it must be an integer from 1 to 100"),
    (dict(prompt=[99999999999999999999999]), "prompt",
     f"the prompt holds the id 99999999999999999999999; {IDS}"),
    (dict(prompt=[1, -1, 2**63]), "prompt", f"the prompt holds the id -1; {IDS}"),
    (dict(prompt="x", n=5), "n", "n is 5; at most 3 answers"),
    (dict(prompt=["x", "y"], n=2), "n", "2 prompts and n=2; at most 3 answers"),
    (dict(prompt=["x"] * 4), "prompt", "4 prompts and n=1; at most 3 answers"),
    (dict(stop=5), "stop", "stop is 5; it must be a list of texts, or a text"),
    (dict(stop=[None]), "stop",
     "an entry of stop is null; it must be a string of 1 to 256 characters"),
    (dict(stop_token_ids="x"), "stop_token_ids",
     'stop_token_ids is "x"; it must be a list of token ids'),
    (dict(stop_token_ids=[True]), "stop_token_ids",
     f"a token of stop_token_ids is true; it must be an integer from 0 to {LAST}"),
    (dict(logit_bias=[1]), "logit_bias",
     "logit_bias is [1]; it must be an object of token ids and numbers"),
    (dict(ignore_eos=1), "ignore_eos", "ignore_eos must be true or false"),
    (dict(temperature=True), "temperature",
     "temperature is true; it must be a number from 0 to 100"),
    (dict(top_p="x"), "top_p", 'top_p is "x"; it must be a number from 0 to 1'),
    (dict(logprobs=False), "logprobs", "logprobs is false; it must be an integer from 0 to 20"),
    (dict(stream_options=1), "stream_options",
     'stream_options must be {"include_usage": true or false}'),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "param", "said"), CASES, ids=[str(c[0])[:40] for c in CASES])
def test_the_field_at_fault_in_words_of_json(changes, param, said):
    with pytest.raises(ApiError) as caught:
        parse_request("completion", json.dumps({**COMPLETION, **changes}).encode(), IT)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message == said


def test_values_nested_too_deep_to_be_shown():
    body = json.dumps(COMPLETION).replace('"max_tokens": 3', f'"top_p": {"[" * 900}{"]" * 900}')
    with pytest.raises(ApiError) as caught:
        parse_request("completion", body.encode(), IT)
    assert caught.value.param == "top_p"


def test_ids_of_a_prompt():
    for ids in ([2**64, 1], [1, 10**400], [-(2**63) - 1]):
        with pytest.raises(ValueError, match=f"the prompt holds the id -?[0-9.]+; {IDS}"):
            check_prompt(ids, CONFIG)
    with pytest.raises(ValueError, match="must be integer token ids"):
        check_prompt([1.0, 2**64], CONFIG)
