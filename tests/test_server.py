"""The server as OpenAI's own client sees it: every token is that of `Engine.generate` alone."""

import asyncio
import dataclasses
import json

import openai
import pytest
import serving
from prometheus_client.parser import text_string_to_metric_families
from serving import CONFIG, NAME, ROWS, TOKENIZER, call, make_engine, running

from mmx.inference.chat import ChatTemplate, encode_chat
from mmx.inference.requests import Sampling
from mmx.inference.text import Spelling, encode

KEY = "a key, but not with spaces".replace(" ", "-")
TEXT = "The quick brown fox"
TALK = [{"role": "system", "content": "twice"}, {"role": "user", "content": "jumps over"}]
OPTIONS = [
    dict(temperature=0),
    dict(temperature=0.9, seed=7),
    dict(temperature=1.2, top_p=0.8, seed=8),
    dict(temperature=1, seed=9, logit_bias={"280": 5, "61": -100}, top_p=0.95),
    dict(temperature=0, extra_body=dict(repetition_penalty=1.5, ignore_eos=True)),
    dict(temperature=2, seed=-3, extra_body=dict(top_k=5, min_p=0.1)),
]


@pytest.fixture(scope="module")
def server():
    with running(key=KEY) as it:
        yield it


@pytest.fixture(scope="module")
def alone():
    """An engine of the same shape that nobody else uses."""
    return make_engine()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as it:
        yield it


def sampling(options, **more) -> Sampling:
    """What a request with these options asks for."""
    fields = {**options, **options.get("extra_body", {}), **more}
    fields.pop("extra_body", None)
    bias = {int(k): v for k, v in fields.pop("logit_bias", {}).items()}
    return Sampling(logit_bias=bias, max_new_tokens=fields.pop("max_tokens"), **fields)


def with_ids(options):
    return {**options, "extra_body": {**options.get("extra_body", {}), "return_token_ids": True}}


# ---------------------------------------------------------------- token for token


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_completions_are_what_the_engine_gives_alone(options, client, alone):
    ids = encode(TOKENIZER, TEXT, CONFIG)
    [wanted] = alone.generate([ids], sampling(options, max_tokens=9))
    for prompt in (TEXT, ids):
        answer = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=9, **with_ids(options)
        )
        [choice] = answer.choices
        assert choice.token_ids == list(wanted.tokens)
        assert choice.text == wanted.text
        assert choice.finish_reason == wanted.finish_reason
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 9)
        assert answer.usage.total_tokens == len(ids) + 9
    stream = client.completions.create(
        model=NAME, prompt=TEXT, max_tokens=9, stream=True,
        stream_options={"include_usage": True}, **with_ids(options),
    )  # fmt: skip
    *parts, last = list(stream)
    assert [t for part in parts for t in part.choices[0].token_ids] == list(wanted.tokens)
    assert "".join(part.choices[0].text for part in parts) == wanted.text
    assert [part.choices[0].finish_reason for part in parts][-1] == wanted.finish_reason
    assert all(part.choices[0].finish_reason is None for part in parts[:-1])
    assert last.choices == []
    assert last.usage.completion_tokens == 9
    assert len({part.id for part in (*parts, last)}) == 1


def test_chat_is_what_the_engine_gives_for_the_rendered_conversation(client, alone):
    ids = encode_chat(ChatTemplate(), TOKENIZER, TALK, CONFIG)
    options = dict(temperature=0.9, seed=4)
    wanted = [
        alone.generate([ids], sampling(options | {"seed": 4 + i}, max_tokens=8))[0]
        for i in range(3)
    ]
    assert len({one.tokens for one in wanted}) == 3
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, n=3, max_tokens=8, **with_ids(options)
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [tuple(choice.token_ids) for choice in answer.choices] == [w.tokens for w in wanted]
    assert [choice.message.content for choice in answer.choices] == [w.text for w in wanted]
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 24
    texts, ends = ["", "", ""], {}
    for part in client.chat.completions.create(
        model=NAME, messages=TALK, n=3, max_completion_tokens=8, stream=True, **options
    ):
        assert part.usage is None
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [w.text for w in wanted]
    assert ends == {i: w.finish_reason for i, w in enumerate(wanted)}


