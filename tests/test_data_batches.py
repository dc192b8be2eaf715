"""Batches: every token once an epoch, the same order for all processes, exact resume."""

import collections
import json
import random
import shutil
import time
import warnings

import numpy as np
import pytest
from cpu_clock import cpu_seconds
from data_corpora import make_corpus, numbered

from mmx.data.batches import Batches
from mmx.data.mixing import Weights
from mmx.data.shards import ShardReader

RNG = np.random.default_rng(5)
SIZES = {s: np.exp(RNG.normal(m, 1.0, n)).astype(int) + 1
         for s, m, n in [("a", 4.0, 250), ("b", 3.0, 330), ("c", 5.0, 60)]}  # fmt: skip
EVEN = Weights.constant({"a": 1, "b": 1, "c": 1})
MIX = Weights(((0, {"a": 5, "b": 3, "c": 2}), (300, {"a": 1, "c": 4})), transition=200)
ARGUMENTS = {"seq_len": 128, "batch_size": 8, "weights": MIX, "seed": 11}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    documents, first = {}, 0
    for source, sizes in SIZES.items():
        documents[source] = numbered(sizes, first=first)
        first += int(sizes.sum())
    make_corpus(folder, documents)
    return folder


@pytest.fixture(autouse=True)
def quiet():
    """Sources of finite iterators end on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="source '.' has been read")
        yield


def documents():
    """Source and (first, last + 1) id of each document."""
    first = 0
    for s, source in enumerate(SIZES):
        for size in SIZES[source]:
            yield s, first, first + int(size)
            first += int(size)


def segments(batches):
    """(source, ids) of each segment, in order; checks that rows are well formed."""
    for batch in batches:
        for tokens, ids, sources in zip(*(batch[k] for k in BATCH), strict=True):
            used = int((ids > 0).sum())
            assert (ids[:used] > 0).all()  # padding is at the end
            assert (sources[used:] == -1).all()
            assert (tokens[used:] == 0).all()
            count = int(ids.max())
            assert (np.diff(ids[:used]) >= 0).all()
            assert set(ids[:used]) == set(range(1, count + 1))
            for number in range(1, count + 1):
                here = ids == number
                (source,) = set(sources[here])
                yield source, tokens[here]


BATCH = ("tokens", "segment_ids", "sources")


def equal(one, other):
    return all(np.array_equal(one[k], other[k]) for k in BATCH)


# ---------------------------------------------------------------- what is in the batches


@pytest.mark.parametrize("seq_len", [pytest.param(16, marks=pytest.mark.slow), 128, 100, 5000])
@pytest.mark.parametrize("epochs", [1, 2])
def test_every_token_once_an_epoch(corpus, seq_len, epochs):
    it = Batches(corpus, seq_len=seq_len, batch_size=4, weights=EVEN, seed=1, max_epochs=epochs)
    batches = list(it)
    assert it.source_names == tuple(SIZES)
    for batch in batches:
        assert sorted(batch) == sorted(BATCH)
        for array in batch.values():
            assert (array.shape, array.dtype) == ((4, seq_len), np.int32)
    starts = {first: (s, last) for s, first, last in documents()}
    documents_of = {i: (s, last) for s, first, last in documents() for i in range(first, last)}
    opened = collections.Counter()  # two epochs of a document may overlap
    seen = np.zeros(sum(map(sum, SIZES.values())), int)
    for source, ids in segments(batches):
        assert (np.diff(ids) == 1).all()
        seen[ids] += 1
        # A piece begins a document, or goes on where the last piece of it ended.
        if ids[0] in starts:
            where, last = starts[ids[0]]
        else:
            where, last = documents_of[ids[0]]
            assert opened[int(ids[0])] > 0
            opened[int(ids[0])] -= 1
        assert where == source
        assert ids[-1] < last
        if ids[-1] + 1 < last:
            assert len(ids) == seq_len
            opened[int(ids[-1]) + 1] += 1
    assert not +opened
    assert (seen == epochs).all()
    assert it.seen["tokens"] == {s: int(epochs * SIZES[s].sum()) for s in SIZES}
    assert it.seen["epochs"] == dict.fromkeys(SIZES, float(epochs))
    with pytest.raises(StopIteration):
        next(it)


def test_epochs_have_different_orders(corpus):
    it = Batches(corpus, seq_len=5000, batch_size=1, weights=EVEN, seed=1, max_epochs=2)
    firsts = [int(ids[0]) for source, ids in segments(it) if source == 0]
    half = len(firsts) // 2
    assert len(firsts) == 2 * len(SIZES["a"])
    assert firsts[:half] != firsts[half:]


def test_proportional_weights_use_all_sources_up_together(corpus):
    it = Batches(corpus, seq_len=128, batch_size=8, weights=None, seed=1)
    for _ in range(40):
        next(it)
    total = sum(map(sum, SIZES.values()))
    want = 40 * 8 * 128 / total
    for epochs in it.seen["epochs"].values():
        assert epochs == pytest.approx(want, rel=0.15)  # 0.8 of an epoch, documents up to 3 %


@pytest.mark.parametrize("seed", [1, 2])
def test_seed_decides_the_order(corpus, seed):
    one, other = (Batches(corpus, **{**ARGUMENTS, "seed": s}) for s in (1, seed))
    assert equal(next(one), next(other)) == (seed == 1)


# ---------------------------------------------------------------- processes and resume


@pytest.mark.parametrize("count", [2, 4])
def test_one_global_order_for_any_number_of_processes(corpus, count):
    whole = Batches(corpus, **ARGUMENTS)
    parts = [Batches(corpus, **ARGUMENTS, process_index=i, process_count=count)
             for i in range(count)]  # fmt: skip
    for _ in range(50):
        slices = [next(part) for part in parts]
        assert all(s["tokens"].shape == (8 // count, 128) for s in slices)
        joined = {k: np.concatenate([s[k] for s in slices]) for k in BATCH}
        assert equal(joined, next(whole))
    states = [part.get_state() for part in parts]
    assert all(state == whole.get_state() for state in states)
    assert parts[1].seen == whole.seen


@pytest.mark.parametrize("trials", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_resume_is_exact_at_random_steps(corpus, trials):
    it = Batches(corpus, **ARGUMENTS)
    states, batches, seen = [it.get_state()], [], [it.seen]
    for _ in range(120):
        batches.append(next(it))
        states.append(json.loads(json.dumps(it.get_state())))
        seen.append(it.seen)
    assert max(len(json.dumps(state)) for state in states) < 1000
    for step in random.Random(0).sample(range(118), trials):
        again = Batches(corpus, **ARGUMENTS)
        if step % 2:
            next(again)  # also where an iterator has gone on already
        again.set_state(states[step])
        assert again.get_state() == states[step]
        assert again.seen == seen[step]
        assert equal(next(again), batches[step])
        assert equal(next(again), batches[step + 1])
        assert again.get_state() == states[step + 2]


def test_resume_on_another_number_of_processes_and_batch_size(corpus):
    it = Batches(corpus, **ARGUMENTS)
    for _ in range(37):
        next(it)
    state, want = it.get_state(), [next(it), next(it)]
    arguments = {**ARGUMENTS, "batch_size": 16, "process_count": 2}
    for process in range(2):
        again = Batches(corpus, **arguments, process_index=process)
        again.set_state(state)
        assert equal(next(again), want[process])


def test_state_is_of_what_was_handed_out(corpus):
    """The thread runs ahead; the state must not."""
    slow, fast = Batches(corpus, **ARGUMENTS), Batches(corpus, **ARGUMENTS)
    slow.start_prefetch()
    time.sleep(0.3)
    assert slow.get_state() == fast.get_state()
    next(slow), next(fast)
    time.sleep(0.3)
    assert slow.get_state() == fast.get_state()
    assert slow.seen["samples"] == 8


def test_new_weights_begin_with_the_next_window(corpus):
    """Nothing of the window is lost or repeated; then only the new source comes."""
    it = Batches(corpus, **{**ARGUMENTS, "weights": EVEN})
    next(it)
    state = it.get_state()
    again = Batches(corpus, **{**ARGUMENTS, "weights": Weights.constant({"b": 1})})
    again.set_state(state)
    batches = [next(again) for _ in range(40)]
    same = [equal(batch, next(it)) for batch in batches]
    border = same.index(False)
    assert 20 <= border <= 40  # a window is 256 rows or a few more, 8 of them a batch
    assert not any(same[border:])
    for batch in batches[border + 1 :]:
        assert set(batch["sources"].ravel()) <= {1, -1}


def test_another_sequence_length_reads_no_token_twice(corpus):
    arguments = {"batch_size": 4, "weights": EVEN, "seed": 1, "max_epochs": 1}
    it = Batches(corpus, seq_len=32, **arguments)
    before = [next(it) for _ in range(13)]
    longer = Batches(corpus, seq_len=512, **arguments)
    longer.set_state(it.get_state())
    assert longer.seen == it.seen
    ids = np.concatenate([ids for _, ids in segments([*before, *longer])])
    assert len(ids) > 13 * 4 * 32
    assert np.unique(ids).size == ids.size


def test_state_of_other_data_is_refused(corpus, tmp_path):
    it = Batches(corpus, **ARGUMENTS)
    state = it.get_state()
    documents = {s: numbered(SIZES[s] + 1) for s in SIZES}
    make_corpus(tmp_path, documents)
    with pytest.raises(ValueError, match="other shards or another tokenizer"):
        Batches(tmp_path, **ARGUMENTS).set_state(state)
    with pytest.raises(ValueError, match="seed 11, this run 12"):
        Batches(corpus, **{**ARGUMENTS, "seed": 12}).set_state(state)
    for junk in ({}, None, {**state, "version": 99}):
        with pytest.raises(ValueError, match="no state"):
            it.set_state(junk)
    with pytest.raises(ValueError, match="damaged"):
        it.set_state({**state, "cursor": {}})
    assert equal(next(it), next(Batches(corpus, **ARGUMENTS)))  # unharmed


# ---------------------------------------------------------------- lengths and speed


def test_a_million_tokens_a_row(tmp_path):
    sizes = {"long": [2_500_000, 300_000], "short": [2000] * 800}
    long, short = numbered(sizes["long"]), numbered(sizes["short"], first=2_800_000)
    make_corpus(tmp_path, {"long": long, "short": short})
    it = Batches(tmp_path, seq_len=1 << 20, batch_size=1, weights=None, seed=1, max_epochs=1)
    batches = list(it)
    assert len(batches) == 5  # 4.4 million tokens
    ids = np.concatenate([ids for _, ids in segments(batches)])
    np.testing.assert_array_equal(np.sort(ids), np.arange(4_400_000))


def test_loader_is_faster_than_a_model(corpus):
    """The demo model consumes up to 10,000 tokens/s; five times that, with room to spare."""
    it = Batches(corpus, seq_len=512, batch_size=16, weights=EVEN, seed=1)
    next(it)
    start = cpu_seconds()
    for _ in range(30):
        next(it)
    assert 30 * 16 * 512 / (cpu_seconds() - start) > 100_000


def test_a_long_document_is_read_from_disk_once(tmp_path, monkeypatch):
    make_corpus(tmp_path, {"a": numbered([10_000, 10_000])})  # rows of two windows
    reads = []
    read = ShardReader.read

    def noted(reader, index, **length):
        # The threads of other tests' batches may still be reading theirs.
        if reader._path.is_relative_to(tmp_path):
            reads.append(index)
        return read(reader, index, **length)

    monkeypatch.setattr(ShardReader, "read", noted)
    it = Batches(tmp_path, seq_len=64, batch_size=1, weights=None, seed=1, max_epochs=1)
    assert len(list(it)) in (313, 314)
    assert sorted(reads) == [0, 1]


# ---------------------------------------------------------------- bad input


def test_a_source_that_ends_says_so(corpus):
    it = Batches(corpus, seq_len=64, batch_size=4, weights=EVEN, seed=1, max_epochs={"a": 1})
    message = "source 'a' has been read 1 times by sample"
    with pytest.warns(UserWarning, match=message):  # noqa: PT031
        while it.seen["epochs"]["a"] < 1 or it.seen["epochs"]["b"] < 2:
            next(it)
    batch = next(it)
    assert 0 not in batch["sources"]
    assert it.seen["epochs"]["a"] == 1


def test_the_last_batch_is_filled_up_with_padding(tmp_path):
    make_corpus(tmp_path, {"a": numbered([10, 10, 10])})
    it = Batches(tmp_path, seq_len=10, batch_size=2, weights=None, seed=0, max_epochs=1)
    first, last = it
    assert (first["segment_ids"] == 1).all()
    assert (last["segment_ids"] == [[1] * 10, [0] * 10]).all()
    assert (last["sources"][1] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"process_count": 3}, "must divide the batch"),
        ({"process_index": 1}, "index must be below the count"),
        ({"split": "test"}, "'test'; choose one of train, heldout"),
        ({"split": "heldout"}, "'heldout' is empty"),
        ({"weights": Weights.constant({"d": 1})}, "'d'.*The corpus has a, b, c"),
        ({"max_epochs": 0}, "at least 1"),
        ({"max_epochs": {"x": 1}}, "'x'"),
    ],
)
def test_bad_arguments(corpus, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Batches(corpus, **{**ARGUMENTS, **arguments})
    assert "\n" not in str(caught.value)


def test_a_weight_on_a_source_without_text(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "c")
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    moved = [s for s in manifest["splits"]["train"] if s["source"] == "c"]
    manifest["splits"]["heldout"] = moved
    manifest["splits"]["train"] = [s for s in manifest["splits"]["train"] if s not in moved]
    (tmp_path / "c/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="'c' has a weight, but no text in the split 'train'"):
        Batches(tmp_path / "c", **ARGUMENTS)
