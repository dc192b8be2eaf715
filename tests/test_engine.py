"""The engine: recorded tokens, and requests that never see each other, bit for bit."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from engines import CONFIG, PAGE, PARAMS, Poisoned, make, requests, run_schedule
from golden_cases import NAMES, golden
from random_models import random_tokens
from sweeps import sweep
from tokenizers import Tokenizer, decoders, models

import mmx
from mmx.inference import decoding, sizes, snapshots
from mmx.inference.decoding import PADDED, chunk_size
from mmx.inference.engine import Engine
from mmx.inference.pool import PoolShape, init_pool
from mmx.inference.requests import Sampling
from mmx.inference.text import TextStream

# p04 is generated from in test_golden.py; what p02 and p07 are made of is in other cases too: many
# layers of one block in o2, one key head and tied embeddings in p08, three experts a token in p04.
LATE = ("text/p02_linear_first_deep", "text/p04_right_pad", "text/p07_grads")


@pytest.mark.parametrize("name", sweep(NAMES, lambda name: name not in LATE))
def test_recorded_tokens(name):
    case = golden(name)
    engine = Engine(case.config, case.params, rows=4, max_seq_len=1024, page_size=PAGE)
    prompts = [row[real].tolist() for row, real in zip(case.tokens, case.real, strict=True)]
    recorded = case.arrays["generated"]
    results = engine.generate(prompts, max_new_tokens=recorded.shape[1], ignore_eos=True)
    np.testing.assert_array_equal([result.tokens for result in results], recorded)
    assert engine.idle
    engine.snapshots.clear()
    assert engine.pages.free == engine.pool.num_pages


# ---------------------------------------------------------------- isolation


@pytest.fixture(scope="module")
def alone():
    """Requests, and what each gives in an engine of its own; every third stops at one of its ids.

    One that ends where nobody could have known is looked at while others need its pages.
    """
    engine = make(snapshots=0)
    made = []
    for index, (prompt, sampling) in enumerate(requests(24, 1)):
        tokens = engine.generate([prompt], sampling)[0].tokens
        if index % 3 == 2:
            stop = tokens[len(tokens) // 2]
            sampling = dataclasses.replace(sampling, stop_ids=(stop,))
            tokens = tokens[: tokens.index(stop) + 1]
        made.append((prompt, sampling, tokens))
    return made


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("schedules", [40, pytest.param(250, marks=pytest.mark.slow)])
def test_random_schedules(alone, monkeypatch, part, schedules):
    """Pages for about two of the sequences, so that rows are sent away and come back.

    In the odd parts prompts share their beginnings, which are kept; two of them, and evicted.
    """
    known, options = alone, {}
    if part % 2:
        for module in (decoding, snapshots, sizes):
            monkeypatch.setattr(module, "PADDED", (8, 16, 32))  # steps short enough for prompts
        options = dict(chunk=32, snapshots=2)
        known = sharing_beginnings(alone)
    engine = make(Poisoned, decode_steps=2, **options)
    engine.pages.take(6)  # of 16
    chance = random.Random(part)
    away = 0
    send = engine._send_away

    def count(request):
        nonlocal away
        away += request.state == "running"
        send(request)

    engine._send_away = count
    for _ in range(schedules):
        got, cancelled = run_schedule(engine, known, chance)
        for index, tokens in got.items():
            whole = known[index][2]
            if index in cancelled:
                assert tuple(tokens) == whole[: len(tokens)]
            else:
                assert tuple(tokens) == whole
        assert engine.pages.free + held_by_prefixes(engine) == 10
        assert engine._free_rows == list(range(4))
    assert away >= schedules // 25, "hardly anybody was sent away"
    if part % 2:
        assert engine.snapshots.hits >= schedules // 3, "hardly any prefix was of use"


def sharing_beginnings(alone):
    """The requests behind two beginnings of 32 and 64 tokens, and what each gives by itself."""
    documents = random_tokens(CONFIG, (2, 64), 7)
    engine = make(chunk=32, snapshots=0)
    made = []
    for index, (prompt, sampling, _) in enumerate(alone[:12]):
        prompt = [*documents[index % 2, : 32 * (1 + index // 2 % 2)].tolist(), *prompt[:20]]
        made.append((prompt, sampling, engine.generate([prompt], sampling)[0].tokens))
    return made


def held_by_prefixes(engine):
    return len({page for kept in engine.snapshots._kept.values() for page in kept.pages})


@pytest.fixture
def compiled():
    """Names of what is compiled while the list is watched."""
    seen = []

    def note(event, duration, **unused):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield seen
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_first_of_each_kind(alone, compiled, steps):
    engine = make()
    dispatched = 0
    decode = engine._decode

    def count():
        nonlocal dispatched
        done = decode()
        dispatched += done
        return done

    engine._decode = count
    chance = random.Random(9)
    for _ in range(20):
        run_schedule(engine, alone, chance)
    jax.jit(lambda x: x)(1.0)
    assert compiled  # the list is alive
    compiled.clear()
    before = dispatched
    while (dispatched - before) * engine.decode_steps < steps:
        run_schedule(engine, alone, chance)
    assert compiled == []


# ---------------------------------------------------------------- bits of the logits


def logits_of(prompt, cuts, *, row=0, pages=None):
    """Logits after a prompt that is read in chunks of (size, tokens of it) into some row."""
    pool = init_pool(CONFIG, PoolShape(4, 80, PAGE, jnp.dtype(jnp.float32)))
    pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pool)
    table = np.arange(64, dtype=np.int32) if pages is None else pages
    start = 0
    logits = None
    for size, count in cuts:
        tokens = np.zeros(size, np.int32)
        tokens[:count] = prompt[start : start + count]
        numbers = (np.int32(count), np.int32(row), table, np.int32(start))
        pool, logits = decoding.prefill(PARAMS, pool, tokens, *numbers, config=CONFIG)
        start += count
    assert start == len(prompt)
    return np.asarray(logits)


def test_chunks_rows_and_pages_change_no_bit():
    prompt = random_tokens(CONFIG, (1, 540), 3)[0]
    whole = logits_of(prompt, [(512, 512), (32, 28)])
    assert np.all(np.isfinite(whole))
    shuffled = np.random.default_rng(0).permutation(80)[:64].astype(np.int32)
    for name, other in {
        "chunks of 256": logits_of(prompt, [(256, 256), (256, 256), (32, 28)]),
        "another row": logits_of(prompt, [(512, 512), (32, 28)], row=3),
        "other pages": logits_of(prompt, [(512, 512), (32, 28)], pages=shuffled),
    }.items():
        np.testing.assert_array_equal(other, whole, err_msg=name)


def test_a_step_reads_a_chunk_or_as_many_short_prompts():
    """In order, at most `chunk` tokens; a short prompt counts as 256: its launch is no cheaper."""
    engine = make(chunk=512, pages=128, max_seq_len=700)
    lengths = (600, 600, 20, 20)
    numbers = [engine.submit([1] * length, Sampling(max_new_tokens=64)) for length in lengths]
    seen = []
    for _ in range(4):
        engine.step()
        read = {request.number: request.read for request in engine._at_work}
        seen.append([read[number] for number in numbers])
    assert seen == [[512, 0, 0, 0], [600, 0, 0, 0], [600, 512, 0, 0], [600, 600, 20, 0]]


def test_padding_changes_no_more_than_rounding():
    """XLA's products on CPU round differently for 32 and for 64 rows, padding or not: 1e-6 of 3."""
    prompt = random_tokens(CONFIG, (1, 284), 3)[0]
    least = logits_of(prompt, [(256, 256), (32, 28)])
    for size in PADDED[1:]:
        more = logits_of(prompt, [(256, 256), (size, 28)])
        np.testing.assert_allclose(more, least, rtol=0, atol=5e-6)


