"""Text to shards: every document once, the same bytes always, one line for bad input."""

import gzip
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from cpu_clock import cpu_seconds

from mmx.data import tokenizer as bpe
from mmx.data.batches import Batches
from mmx.data.corpus import build_corpus, build_default
from mmx.data.documents import Reading, find_units, read_documents
from mmx.data.parts import Recipe
from mmx.data.shards import Manifest, ShardReader, ShardWriter, read_lengths

RNG = np.random.default_rng(0)
WORDS = ["alpha", "Bärenfell", "x = 41", "naïve", "日本語", "the", "of", "\tfoo()", "<|x|>"]


def text(words):
    return " ".join(RNG.choice(WORDS, size=words)) + f" {RNG.integers(10**9)}\n"


TEXTS = {
    "web": [text(n) for n in RNG.integers(5, 80, 300)],
    "notes": [text(n) for n in RNG.integers(5, 300, 40)],
    "old": [text(30) for _ in range(30)],
    "table": [text(30) for _ in range(70)],
    "named": [text(9) for _ in range(25)],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """All kinds of input, as arguments of --input."""
    root = tmp_path_factory.mktemp("inputs")
    rows = [{"text": t} for t in TEXTS["web"]]
    rows[10:10] = [{"text": ""}, {"text": " \n"}]
    rows += [{"text": t, "source": "named", "id": f"n{i}"} for i, t in enumerate(TEXTS["named"])]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    (root / "web.jsonl").write_text("\n".join(lines[:50]) + "\n\n" + "\n".join(lines[50:]))
    (root / "notes/sub").mkdir(parents=True)
    for i, t in enumerate(TEXTS["notes"]):
        (root / "notes" / ("sub" if i % 2 else ".") / f"{i}.md").write_text(t)
    (root / "notes/picture.png").write_bytes(b"\0\1")
    with gzip.open(root / "old.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in TEXTS["old"])
    table = pyarrow.table({"text": TEXTS["table"], "other": list(range(70))})
    pyarrow.parquet.write_table(table, root / "part-0.parquet", row_group_size=20)
    return (str(root / "web.jsonl"), str(root / "notes"), str(root / "old.jsonl.gz"),
            f"table={root / 'part-0.parquet'}")  # fmt: skip


def recipe(inputs, **options):
    return Recipe(inputs=inputs, **{"vocab_size": 300, "part_bytes": 3000} | options)


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    build_corpus(recipe(inputs), folder)
    return folder


def contents(folder):
    """SHA-256 of every file, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def records(folder, split):
    manifest = Manifest.load(folder)
    for shard in manifest.splits[split]:
        reader = ShardReader(folder, shard)
        for i, length in enumerate(read_lengths(folder, shard)):
            yield reader.read(i, length=int(length))


# ---------------------------------------------------------------- what is in the shards


def test_every_document_once_and_readable(built):
    """Decoded by the tokenizer's own decoder, all texts are there, in their sources."""
    manifest = Manifest.load(built)
    tokenizer = bpe.load_tokenizer(built / "tokenizer.json")
    found = {split: list(records(built, split)) for split in ("train", "heldout")}
    got = Counter()
    for record in (r for rs in found.values() for r in rs):
        assert record.ids[-1] == manifest.end_id == tokenizer.token_to_id("<end_of_sentence>")
        assert manifest.end_id not in record.ids[:-1]
        got[record.source, tokenizer.decode(record.ids[:-1].tolist())] += 1
    assert got == Counter((s, t) for s, ts in TEXTS.items() for t in ts)
    assert manifest.skipped == {"empty": 2}
    names = [record.document for rs in found.values() for record in rs]
    assert len(set(names)) == len(names)
    assert {"n0", "n24", "notes/sub/1.md", "table/part-0.parquet:69"} <= set(names)
    # 5 % of 465 documents: 23 expected, standard deviation 4.7.
    assert 5 <= len(found["heldout"]) <= 45
    tokens = Counter()
    for record in found["train"]:
        tokens[record.source] += len(record.ids)
    assert manifest.tokens("train") == dict(tokens)
    assert manifest.vocab_size == 300
    manifest.verify()


def test_copies_are_in_the_same_split(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS["web"] * 2)
    )
    recipe = Recipe((str(tmp_path / "in.jsonl"),), vocab_size=300, heldout=0.5)
    build_corpus(recipe, tmp_path / "out")
    train, held = ({r.ids.tobytes() for r in records(tmp_path / "out", split)}
                   for split in ("train", "heldout"))  # fmt: skip
    assert len(train) > 100
    assert len(held) > 100
    assert not train & held


def test_jsonl_units_of_any_size_hold_every_line_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "é" * n}, ensure_ascii=False) + "\r\n"
                            for n in (1, 30, 2, 5)) + '{"text": "last"}')  # fmt: skip
    want = ["é" * 1, "é" * 30, "é" * 2, "é" * 5, "last"]
    for unit_bytes in range(1, path.stat().st_size + 2):
        units = find_units((str(path),), unit_bytes=unit_bytes)
        got = [d.text for u in units for d in read_documents(u, Reading(), Counter())]
        assert got == want, unit_bytes


