"""Prefixes that are kept: the same bits as without them, whatever comes and goes."""

import hashlib
import random

import numpy as np
import pytest
from engines import CONFIG, PAGE, PARAMS, Poisoned, make, run_schedule
from random_models import random_tokens

from mmx.inference import engine as engines
from mmx.inference import snapshots
from mmx.inference.page_store import PageStore
from mmx.inference.requests import Sampling
from mmx.inference.snapshots import Snapshots

OPTIONS = dict(max_seq_len=640, pages=256, chunk=256, decode_steps=2)


@pytest.fixture(scope="module")
def alone():
    """Prompts of three documents, cut at various lengths, and what each gives without prefixes."""
    documents = random_tokens(CONFIG, (3, 600), 5)
    chance = random.Random(2)
    made = []
    for index in range(12):
        length = chance.choice([130, 255, 256, 257, 300, 511, 512, 513, 560])
        prompt = documents[index % 3, :length].tolist()
        prompt += random_tokens(CONFIG, (1, chance.randint(1, 20)), index)[0].tolist()
        drawn = dict(temperature=0.8, seed=index) if index % 2 else {}
        sampling = Sampling(max_new_tokens=chance.randint(2, 12), logprobs=2, **drawn)
        made.append((prompt, sampling))
    engine = make(snapshots=0, **OPTIONS)
    return [(p, s, engine.generate([p], s)[0]) for p, s in made]


def test_digests_are_of_the_prompt_whatever_was_looked_up_before():
    kept = Snapshots(CONFIG, 0, PageStore(4), PAGE, 4)
    long, other = np.arange(5000, dtype=np.int32), np.arange(1, 5001, dtype=np.int32)
    for prompt, until in ((long, 1000), (long, 300), (long, 4096), (other, 900), (long, 5000)):
        wanted = [
            (end, hashlib.sha256(prompt[:end].astype("<i4").tobytes()).digest())
            for end in range(kept.step, until + 1, kept.step)
        ]
        assert kept._keys(prompt, until) == wanted


def test_a_hit_gives_the_bits_of_a_miss(alone):
    engine = make(Poisoned, **OPTIONS)
    for prompt, sampling, wanted in [*alone, *alone]:
        assert engine.generate([prompt], sampling)[0] == wanted  # log-probabilities too
    assert engine.snapshots.hits >= len(alone)
    assert engine.snapshots.saved_tokens >= 256 * len(alone)
    engine.snapshots.clear()
    assert engine.pages.free == engine.pool.num_pages


def test_a_hit_reads_what_is_new_and_no_more(monkeypatch):
    """The time to the first token, counted in tokens read: at 32K 32,769 against at most 257."""
    read = []

    def counted(params, pool, tokens, count, *rest, original=engines.prefill, **options):
        read.append(int(count))
        return original(params, pool, tokens, count, *rest, **options)

    monkeypatch.setattr(engines, "prefill", counted)
    engine = make(**OPTIONS)
    prompt = random_tokens(CONFIG, (1, 600), 3)[0].tolist()
    first, second = [], []
    for found, last in ((first, 1), (second, 2)):
        engine.generate([[*prompt, last]], max_new_tokens=1)
        found += read
        read.clear()
    assert (sum(first), sum(second)) == (601, 601 - 512)
    assert sum(first) >= 5 * sum(second)
    assert (len(first), len(second)) == (3, 1)


