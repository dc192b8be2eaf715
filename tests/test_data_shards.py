"""Shards: what is written is read, and no damage passes for data."""

import json
import random
import re

import numpy as np
import pytest
from data_corpora import make_corpus, numbered

from mmx.cli import main
from mmx.data.batches import Batches
from mmx.data.shards import Manifest, Record, ShardReader, decode_record, encode_record

SIZES = [1, 700, 30, 2000, 5]


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus", {"a": numbered(SIZES), "b": numbered([40] * 9)})


def epoch(folder):
    it = Batches(folder, seq_len=256, batch_size=2, weights=None, seed=3, max_epochs=1)
    return [batch["tokens"] for batch in it]


def test_record_by_hand():
    """The layout in the docstring: a reader in another language relies on it."""
    record = Record("web", "ü", np.array([1, 2**31], np.uint32))
    data = encode_record(record)
    assert data[:4] == b"MMXD"
    assert data[4:12] == bytes([3, 0, 2, 0, 2, 0, 0, 0])
    assert data[16:] == b"web" + "ü".encode() + bytes([1, 0, 0, 0, 0, 0, 0, 128])
    again = decode_record(data)
    assert again[:2] == record[:2]
    np.testing.assert_array_equal(again.ids, record.ids)


def test_every_flipped_bit_of_a_record_is_found():
    data = encode_record(Record("s", "d", np.arange(3, dtype=np.uint32)))
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="record"):
            decode_record(bytes(broken))


def test_records_come_back(corpus):
    for shard in corpus.splits["train"]:
        reader = ShardReader(corpus.folder, shard)
        sizes = SIZES if shard.source == "a" else [40] * 9
        for i, want in enumerate(numbered(sizes)):
            record = reader.read(i, length=len(want))
            assert record[:2] == (shard.source, f"{shard.source}:{i}")
            np.testing.assert_array_equal(record.ids, want)
    corpus.verify()
    assert Manifest.load(corpus.folder) == corpus
    assert corpus.tokens("train") == {"a": sum(SIZES), "b": 360}
    assert corpus.tokens("heldout") == {"a": 0, "b": 0}


def test_a_flipped_bit_is_never_data(corpus):
    """In any file of the split: an error that names it, when it is opened or read."""
    want = epoch(corpus.folder)
    draw = random.Random(1)
    files = [f for s in corpus.splits["train"] for f in (s.file, s.lengths_file)]
    found = 0
    for _ in range(60):
        path = corpus.folder / draw.choice(files)
        whole = path.read_bytes()
        broken = bytearray(whole)
        # Small shards are zeros mostly, to the next 64 KiB.
        place = draw.choice([i for i, byte in enumerate(whole) if byte])
        broken[place] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        message = outcome(corpus.folder, want)
        if message:  # else it is a byte that says nothing, and the data are right
            assert str(path) in message
            assert "\n" not in message
            found += 1
        with pytest.raises(ValueError, match=path.name):
            corpus.verify()
        path.write_bytes(whole)
    assert found >= 50
    assert outcome(corpus.folder, want) == ""


def outcome(folder, want):
    """The error of reading everything; "" if all is as wanted."""
    try:
        got = epoch(folder)
    except ValueError as error:
        return str(error)
    return "" if all(map(np.array_equal, got, want)) else "wrong data"


@pytest.mark.parametrize("kept", [0, 1, 100, -1, None])
@pytest.mark.parametrize("attribute", ["file", "lengths_file"])
def test_truncated_and_missing_files_are_named_at_once(corpus, kept, attribute):
    path = corpus.folder / getattr(corpus.splits["train"][0], attribute)
    if kept is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: kept if attribute == "file" else min(kept, 1)])
    with pytest.raises(ValueError, match=path.name) as caught:
        Batches(corpus.folder, seq_len=8, batch_size=1, weights=None, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [[3, 8], [8, 3]])
def test_shards_that_changed_places_are_noticed(tmp_path, other):
    """Whole files of the same size, but not where the manifest has them."""
    corpus = make_corpus(tmp_path, {"a": numbered([3, 8]), "b": numbered(other)})
    one, two = (tmp_path / shard.file for shard in corpus.splits["train"])
    data = one.read_bytes()
    assert len(data) == two.stat().st_size
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(ValueError, match="is another document"):
        epoch(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "corrupt"),
        (lambda text: text[:100], "corrupt"),
        (lambda text: "[]", "format"),
        (lambda text: json.dumps({**json.loads(text), "format": 99}), "format"),
        (lambda text: json.dumps({**json.loads(text), "splits": {}}), "corrupt"),
        (lambda text: json.dumps({**json.loads(text), "extra": 1}), "'extra'"),
        (lambda text: '{"recipe": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deep"),
    ],
)
def test_bad_manifests(corpus, change, message):
    path = corpus.folder / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"{path}: .*{message}") as caught:
        Manifest.load(corpus.folder)
    assert "\n" not in str(caught.value)


WRONG = {
    "tokenizer_sha256": 3, "vocab_size": "64", "end_id": -1, "recipe": [], "skipped": {"bad": "1"},
    "splits": [], "train": {}, "file": 7, "source": None, "documents": "5", "tokens": 2.5,
    "bytes": True, "sha256": ["a"], "lengths_sha256": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_members_of_the_wrong_type_are_named(corpus, field, capsys):
    path = corpus.folder / "manifest.json"
    data = json.loads(path.read_text())
    where = {"train": data["splits"]}.get(field, data)
    where = where if field in where else where["splits"]["train"][1]
    where[field] = WRONG[field]
    path.write_text(json.dumps(data))
    assert main(["data", "verify", str(corpus.folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    name = {"skipped": "bad"}.get(field, field)
    of = "shard 1 of 'train'" if "file" in where else ""
    assert re.search(f"{path}: .*{name}.*{of}.* is wanted.*mmx data build", error), error


@pytest.mark.parametrize("file", ["/etc/a.arrayrecord", "train/../../a.arrayrecord"])
def test_shards_lie_below_their_folder(corpus, file):
    path = corpus.folder / "manifest.json"
    data = json.loads(path.read_text())
    data["splits"]["train"][0]["file"] = file
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="'file' of shard 0 of 'train' leads out of the folder"):
        Manifest.load(corpus.folder)


def test_an_unfinished_folder_says_how_to_finish_it(corpus):
    (corpus.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="mmx data build --out"):
        Manifest.load(corpus.folder)
    with pytest.raises(ValueError, match="no finished corpus"):
        Manifest.load(corpus.folder / "nowhere")