def test_names_of_special_tokens_are_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("an <end_of_sentence> in <beginning_of_sentence> text")
    manifest = build_corpus(recipe((str(tmp_path / "a.txt"),), heldout=0.0), tmp_path / "out")
    (record,) = records(tmp_path / "out", "train")
    assert np.count_nonzero(record.ids == manifest.end_id) == 1
    assert manifest.tokens("heldout") == {"a": 0}


def test_a_given_tokenizer_is_used(built, inputs, tmp_path):
    given = built / "tokenizer.json"
    manifest = build_corpus(recipe(inputs, tokenizer=given), tmp_path / "out")
    assert manifest.splits == Manifest.load(built).splits
    assert (tmp_path / "out/tokenizer.json").read_bytes() == given.read_bytes()


def test_training_a_tokenizer_depends_on_no_order():
    texts = [t for ts in TEXTS.values() for t in ts]
    one = bpe.train_tokenizer(texts, vocab_size=299)
    assert one.to_str() == bpe.train_tokenizer(texts[::-1], vocab_size=299).to_str()
    assert one.get_vocab_size() == 299
    assert bpe.encode(one, "1234").size == 4  # digits alone


def test_long_texts_are_encoded_in_parts():
    tokenizer = bpe.train_tokenizer(["ab ab\n"], vocab_size=262)
    lines = "ab ab\n" * 180_000
    for whole in (lines, lines.replace("\n", " ")):
        assert tokenizer.decode(bpe.encode(tokenizer, whole).tolist()) == whole
    short = bpe.encode(tokenizer, "ab ab\n")
    np.testing.assert_array_equal(bpe.encode(tokenizer, lines), np.tile(short, 180_000))


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(built, inputs, tmp_path, workers):
    build_corpus(recipe(inputs), tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == contents(built)
    assert len(contents(built)) > 30


BUILD = """
import sys
from mmx.data.corpus import build_corpus
from mmx.data.parts import Recipe
recipe = Recipe(inputs=(sys.argv[1],), vocab_size=300, part_bytes=20_000)
build_corpus(recipe, sys.argv[2], workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kill_in_the_middle_and_build_again(inputs, tmp_path, workers):
    many = tmp_path / "many.jsonl"
    many.write_text((Path(inputs[0]).read_text() + "\n") * 8)
    out, want = tmp_path / "out", tmp_path / "want"
    (out / "done").mkdir(parents=True)
    build_corpus(Recipe((str(many),), vocab_size=300, part_bytes=20_000), want)
    markers = len(list((want / "done").iterdir()))
    assert markers > 20
    for wait_for in (0, 4, 9):
        arguments = [sys.executable, "-c", BUILD, many, out, str(workers)]
        build = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list((out / "done").glob("*.json"))) < wait_for:
            assert build.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        children = Path(f"/proc/{build.pid}/task/{build.pid}/children")
        workers_of = [Path("/proc", pid, "stat") for pid in children.read_text().split()]
        build.send_signal(signal.SIGKILL)
        build.wait()
        while any(running(worker) for worker in workers_of):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.01)
        assert wait_for <= len(list((out / "done").glob("*.json"))) < markers
        with pytest.raises(ValueError, match="no finished corpus"):
            Manifest.load(out)
    subprocess.run([sys.executable, "-c", BUILD, many, out, str(workers)], check=True)
    assert contents(out) == contents(want)


def running(stat):
    """Whether a process is there and no zombie, from its /proc/PID/stat."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_done_is_not_done_again(built, inputs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(built, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    build_corpus(recipe(inputs), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_damage_is_repaired(built, inputs, tmp_path):
    """A flipped bit, a missing file, a marker cut short, drafts: the next build makes it good."""
    out = tmp_path / "out"
    shutil.copytree(built, out)
    one, two, three, *_ = Manifest.load(out).splits["train"]
    data = bytearray((out / one.file).read_bytes())
    data[200] ^= 1
    (out / one.file).write_bytes(data)
    (out / two.file).unlink()
    (out / three.lengths_file).write_bytes(b"")
    (out / "done/00004.json").write_text("{")
    (out / "train/.x.arrayrecord.7.tmp").write_text("half")
    build_corpus(recipe(inputs), out)
    assert contents(out) == contents(built)


def test_an_interrupted_repair_is_no_finished_corpus(built, inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(built, out)
    (out / Manifest.load(out).splits["train"][0].file).unlink()

    def interrupted(writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(recipe(inputs), out)
    with pytest.raises(ValueError, match="no finished corpus"):
        Manifest.load(out)


def test_other_input_leaves_nothing_of_the_old(built, inputs, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    shutil.copytree(built, out)
    (out / "train/mine.txt").write_text("not ours")
    fewer = recipe(inputs[1:], heldout=0.1)
    build_corpus(fewer, out)
    build_corpus(fewer, fresh)
    left = contents(out)
    assert left.pop("train/mine.txt")
    assert left == contents(fresh)


def test_two_builds_in_one_folder_are_refused(built, inputs):
    import fcntl

    with (built / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is running"):
            build_corpus(recipe(inputs), built)


def test_processes_of_one_run_wait_for_each_other(built, inputs):
    import fcntl

    before = contents(built)
    with ThreadPoolExecutor(3) as pool, (built / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = [pool.submit(build_corpus, recipe(inputs), built, wait=True) for _ in range(3)]
        time.sleep(0.3)
        assert not any(one.done() for one in waiting)
        fcntl.flock(file, fcntl.LOCK_UN)
        found = [one.result(60) for one in waiting]
    assert found == [Manifest.load(built)] * 3
    assert contents(built) == before


# ---------------------------------------------------------------- the embedded corpus


def test_embedded_corpus(tmp_path):
    """All four sources, quickly; packs full at 8K; is kept; feeds batches of its own mixture."""
    start = cpu_seconds()
    manifest = build_default(tmp_path, vocab_size=4096, workers=2)
    assert cpu_seconds() - start < 60
    assert manifest.sources == ("pydoc-topics", "stdlib-code", "stdlib-docstrings", "synthetic")
    assert manifest.vocab_size == 4096
    train = manifest.tokens("train")
    assert train["stdlib-code"] > 1_000_000
    assert min(train.values()) > 50_000
    assert 0.01 < sum(manifest.tokens("heldout").values()) / sum(train.values()) < 0.15
    keys = {split: {r.document for r in records(tmp_path, split)} for split in manifest.splits}
    assert not keys["train"] & keys["heldout"]  # a file and its docstrings have one name
    start = cpu_seconds()
    assert build_default(tmp_path, vocab_size=4096, workers=2) == manifest
    assert cpu_seconds() - start < 5
    it = Batches(tmp_path, seq_len=8192, batch_size=8, weights=None, seed=0)
    fill = [(next(it)["segment_ids"] > 0).mean() for _ in range(64)]
    assert np.mean(fill) >= 0.97