def test_chunks_are_few_and_cover_the_prompt():
    used = set()
    for length in range(1, 5000, 7):
        left, begun = length, 0
        while left:
            size = chunk_size(left, 2048)
            assert begun % 256 == 0
            assert size <= 2048
            assert size >= left or size >= 256
            used.add(size)
            begun, left = begun + min(size, left), left - min(size, left)
    assert used == {*PADDED, 512, 1024, 2048}


def test_the_padded_length_is_a_matter_of_the_prompt_alone():
    """Whatever is read at once and wherever a kept prefix ends: its bits are the prompt's."""
    for length in (*range(1, 1100, 5), 256, 512, 768):
        last = set()
        for chunk in (256, 512, 2048):
            for begun in range(0, length, 256):
                left = length - begun
                while left:
                    size = chunk_size(left, chunk)
                    left, end = left - min(size, left), (size, min(size, left))
                # Of a whole chunk it is of no account how much was read with it.
                last.add(end if end[1] % 256 else "whole")
        assert len(last) == 1, length


# ---------------------------------------------------------------- log-probabilities and text


def test_log_probabilities_are_those_of_training(alone):
    """Of the model itself, whatever the filters, and of as many tokens as were asked for."""
    engine = make()
    asked = [3, 0, 20, None]
    samplings = [
        Sampling(max_new_tokens=24, temperature=1.5, top_k=9, seed=i, logprobs=n)
        for i, n in enumerate(asked)
    ]
    prompts = [alone[i][0] for i in range(4)]
    results = engine.generate(prompts, samplings)
    assert results[3].logprobs is None
    ours, truths = [], []
    for prompt, count, result in zip(prompts, asked, results, strict=True):
        if count is None:
            continue
        whole = np.array([[*prompt, *result.tokens]])
        logits = truth.forward(PARAMS, whole, CONFIG).logits[0, len(prompt) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        assert len(result.logprobs) == len(result.tokens)
        for row, token, seen in zip(logprobs, result.tokens, result.logprobs, strict=True):
            assert seen.token == token
            ours.append(seen.logprob)
            truths.append(row[token])
            order = np.argsort(-row)[:count]
            assert [i for i, _ in seen.top] == order.tolist()
            np.testing.assert_allclose([value for _, value in seen.top], row[order], atol=1e-5)
    # fp32 against float64: logits of size 3 differ by 1e-6.
    np.testing.assert_allclose(ours, truths, atol=1e-5)
    assert np.corrcoef(ours, truths)[0, 1] >= 0.999
    trained = mmx.forward(PARAMS, whole, CONFIG).logits[0, len(prompts[2]) - 1 : -1]
    trained = np.asarray(jax.nn.log_softmax(trained))[np.arange(24), list(results[2].tokens)]
    np.testing.assert_allclose(ours[-24:], trained, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    """One whose every byte is a token; the model knows 40 of the ids."""
    letters = sorted("abcdefghijklmnopqrstuvwxyz .,!?ABCDEFGHI")
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="a"))
    made.decoder = decoders.Fuse()
    return made