def test_lists_of_prompts_and_n(client, alone):
    prompts = [[5, 6, 7], [8, 9], [10]]
    answer = client.completions.create(
        model=NAME, prompt=prompts, n=2, max_tokens=5, temperature=1, seed=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    seen = [tuple(choice.token_ids) for choice in answer.choices]
    base = Sampling(temperature=1.0, max_new_tokens=5)
    wanted = [
        alone.generate([prompt], dataclasses.replace(base, seed=3 + i))[0].tokens
        for prompt in prompts
        for i in range(2)
    ]
    assert seen == wanted
    assert [choice.prompt_token_ids for choice in answer.choices[::2]] == prompts


def test_sixteen_at_once_are_each_as_if_alone(server, alone):
    """More than there are rows, of all lengths; streams and whole answers beside each other."""
    prompts = [list(range(20 + i, 22 + 2 * i)) for i in range(16)]

    async def ask(client, index, prompt):
        stream = index % 2 == 0
        answer = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=3 + index, temperature=1, seed=index,
            stream=stream, extra_body={"return_token_ids": True},
        )  # fmt: skip
        if not stream:
            return answer.choices[0].token_ids
        return [t async for part in answer for t in part.choices[0].token_ids]

    async def main():
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key=KEY, max_retries=0
        ) as client:
            return await asyncio.gather(*(ask(client, i, p) for i, p in enumerate(prompts)))

    seen = asyncio.run(main())
    for index, (prompt, tokens) in enumerate(zip(prompts, seen, strict=True)):
        options = Sampling(temperature=1.0, seed=index, max_new_tokens=3 + index)
        assert tokens == list(alone.generate([prompt], options)[0].tokens)
    assert server.all_free()


def test_no_seed_is_a_new_one_each_time(client):
    texts = {
        client.completions.create(model=NAME, prompt=[7], max_tokens=12).choices[0].text
        for _ in range(3)
    }
    assert len(texts) == 3  # OpenAI's temperature is 1 unless said


# ---------------------------------------------------------------- options


def unnamed(text):
    """The bytes of a token of the older form, where a part of a character is written as bytes."""
    if not text.startswith("bytes:"):
        return text.encode()
    return bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))


def test_log_probabilities(client, alone):
    [wanted] = alone.generate([[5, 6]], max_new_tokens=4, logprobs=3)
    spelled = Spelling(TOKENIZER)
    for stream in (False, True):
        answer = client.completions.create(
            model=NAME, prompt=[5, 6], max_tokens=4, temperature=0, logprobs=3, stream=stream
        )
        parts = list(answer) if stream else [answer]
        found = [part.choices[0].logprobs for part in parts]
        seen = [x for one in found for x in one.token_logprobs]
        assert seen == [one.logprob for one in wanted.logprobs]
        seen = [x for one in found for x in one.tokens]
        assert list(map(unnamed, seen)) == [spelled(t) for t in wanted.tokens]
        texts = [spelled(t).decode(errors="replace") for t in wanted.tokens]
        offsets = [sum(map(len, texts[:i])) for i in range(4)]
        assert [x for one in found for x in one.text_offset] == offsets
        tops = [{unnamed(k): v for k, v in x.items()} for one in found for x in one.top_logprobs]
        assert tops == [{spelled(t): v for t, v in one.top} for one in wanted.logprobs]
    ids = encode_chat(ChatTemplate(), TOKENIZER, TALK, CONFIG)
    [wanted] = alone.generate([ids], max_new_tokens=4, logprobs=2)
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [one.logprob for one in content] == [one.logprob for one in wanted.logprobs]
    assert b"".join(bytes(one.bytes) for one in content) == b"".join(map(spelled, wanted.tokens))
    tops = [[(bytes(t.bytes), t.logprob) for t in one.top_logprobs] for one in content]
    assert tops == [[(spelled(t), value) for t, value in one.top] for one in wanted.logprobs]


def test_stops(client, alone):
    [free] = alone.generate([[5, 6]], max_new_tokens=24)
    cut = free.text[3:5]
    at = free.text.index(cut)
    for stop in (cut, ["never", cut]):
        [choice] = client.completions.create(
            model=NAME, prompt=[5, 6], max_tokens=24, temperature=0, stop=stop
        ).choices
        assert (choice.text, choice.finish_reason) == (free.text[:at], "stop")
    token = free.tokens[4]
    first = free.tokens.index(token)
    [choice] = client.completions.create(
        model=NAME, prompt=[5, 6], max_tokens=24, temperature=0,
        extra_body={"stop_token_ids": [token], "return_token_ids": True},
    ).choices  # fmt: skip
    assert choice.token_ids == list(free.tokens[: first + 1])
    assert choice.finish_reason == "stop"
    # The end token of the model, which a bias makes certain.
    [choice] = client.completions.create(
        model=NAME, prompt=[5, 6], max_tokens=24, temperature=0, logit_bias={"0": 100}
    ).choices
    assert (choice.text, choice.finish_reason) == ("", "stop")


