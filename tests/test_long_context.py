"""Long documents from a corpus: their lengths, facts and questions, shares, and the same bytes."""

import hashlib
import json
import random
import re

import numpy as np
import pytest

from mmx.data import embedded
from mmx.data import tokenizer as bpe
from mmx.data.batches import Batches
from mmx.data.corpus import build_corpus
from mmx.data.facts import fact, filler, line_starts, question, scatter
from mmx.data.long_context import build_long_corpus, extension_weights
from mmx.data.parts import Recipe
from mmx.data.shards import Manifest, ShardReader, read_lengths

FACT = re.compile(r"^The number of (\w+) is (\d{4})\.$", re.MULTILINE)
ASKED = re.compile(r"^What is the number of (\w+)\? It is (\d{4})\.$", re.MULTILINE)
LENGTHS = (512, 2048)


def code(number, lines):
    """A small program with indented lines, blank ones, letters beyond ASCII; no line twice."""
    draw = random.Random(number)
    made = [f"# file {number}: ünïcødé 日本語"]
    for i in range(lines):
        made.append(f"{'    ' * draw.choice([0, 1, 1, 2])}x_{number}_{i} = {draw.random()!r}")
        made += [""] * draw.choice([0, 0, 0, 1, 2])
    return "\n".join(made) + "\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    texts = [code(i, 5 if i % 3 else 60) for i in range(120)]
    (root / "code.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    draw = random.Random(0)
    facts = [
        "".join(fact("Oslo", draw.randrange(1000, 9999)) + "\n" for _ in range(9))
        for _ in range(60)
    ]
    (root / "synthetic.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in facts))
    inputs = (str(root / "code.jsonl"), str(root / "synthetic.jsonl"))
    return build_corpus(Recipe(inputs, vocab_size=400, heldout=0.2), root / "corpus")


def build(base, out, **changes):
    arguments = {"lengths": LENGTHS, "documents": 12, "seed": 5, "workers": 1}
    return build_long_corpus(base.folder, out, **{**arguments, **changes})


@pytest.fixture(scope="module")
def long(base, tmp_path_factory):
    return build(base, tmp_path_factory.mktemp("long") / "corpus")


def texts_of(manifest, source=None, split="train"):
    tokenizer = bpe.load_tokenizer(manifest.tokenizer_file)
    texts = []
    for shard in manifest.splits[split]:
        if source in (None, shard.source):
            lengths = read_lengths(manifest.folder, shard)
            reader = ShardReader(manifest.folder, shard)
            texts += [
                tokenizer.decode(reader.read(i, length=int(n)).ids[:-1].tolist())
                for i, n in enumerate(lengths)
            ]
    return texts


def lengths_of(manifest, source):
    shards = [shard for shard in manifest.splits["train"] if shard.source == source]
    return np.concatenate([read_lengths(manifest.folder, shard) for shard in shards])


def digests(folder):
    files = [file for file in folder.rglob("*") if file.suffix in (".arrayrecord", ".lengths")]
    files += [folder / "manifest.json", folder / "tokenizer.json"]
    return {f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["text", "qa"])
def test_documents_fill_their_length_and_never_exceed_it(long, kind, length):
    sizes = lengths_of(long, f"long-{kind}-{length}")
    assert len(sizes) == 12
    assert sizes.max() <= length
    # A line of the base has at most 40 tokens of this small tokenizer; one is missing at the end
    # and a document that lost another one to the joints.
    assert sizes.min() > length - 80


def test_short_text_is_short_and_no_more_than_the_long(long):
    sizes = lengths_of(long, "short-text")
    assert sizes.max() <= LENGTHS[0] // 4
    assert 0.9 * 12 * sum(LENGTHS) < sizes.sum() < 1.1 * 12 * sum(LENGTHS) + LENGTHS[0]


def test_text_is_that_of_the_train_split_alone(base, long):
    seen = {line for text in texts_of(base) for line in text.split("\n")}
    unseen = {line for text in texts_of(base, split="heldout") for line in text.split("\n")} - seen
    assert len(unseen) > 200
    for source in ("short-text", "long-text-512", "long-text-2048"):
        texts = texts_of(long, source)
        lines = [line for text in texts for line in text.split("\n")]
        assert not unseen & set(lines)
        assert np.mean([line in seen for line in lines]) > 0.97  # but for lines that are cut
        assert ("The number of" in "".join(texts)) == (source == "short-text")
    assert not long.splits["heldout"]


def test_joined_documents_are_neighbours(base, long):
    """Files in a document follow each other as in the base."""
    several = 0
    order = [int(n) for text in texts_of(base, "code") for n in re.findall(r"^# file (\d+)", text)]
    for text in texts_of(long, "long-text-2048"):
        files = list(dict.fromkeys(re.findall(r"^x_(\d+)_|# file (\d+)|    x_(\d+)_", text, re.M)))
        numbers = list(dict.fromkeys(int("".join(groups)) for groups in files))
        several += len(numbers) > 2
        first = order.index(numbers[0])
        assert numbers == [order[(first + i) % len(order)] for i in range(len(numbers))]
    assert several > 6


@pytest.mark.parametrize("length", LENGTHS)
def test_every_question_has_its_fact_once_and_its_answer(long, length):
    depths, generated = [], 0
    for text in texts_of(long, f"long-qa-{length}"):
        facts, asked = FACT.findall(text), ASKED.findall(text)
        assert len(facts) == len(asked) >= 4
        assert dict(facts) == dict(asked)
        assert len(dict(facts)) == len(facts)
        # Questions are the end of the document, and nothing but questions.
        end = text[text.index("What is the number of") :]
        assert len(end.splitlines()) == len(asked)
        body = len(text) - len(end)
        depths += [match.start() / body for match in FACT.finditer(text)]
        generated += "x_" not in text
    assert generated == 6  # every second
    # Uniform over the text: a quarter in each quarter, of 12 * (4 to 16) facts.
    shares = np.histogram(depths, 4, (0, 1))[0] / len(depths)
    np.testing.assert_allclose(shares, 0.25, atol=0.1)


def test_questions_are_not_in_the_order_of_the_facts(long):
    texts = texts_of(long, "long-qa-2048")
    same = [FACT.findall(text) == ASKED.findall(text) for text in texts]
    assert sum(same) <= 2  # 4! orders at least


def test_the_words_are_those_of_the_synthetic_source():
    """Facts and questions written here are letter by letter what `embedded.py` writes."""
    units = [unit for unit in embedded.find_embedded() if unit.kind == "synthetic"]
    text = "".join(document.text for document in embedded.read_embedded(units[0]))
    places = FACT.findall(text)
    questions = ASKED.findall(text)
    assert len(places) > 50
    assert len(questions) > 50
    for place, number in places:
        assert f"{fact(place, int(number))}\n" in text
    for place, number in questions:
        assert f"{question(place)}{number}.\n" in text


# ---------------------------------------------------------------- the same bytes


def test_bytes_depend_on_neither_workers_nor_interruptions(base, long, tmp_path):
    want = digests(long.folder)
    build(base, tmp_path / "two", workers=2)
    assert digests(tmp_path / "two") == want
    # As a kill would leave it: one input not noted as done, one source without its shards; and one
    # input damaged.
    out = tmp_path / "two"
    (out / "manifest.json").unlink()
    (out / "input/long-qa-512.json").unlink()
    half = out / "input/long-text-512.jsonl"
    half.write_bytes(half.read_bytes()[:999])
    for file in (out / "train").glob("long-text-2048*"):
        file.unlink()
    build(base, out)
    assert digests(out) == want


def test_what_is_done_is_kept(base, tmp_path):
    build(base, tmp_path, documents=2)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    build(base, tmp_path, documents=2)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == times


def test_another_seed_gives_other_documents(base, long, tmp_path):
    other = build(base, tmp_path, seed=6)
    for source in long.sources:
        assert set(texts_of(long, source)) != set(texts_of(other, source))


def test_manifest_and_tokenizer_are_usable(base, long):
    assert long.tokenizer_sha256 == base.tokenizer_sha256
    assert long.end_id == base.end_id
    long.verify()
    weights = extension_weights(LENGTHS, (20, 20), mixes=((0.3, 0.7, 0), (0.35, 0.35, 0.3)))[1]
    data = Batches(long.folder, seq_len=2048, batch_size=2, weights=weights, seed=0)
    batch = next(data)
    data.close()
    assert batch["tokens"].shape == (2, 2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "must rise"),
        ({"lengths": (64, 512)}, "from 128 tokens"),
        ({"lengths": (512, 512)}, "must rise"),
        ({"lengths": (2048, 512)}, "must rise"),
        ({"documents": 0}, "at least one"),
    ],
)
def test_bad_arguments_are_refused(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(base, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no finished corpus"):
        Manifest.load(tmp_path / "out")


def test_a_base_without_text_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="is the base itself"):
        build(base, base.folder)
    with pytest.raises(ValueError, match="no finished corpus"):
        build_long_corpus(tmp_path, tmp_path / "out", lengths=(512,), documents=1, seed=0,
                          workers=1)  # fmt: skip
    (tmp_path / "synthetic.jsonl").write_text(json.dumps({"text": "1+1=2"}) + "\n")
    inputs = (str(tmp_path / "synthetic.jsonl"),)
    sums = build_corpus(Recipe(inputs, vocab_size=300, heldout=0), tmp_path / "sums")
    with pytest.raises(ValueError, match="but 'synthetic'"):
        build(sums, tmp_path / "out")


# ---------------------------------------------------------------- facts in a text


def test_lines_are_put_where_they_belong(base):
    tokenizer = bpe.load_tokenizer(base.tokenizer_file)
    ids = filler(random.Random(1).random, tokenizer, 500)
    assert len(ids) >= 500
    lines = tokenizer.decode(ids.tolist()).splitlines()
    starts = line_starts(tokenizer, ids)
    assert starts[0] == 0
    assert starts[-1] == len(ids)
    assert len(starts) == len(lines) + 1
    inserts = [(d, bpe.encode(tokenizer, f"<{d}>\n")) for d in (1.0, 0.0, 0.5)]
    found = tokenizer.decode(scatter(ids, starts, inserts).tolist()).splitlines()
    assert found[0] == "<0.0>"
    assert found[-1] == "<1.0>"
    middle = found.index("<0.5>")
    assert [line for line in found if line[0] != "<"] == lines
    before = len(bpe.encode(tokenizer, "\n".join(found[1:middle]) + "\n"))
    assert abs(before - len(ids) / 2) < np.diff(starts).max()


# ---------------------------------------------------------------- shares


def test_three_stages_have_the_shares_of_the_paper():
    """Table 6 of the paper; 10 % questions of the stage's length in the last fifth."""
    stages = extension_weights((1024, 4096, 16384), (1000, 500, 200))
    names = ("short-text", "long-text-1024", "long-text-4096", "long-text-16384",
             "long-qa-1024", "long-qa-4096", "long-qa-16384")  # fmt: skip

    def shares(stage, sample):
        at = stages[stage].at(sample)
        assert abs(sum(at.values()) - 1) < 1e-12
        return [at.get(name, 0.0) for name in names]

    def near(stage, sample, want):
        np.testing.assert_allclose(shares(stage, sample), want, rtol=0, atol=1e-12)

    near(0, 0, [0.30, 0.70, 0, 0, 0, 0, 0])
    near(0, 799, [0.30, 0.70, 0, 0, 0, 0, 0])
    near(0, 825, [0.285, 0.665, 0, 0, 0.05, 0, 0])  # half of the transition of 50
    near(0, 850, [0.27, 0.63, 0, 0, 0.1, 0, 0])
    near(0, 999, [0.27, 0.63, 0, 0, 0.1, 0, 0])
    near(1, 0, [0.27, 0.63, 0, 0, 0.1, 0, 0])  # as the stage before ended
    near(1, 1 + 10, [0.302, 0.518, 0.12, 0, 0.06, 0, 0])  # 10 of 25 on the way
    near(1, 26, [0.35, 0.35, 0.30, 0, 0, 0, 0])
    near(1, 399, [0.35, 0.35, 0.30, 0, 0, 0, 0])
    near(1, 425, [0.315, 0.315, 0.27, 0, 0, 0.1, 0])
    near(2, 0, [0.315, 0.315, 0.27, 0, 0, 0.1, 0])
    near(2, 11, [0.30, 0.30, 0, 0.40, 0, 0, 0])
    near(2, 199, [0.27, 0.27, 0, 0.36, 0, 0, 0.1])


@pytest.mark.parametrize(
    ("lengths", "samples", "transition", "message"),
    [
        ((512, 1024), (10, 10, 10), 0.05, "one of each for every stage"),
        ((512, 1024, 2048), (10, 4, 10), 0.05, "at least 5 samples"),
        ((512, 1024, 2048), (10, 10, 10), 0.3, "transition must be in"),
        ((512, 256, 2048), (10, 10, 10), 0.05, "must rise"),
    ],
)
def test_bad_stages_are_refused(lengths, samples, transition, message):
    with pytest.raises(ValueError, match=message):
        extension_weights(lengths, samples, transition=transition)


@pytest.mark.parametrize("samples", [5, 6, 7, 9, 23, 1000])
def test_any_number_of_samples_makes_a_stage(samples):
    lengths = (512, 1024, 2048)
    for length, weights in zip(
        lengths, extension_weights(lengths, (samples,) * 3, transition=0.2), strict=True
    ):
        name = f"long-qa-{length}"
        assert weights.at(samples // 2)[name] == 0
        assert weights.at(samples)[name] == pytest.approx(0.1, abs=1e-12)


def test_documents_whose_tokens_change_where_they_are_cut_fit_too(tmp_path):
    """Between line break and indentation of one space; a fact there makes two tokens of one."""
    draw = random.Random(0)
    text = "\n".join(f"\n {draw.choice('abcd')}" for _ in range(4000))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    inputs = (str(tmp_path / "t.jsonl"),)
    base = build_corpus(Recipe(inputs, vocab_size=300, heldout=0), tmp_path / "base")
    tokenizer = bpe.load_tokenizer(base.tokenizer_file)
    assert len(bpe.encode(tokenizer, "\n\n a")) == 2
    assert len(bpe.encode(tokenizer, "\n\nThe")) == len(bpe.encode(tokenizer, "The")) + 2
    manifest = build(base, tmp_path / "out", lengths=(1024,))
    sizes = lengths_of(manifest, "long-qa-1024")
    assert sizes.min() > 970
    assert sizes.max() <= 1024


def test_facts_fit_documents_of_a_tokenizer_of_bytes(base, tmp_path):
    """The most tokens that text can have: a fact with its question has 77 at worst."""
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": code(0, 99)}) + "\n")
    inputs = (str(tmp_path / "t.jsonl"),)
    bytes_ = build_corpus(Recipe(inputs, vocab_size=258, heldout=0), tmp_path / "base")
    manifest = build(bytes_, tmp_path / "out", lengths=(128, 1024), documents=30)
    for length, least in ((128, 1), (1024, 4)):
        assert lengths_of(manifest, f"long-qa-{length}").max() <= length
        for text in texts_of(manifest, f"long-qa-{length}"):
            assert len(FACT.findall(text)) >= least
            assert dict(FACT.findall(text)) == dict(ASKED.findall(text))
