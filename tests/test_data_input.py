"""Bad input to `mmx data build`: one line that says what and where, and nothing taken for whole."""

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mmx.cli import main
from mmx.data import tokenizer as bpe
from mmx.data.corpus import build_corpus
from mmx.data.parts import Recipe
from mmx.data.shards import Manifest


def recipe(path, **options):
    return Recipe(inputs=(str(path),), **{"vocab_size": 300} | options)


@pytest.fixture
def good(tmp_path):
    """A jsonl file of 400 documents."""
    path = tmp_path / "good.jsonl"
    lines = [json.dumps({"text": f"document {i} of some words" * 5}) for i in range(400)]
    path.write_text("\n".join([*lines, '{"text": ""}']))
    return path


BAD = {
    "empty.txt": (b"", r"no document with text in .*empty.txt \(1 empty, 0 bad\)"),
    "blank.jsonl": (b"\n\n", "no document with text"),
    "zero.txt": (b"ab\0cd", r"zero.txt: the file is binary \(a zero byte at 2\).*--on-bad skip"),
    "latin.txt": ("naïve".encode("latin-1"), r"binary or not UTF-8 \(byte 0xef at 2\)"),
    "json.jsonl": (b'{"text": "a"}\n{"text"', "json.jsonl: line at byte 14 is not JSON"),
    "list.jsonl": (b"[1]\n", "line at byte 0 is list, not an object"),
    "field.jsonl": (b'{"body": "a"}\n', "line at byte 0 has no 'text'; a string is wanted"),
    "type.jsonl": (b'{"text": 3}\n', "has a int as 'text'"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "is not text"),
    "binary.jsonl": (b'{"text": "a\\u0000"}\n', "is binary"),
    "source.jsonl": (b'{"text": "a", "source": "//"}\n', "source '//'"),
    "nested.jsonl": (
        b'{"text": "a", "y": %s%s}\n' % (b"[" * 200_000, b"]" * 200_000),
        "nested.jsonl: line at byte 0 is JSON that is nested too deep; .*--on-bad skip",
    ),
    "bytes.jsonl": (b'{"bytes": "a"}\n', "line at byte 0 has no 'text'"),
    "sources.jsonl": (b'{"text": "a", "source": ["b"]}\n', "has a list as 'source'"),
    "ids.jsonl": (b'{"text": "a", "id": {"b": 1}}\n', "has a dict as 'id'"),
    "id.jsonl": (
        b'{"text": "a"}\n{"text": "b", "id": "\\ud800"}\n',
        "id.jsonl: line at byte 14 has an 'id' that is not text .*--on-bad skip",
    ),
    "long.jsonl": (
        json.dumps({"text": "a", "id": "é" * 32_768}).encode(),
        "long.jsonl: line at byte 0 has an 'id' of 65,536 bytes in UTF-8; there is room for 65,535",
    ),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:40], "damaged gzip"),
    "bad.parquet": (b"PAR1 no", "bad.parquet: not a parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_one_line(name, tmp_path, capsys):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "out"
    code = main(["data", "build", "--out", str(out), "--input", str(tmp_path / name),
                 "--vocab-size", "300"])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error
    with pytest.raises(ValueError, match="no finished corpus"):
        Manifest.load(out)


def test_files_whose_names_are_not_text(tmp_path):
    """Documents are named after them, in UTF-8."""
    (tmp_path / "good.txt").write_text("a text")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a text")
    with pytest.raises(ValueError, match=r"txt: the file has a name that is not text .*--on-bad"):
        build_corpus(recipe(tmp_path), tmp_path / "out")
    manifest = build_corpus(recipe(tmp_path, on_bad="skip", heldout=0), tmp_path / "out")
    assert manifest.skipped == {"bad": 1}


def test_parquet_without_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a text"]}), path)
    with pytest.raises(ValueError, match=r"no column 'text' among body; .*--text-field"):
        build_corpus(recipe(path), tmp_path / "out")
    manifest = build_corpus(recipe(path, text_field="body", heldout=0), tmp_path / "out")
    assert manifest.splits["train"][0].documents == 1


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.delattr(pyarrow, "parquet", raising=False)
    with pytest.raises(ValueError, match=r"needs pyarrow; install mmx\[parquet\]"):
        build_corpus(recipe(path), tmp_path / "out")


def test_bad_documents_can_be_skipped(tmp_path):
    rows = [b'{"text": "good"}', b"[]", b"{", b'{"text": "\\u0000"}', b'{"text": ""}', b"\xff"]
    rows += [b'{"text": "a", "id": "\\ud800"}', b'{"text": "a", "id": "%s"}' % (b"x" * 65_536)]
    rows += [b'{"text": "a", "y": %s%s}' % (b"[" * 200_000, b"]" * 200_000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    options = recipe(tmp_path / "a.jsonl", on_bad="skip", heldout=0)
    manifest = build_corpus(options, tmp_path / "out")
    assert manifest.skipped == {"bad": 7, "empty": 1}
    assert manifest.splits["train"][0].documents == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere"], "nowhere: no such file or folder"),
        (["--input", "{tmp}/folder"], r"folder: no text in it; looked for \*.jsonl"),
        (["--vocab-size", "100"], "vocab_size is 100; .* at least 258"),
        (["--tokenizer", "nowhere.json"], "nowhere.json: no such file"),
        (["--tokenizer", "{tmp}/a.txt"], "a.txt: not a tokenizer"),
        (["--tokenizer", "{tmp}/bare.json"], "none of <end_of_sentence>.*--end-token"),
        (["--end-token", "<stop>"], "no token '<stop>'"),
        (["--workers", "0"], "workers is 0"),
        (["--heldout", "1"], "heldout is 1"),
        (["--out", "{tmp}/a.txt/out"], "a.txt.*choose another --out"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("text")
    bare = bpe.train_tokenizer(["a"], vocab_size=258).to_str()
    (tmp_path / "bare.json").write_text(bare.replace("of_sentence", "of_line"))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    defaults = {"--out": tmp_path / "out", "--input": tmp_path / "a.txt", "--vocab-size": 300}
    for name, value in defaults.items():
        if name not in arguments:
            arguments += [name, str(value)]
    assert main(["data", "build", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_read_only_folder(capsys):
    """Of another user; root becomes nobody for it, whom permissions bind."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "a.txt"), Path(folder, "out")
        path.write_text("a text")
        Path(folder).chmod(0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            code = main(["data", "build", "--out", str(out), "--input", str(path)])
        finally:
            os.seteuid(user)
            Path(folder).chmod(0o755)
    assert code == 2
    error = capsys.readouterr().err
    assert error == f"mmx: error: {out}: Permission denied; choose another --out\n"


@pytest.mark.parametrize("limit", [2000, 50_000])
def test_full_disk_is_one_line_and_leaves_no_corpus(good, tmp_path, limit):
    """Files cannot grow beyond a limit, which writers see as they see a full disk."""
    code = (
        "import resource, signal, sys; from mmx.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    arguments = ["data", "build", "--out", str(out), "--vocab-size", "300", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--input", str(good)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "choose another --out" in done.stderr
    assert str(out) in done.stderr
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))  # room that others wait for
    assert main([*arguments, "--input", str(good)]) == 0
    Manifest.load(out).verify()


def test_verify_command(good, tmp_path, capsys):
    manifest = build_corpus(recipe(good), tmp_path / "c")
    assert main(["data", "verify", str(tmp_path / "c")]) == 0
    said = f"vocabulary {manifest.vocab_size}; left out: 1 empty"
    assert said in capsys.readouterr().out
    shard = manifest.splits["train"][0]
    (tmp_path / "c" / shard.file).write_bytes(b"")
    assert main(["data", "verify", str(tmp_path / "c")]) == 2
    assert shard.file in capsys.readouterr().err
    assert main(["data"]) == 2
    assert main(["data", "prove"]) == 2