def test_a_bias_decides(client):
    [choice] = client.completions.create(
        model=NAME, prompt=[5], max_tokens=3, logit_bias={"77": 100},
        extra_body={"return_token_ids": True},
    ).choices  # fmt: skip
    assert choice.token_ids == [77, 77, 77]
    assert choice.finish_reason == "length"


def test_a_chat_without_limit_fills_the_room(client):
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == CONFIG.max_seq_len
    assert answer.choices[0].finish_reason == "length"


# ---------------------------------------------------------------- keys, models, errors


ROUTES = ["/metrics", "/v1/models", f"/v1/models/{NAME}", "/v1/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("path", [*ROUTES, "/", "/docs", "/v1/nonsense"])
@pytest.mark.parametrize(
    "given",
    ["", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer", "Bearer \xff"],
)
def test_every_route_asks_for_the_key(path, given, server):
    body = {} if path.endswith("completions") else None
    headers = {"authorization": given.encode("latin-1")} if given else {}
    answer = call(server, path, body, headers=headers)
    assert answer.status == 401
    assert answer.json["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.body.decode()


def test_health_asks_for_none(server):
    answer = call(server, "/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "mmx")
    assert model.max_model_len == CONFIG.max_seq_len
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_errors_as_the_client_raises_them(client, server):
    with pytest.raises(openai.NotFoundError, match=NAME) as caught:
        client.completions.create(model="another", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt=[5, CONFIG.vocab_size])
    assert caught.value.param == "prompt"
    assert f"ids are 0 to {CONFIG.vocab_size - 1}" in caught.value.message
    for prompt, most in (([1] * 256, 20), ([1] * 250, 7)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=NAME, prompt=prompt, max_tokens=most)
        assert caught.value.code == "context_length_exceeded"
    assert "for a prompt of 249" in caught.value.message
    for prompt in ("", [], [[]], [""]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=NAME, prompt=prompt)
        assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=TALK, tools=[{"type": "function"}])
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported")
    bad = openai.OpenAI(base_url=server.url + "/v1", api_key="no", max_retries=0)
    with bad, pytest.raises(openai.AuthenticationError):
        bad.models.list()


# ---------------------------------------------------------------- metrics


def read_metrics(server):
    """Name and labels -> value."""
    answer = call(server, "/metrics", headers={"authorization": f"Bearer {KEY}"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_metrics(server, client):
    assert server.all_free()
    before = read_metrics(server)
    client.completions.create(model=NAME, prompt=[5] * 7, max_tokens=6, n=2)
    client.completions.create(model=NAME, prompt=[5], max_tokens=9, logit_bias={"0": 100})
    for _ in range(3):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=NAME, prompt=[5], max_tokens=0)
    # Never the end token: it must not end before it is cancelled.
    stream = client.completions.create(
        model=NAME, prompt=[5], max_tokens=200, stream=True, logit_bias={"0": -100}
    )
    next(iter(stream))
    stream.close()
    assert server.all_free()
    after = read_metrics(server)
    grown = {key: after[key] - before[key] for key in after}

    def requests(outcome):
        return grown["mmx_requests_total", ("outcome", outcome)]

    assert requests("length") + requests("stop") == 3
    assert requests("stop") >= 1
    assert requests("refused") == 3
    assert requests("cancelled") == 1
    assert requests("busy") == requests("error") == 0
    assert grown["mmx_prompt_tokens_total",] == 7 + 7 + 1 + 1
    first = grown["mmx_time_to_first_token_seconds_count",]
    assert first == 4
    assert grown["mmx_time_to_first_token_seconds_bucket", ("le", "+Inf")] == first
    cumulative = [v for k, v in after.items() if k[0] == "mmx_time_to_first_token_seconds_bucket"]
    assert cumulative == sorted(cumulative)
    assert 1 + 12 + 1 <= grown["mmx_generated_tokens_total",] <= 1 + 12 + 200
    assert after["mmx_rows",] == ROWS
    assert after["mmx_pages",] == after["mmx_pages_free",] == server.engine.pages.count
    assert after["mmx_requests_working",] == after["mmx_requests_waiting",] == 0
    assert after["mmx_healthy",] == 1
    assert after["mmx_engine_failures_total",] == 0


def test_streams_are_events_of_one_line_each(server):
    """Whatever a text holds, no byte of it ends a line, and the end mark is the last."""
    answer = call(
        server, "/v1/completions",
        {"model": NAME, "prompt": [5], "max_tokens": 12, "stream": True,
         "logit_bias": {str(t): 8 for t in serving.TOKENIZER.encode("\n\r\u2028").ids}},
        headers={"authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.body.decode("ascii").split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    for event in events:
        assert "\n" not in event
        assert "\r" not in event
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"
