"""The engine: recorded tokens, and requests that never see each other, bit for bit."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import NAMES, golden
from random_models import random_params, random_tokens, small_config

from mmx.inference import decoding
from mmx.inference.decoding import PADDED, chunk_size
from mmx.inference.engine import Engine
from mmx.inference.pool import PoolShape, init_pool
from mmx.inference.requests import Sampling

CONFIG = small_config("ls", max_seq_len=1024)
PARAMS = random_params(CONFIG, 0)
PAGE = 16


class Poisoned(Engine):
    """What a request leaves behind is NaN: whoever reads it is found out."""

    def _release(self, request):
        row, pages = request.row, list(request.pages)
        super()._release(request)
        states, keys, values = vars(self.pool).values()
        if row >= 0:
            states = states.at[:, row].set(jnp.nan)
        if pages:
            keys, values = (x.at[:, np.array(pages)].set(jnp.nan) for x in (keys, values))
        self.pool = type(self.pool)(states, keys, values)


def make(kind=Engine, **options):
    return kind(CONFIG, PARAMS, **{**dict(rows=4, max_seq_len=256, page_size=PAGE), **options})


@pytest.mark.parametrize("name", NAMES)
def test_recorded_tokens(name):
    case = golden(name)
    engine = Engine(case.config, case.params, rows=4, max_seq_len=1024, page_size=PAGE)
    prompts = [row[real].tolist() for row, real in zip(case.tokens, case.real, strict=True)]
    recorded = case.arrays["generated"]
    results = engine.generate(prompts, max_new_tokens=recorded.shape[1], ignore_eos=True)
    np.testing.assert_array_equal([result.tokens for result in results], recorded)
    assert engine.idle
    assert len(engine._free_pages) == engine.pool.num_pages


# ---------------------------------------------------------------- isolation


def requests(number, seed):
    """Prompts of 1 to 90 tokens; half greedy, half drawn, of various lengths."""
    chance = random.Random(seed)
    made = []
    for index in range(number):
        prompt = random_tokens(CONFIG, (1, chance.randint(1, 90)), index)[0].tolist()
        options = {}
        if index % 2:
            options = dict(temperature=0.9, top_p=0.95, seed=index, repetition_penalty=1.1)
        made.append((prompt, Sampling(max_new_tokens=chance.randint(1, 30), **options)))
    return made


@pytest.fixture(scope="module")
def alone():
    """Requests, and what each gives in an engine of its own."""
    made = requests(24, 1)
    engine = make()
    return [(p, s, engine.generate([p], s)[0].tokens) for p, s in made]


def run_schedule(engine, alone, chance):
    """Arrivals, cancellations and preemptions as chance has it; what each request got."""
    upcoming = chance.sample(range(len(alone)), chance.randint(3, 8))
    numbers, got, cancelled = {}, {}, set()
    while upcoming or not engine.idle:
        if upcoming and chance.random() < 0.5:
            index = upcoming.pop()
            numbers[engine.submit(*alone[index][:2])] = index
            got[index] = []
        if numbers and chance.random() < 0.05:
            number = chance.choice(list(numbers))
            if engine.cancel(number):
                cancelled.add(numbers[number])
        for event in engine.step():
            if event.token is not None:
                got[numbers[event.request]].append(event.token)
    return got, cancelled


@pytest.mark.parametrize("part", range(4))
@pytest.mark.slow
def test_random_schedules(alone, part):
    """250 each; pages for about two of the sequences, so that rows are sent away and come back."""
    engine = make(Poisoned, pages=10, decode_steps=2)
    chance = random.Random(part)
    away = 0
    send = engine._send_away

    def count(request):
        nonlocal away
        away += request.state == "running"
        send(request)

    engine._send_away = count
    for _ in range(250):
        got, cancelled = run_schedule(engine, alone, chance)
        for index, tokens in got.items():
            whole = alone[index][2]
            if index in cancelled:
                assert tuple(tokens) == whole[: len(tokens)]
            else:
                assert tuple(tokens) == whole
        assert sorted(engine._free_pages) == list(range(10))
        assert engine._free_rows == list(range(4))
    assert away >= 10, "hardly anybody was sent away"


def test_no_program_is_compiled_after_the_first_of_its_kind(alone):
    engine = make(Poisoned, pages=16, decode_steps=2)
    chance = random.Random(9)
    for _ in range(20):
        run_schedule(engine, alone, chance)
    before = decoding.prefill._cache_size(), decoding.decode._cache_size()
    for _ in range(20):
        run_schedule(engine, alone, chance)
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == before


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


def test_padding_changes_no_more_than_rounding():
    """XLA's products on CPU round differently for 32 and for 64 rows, padding or not: 1e-6 of 3."""
    prompt = random_tokens(CONFIG, (1, 284), 3)[0]
    least = logits_of(prompt, [(256, 256), (32, 28)])
    for size in PADDED[1:]:
        more = logits_of(prompt, [(256, 256), (size, 28)])
        np.testing.assert_allclose(more, least, rtol=0, atol=5e-6)


def test_chunks_are_few_and_cover_the_prompt():
    sizes = set()
    for length in range(1, 5000, 7):
        left, begun = length, 0
        while left:
            size = chunk_size(left, 2048)
            assert begun % 256 == 0
            assert size <= 2048
            assert size >= left or size >= 256
            sizes.add(size)
            begun, left = begun + min(size, left), left - min(size, left)
    assert sizes == {*PADDED, 512, 1024, 2048}


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
    assert len(engine._free_pages) == engine.pool.num_pages
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


def test_bad_engines_are_refused():
    for options, message in [(dict(rows=0), "rows is 0"), (dict(chunk=300), "power of two"),
                             (dict(page_size=0), "page_size")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(**options)