@pytest.mark.parametrize("count", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_random_schedules_with_prefixes(alone, count):
    """Pages for about two sequences and slots for two prefixes, which others evict."""
    engine = make(Poisoned, snapshots=2, **{**OPTIONS, "pages": 90})
    known = [(p, s, r.tokens) for p, s, r in alone]
    chance = random.Random(4)
    for _ in range(count):
        got, cancelled = run_schedule(engine, known, chance)
        for index, tokens in got.items():
            whole = known[index][2]
            assert tuple(tokens) == (whole[: len(tokens)] if index in cancelled else whole)
    assert engine.snapshots.hits >= count // 3
    engine.snapshots.clear()
    assert engine.pages.free == 90


def test_a_prefix_that_changes_in_one_token_is_another():
    engine = make(**OPTIONS)
    prompt = random_tokens(CONFIG, (1, 300), 8)[0]
    engine.generate([prompt.tolist()], max_new_tokens=1)
    assert engine.snapshots.find(prompt) is not None
    for place in (0, 100, 255):
        other = prompt.copy()
        other[place] = (other[place] + 1) % CONFIG.vocab_size
        assert engine.snapshots.find(other) is None
    assert engine.snapshots.find(prompt[:256]) is None  # a token must be left to read
    assert engine.snapshots.find(prompt[:257]).tokens == 256


@pytest.mark.parametrize(("every", "kept"), [(16_384, [512]), (256, [256, 512])])
def test_where_prefixes_are_kept(monkeypatch, every, kept):
    """At the last whole step of a prompt, and at intervals of a long one."""
    monkeypatch.setattr(snapshots, "EVERY", every)
    engine = make(**OPTIONS)
    prompt = random_tokens(CONFIG, (1, 600), 3)[0]
    engine.generate([prompt.tolist()], max_new_tokens=1)
    assert sorted(s.tokens for s in engine.snapshots._kept.values()) == kept


def test_what_saves_least_goes_first():
    pages = PageStore(64)
    kept = Snapshots(CONFIG, 2, pages, 256, 4)
    pool = make().pool
    prompts = random_tokens(CONFIG, (4, 3000), 1)

    def keep(row, length):
        held = pages.take(length // 256)
        kept.keep(pool, 0, prompts[row, : length + 1], length, held)
        pages.give(held)

    keep(0, 256)
    keep(1, 2560)
    assert pages.free == 64 - 1 - 10
    keep(2, 1024)  # the short one saves least a byte: its state is as large as any
    assert sorted(s.tokens for s in kept._kept.values()) == [1024, 2560]
    for _ in range(30):  # one that is of no use any more goes, however long it is
        snapshot = kept.find(prompts[2, :1025])
        pool = kept.begin(pool, 0, snapshot)
    keep(3, 512)
    assert sorted(s.tokens for s in kept._kept.values()) == [512, 1024]
    kept.clear()
    assert pages.free == 64


def test_pages_are_shared_until_the_last_holder():
    pages = PageStore(4)
    held = pages.take(3)
    assert pages.take(2) is None
    pages.share(held[:1])
    assert pages.give(held) == held[1:]
    assert pages.free == 3
    assert pages.give(held[:1]) == held[:1]
    assert sorted(pages.take(4)) == [0, 1, 2, 3]


def test_state_slots_hold_what_the_row_held():
    engine = make(**OPTIONS)
    prompt = random_tokens(CONFIG, (1, 257), 8)[0].tolist()
    number = engine.submit(prompt, Sampling(max_new_tokens=4))
    engine._let_in()
    engine._read(engine._at_work[0], 256)
    [snapshot] = engine.snapshots._kept.values()
    states = np.asarray(engine.pool.lightning_states[:, engine._at_work[0].row])
    np.testing.assert_array_equal(engine.snapshots.states[:, snapshot.slot], states)
    assert np.abs(states).max() > 0
    assert snapshot.pages == engine._at_work[0].pages[: 256 // PAGE]
    engine.cancel(number)


def test_no_slots_keep_nothing():
    engine = make(snapshots=0, **OPTIONS)
    prompt = random_tokens(CONFIG, (1, 300), 8)[0].tolist()
    first, second = (engine.generate([prompt], max_new_tokens=2)[0].tokens for _ in range(2))
    assert first == second
    assert engine.snapshots.hits == 0
    assert engine.pages.free == engine.pool.num_pages
    with pytest.raises(ValueError, match="snapshots is -1"):
        make(snapshots=-1)
    assert PARAMS is engine.params