def test_text_and_stop_strings(alone, tokenizer):
    prompt = alone[0][0]
    free = make(tokenizer=tokenizer).generate([prompt], max_new_tokens=30)[0]
    assert free.text == tokenizer.decode(list(free.tokens))
    assert len(free.text) == 30
    stop = free.text[11:14]  # three tokens
    at = free.text.index(stop)
    engine = make(tokenizer=tokenizer)
    assert (at + 3 - 1) % engine.decode_steps  # the end lies inside a dispatch
    samplings = [Sampling(max_new_tokens=30, stop=(stop,)), Sampling(max_new_tokens=30)]
    stopped, beside = engine.generate([prompt, prompt], samplings)
    assert stopped.text == free.text[:at]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: at + 3]
    assert beside == free
    ended = engine.generate([prompt], max_new_tokens=30, stop_ids=(free.tokens[5],))[0]
    first = free.tokens.index(free.tokens[5])
    assert ended.text == free.text[:first]
    with pytest.raises(ValueError, match="stop: strings need an Engine with a tokenizer"):
        make().submit(prompt, samplings[0])


def test_a_tokenizer_that_fails_ends_its_request_alone(alone, tokenizer, monkeypatch):
    engine = make(tokenizer=tokenizer)
    push = TextStream.push
    broken = []

    def fail(self, ids):
        if self is broken[0]:
            raise ValueError("the tokenizer cannot decode (it is broken)")
        return push(self, ids)

    monkeypatch.setattr(TextStream, "push", fail)
    numbers = [engine.submit(alone[i][0], Sampling(max_new_tokens=5)) for i in range(2)]
    broken.append(engine._waiting[0].text)
    events = []
    while not engine.idle:
        events += engine.step()
    first = [event for event in events if event.request == numbers[0]]
    assert [(e.finish_reason, e.error) for e in first] == [
        ("error", "the tokenizer cannot decode (it is broken)")
    ]
    assert len([event for event in events if event.request == numbers[1]]) == 5


# ---------------------------------------------------------------- requests


def test_stop_ids_end_a_request(alone):
    prompt, _, tokens = alone[0]
    engine = make()
    stop = tokens[len(tokens) // 2]
    result = engine.generate([prompt], max_new_tokens=30, stop_ids=(stop,))[0]
    assert result.finish_reason == "stop"
    assert result.tokens == tokens[: tokens.index(stop) + 1]


def test_cancelling_frees_everything_at_once(alone):
    engine = make()
    numbers = [engine.submit(*alone[i][:2]) for i in range(6)]
    engine.step()
    for number in numbers:
        events = engine.cancel(number)
        assert [event.finish_reason for event in events] in ([], ["cancelled"])
    assert engine.idle
    assert engine.pages.free == engine.pool.num_pages
    assert engine.cancel(numbers[0]) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, CONFIG.vocab_size], {}, f"the id {CONFIG.vocab_size}"),
        ([-1], {}, "the id -1"),
        ([0.5], {}, "must be integer"),
        ([1] * 250, dict(max_new_tokens=7), "257 tokens; there is room for 256 together"),
        ([1], dict(max_new_tokens=0), "max_new_tokens"),
        ([1], dict(temperature=float("nan")), "temperature"),
        ([1], dict(stop_ids=(CONFIG.vocab_size,)), "stop_ids"),
    ],
)
def test_bad_requests_are_refused_and_the_engine_lives_on(alone, prompt, options, message):
    engine = make()
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, Sampling(**options))
    assert engine.idle
    prompt, sampling, tokens = alone[1]
    assert engine.generate([prompt], sampling)[0].tokens == tokens


def test_a_request_as_long_as_all_pages_is_served(alone):
    """With pages for less than a row can have: it must not wait for more than there are."""
    engine = make(pages=3)
    assert (engine.max_seq_len, engine.row_pages) == (48, 16)
    prompt = (alone[0][0] * 48)[:46]
    engine.submit(prompt, Sampling(max_new_tokens=2))
    events = [event for _ in range(6) for event in engine.step()]
    assert [event.finish_reason for event in events] == [None, "length"]
    with pytest.raises(ValueError, match="49 tokens; there is room for 48 together"):
        engine.submit(prompt, Sampling(max_new_tokens=3))


def test_bad_engines_are_refused():
    for options, message in [(dict(rows=0), "rows is 0"), (dict(chunk=300), "power of two"),
                             (dict(page_size=0), "page_size")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(**options)
