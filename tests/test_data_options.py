"""Options about data: none is lost, and what is wrong is refused before there is work."""

import errno
import json
import re
import shlex
from pathlib import Path

import pytest
from data_corpora import make_corpus, numbered

from mmx.cli import main
from mmx.cli.data import Build
from mmx.cli.lists import gather_repeated
from mmx.data import corpus
from mmx.data.batches import Batches
from mmx.data.corpus import build_corpus, build_default
from mmx.data.parts import Recipe
from mmx.data.shards import Manifest
from recipes import command, pretrain

ROOT = Path(__file__).parents[1]


def refused(capsys, *arguments):
    """The one line of a command that fails."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmx: error: ")
    assert error.count("\n") == 1
    return error


def parsed(*arguments):
    found = command.parse("train", "", pretrain.PRESETS, ["demo", *arguments])
    assert found is not None
    return found[0]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "code").mkdir()
    for i in range(40):
        (tmp_path / "code" / f"{i}.py").write_text(f"def f{i}(): return {i}")
    lines = [json.dumps({"text": f"some prose, number {i}"}) for i in range(40)]
    (tmp_path / "prose.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_the_build_of_the_readme_takes_all_its_inputs(texts):
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if "mmx data build" in line and "--input" in line]
    words = shlex.split(line)
    assert words.count("--input") == 2
    places = {"SHARDS": "out", "FOLDER": "code", "FILE.jsonl": "prose.jsonl"}
    for name, place in places.items():
        words = [word.replace(name, str(texts / place)) for word in words]
    assert main([*words[1:], "--vocab-size", "300"]) == 0
    manifest = Manifest.load(texts / "out")
    assert manifest.sources == ("code", "web")
    documents = sum(s.documents for shards in manifest.splits.values() for s in shards)
    assert documents == 80


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("--input a b", "--input a b"),
        ("--input a --input b", "--input a b"),
        ("--input a b --out o --input=c d --workers 2", "--input a b c d --out o --workers 2"),
        ("--input=a --input b", "--input=a b"),
        ("--out o --out p", "--out o --out p"),
        ("--input a --on_bad skip --input - -1", "--input a - -1 --on_bad skip"),
        ("", ""),
    ],
)
def test_lists_are_gathered(given, want):
    assert gather_repeated(Build, given.split()) == want.split()


@pytest.mark.parametrize(
    "arguments",
    [
        "--weights code 1 prose 3",
        "--weights code 1 --weights prose 3",
        "--weights=code 1 --steps 4 --weights=prose 3",
    ],
)
def test_weights_are_one_list_however_they_are_given(arguments):
    assert parsed(*arguments.split()).weights == (("code", 1.0), ("prose", 3.0))


def test_repeated_accumulation():
    once, again = "--accumulation 0 1 64 2", "--accumulation 0 1 --seed 3 --accumulation 64 2"
    assert parsed(*once.split()).accumulation == ((0, 1), (64, 2))
    assert parsed(*again.split()).accumulation == ((0, 1), (64, 2))
    assert parsed().weights == pretrain.PRESETS["demo"].weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--weights stdlib-code 1 stdlib-code 3", "names 'stdlib-code' 2 times, .* 1.0, 3.0; give"),
        ("--weights synthetic 1 --weights synthetic 1", "names 'synthetic' 2 times"),
        ("--weights stdlib-cod 1", "did you mean 'stdlib-code'"),
        ("--capacity-factor -1", "capacity_factor is -1.0; it must be above 0"),
        ("--accumulation 0 1 0 2", "must rise from 0"),
        ("--max-epochs 0", "--max-epochs is 0; it must be at least 1"),
        ("--shuffle-rows 0", "--shuffle-rows is 0; it must be at least 1"),
        ("--save-every 0", "--save-every is 0"),
        ("--seed -1", "--seed is -1; it must be at least 0"),
    ],
)
def test_bad_options_are_refused_before_the_corpus_is_built(
    options, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pretrain, "corpus_of", lambda *a, **b: pytest.fail("a corpus is built"))
    run = ("--run-dir", tmp_path / "run")
    error = refused(capsys, "train", "demo", *options.split(), *run)
    assert re.search(message, error), error


def test_weights_twice_of_a_given_corpus(tmp_path, capsys):
    shards = make_corpus(tmp_path / "c", {"a": numbered([9] * 9)})
    options = ("--corpus", shards.folder, "--weights", "a", 1, "--weights", "a", 2)
    assert "names 'a' 2 times" in refused(capsys, "train", "demo", *options)


def test_nothing_held_out_says_how_to_hold_out(texts, capsys):
    """Of a corpus that was built so, the amount of text is not the reason."""
    out = texts / "out"
    recipe = Recipe((f"{texts}/prose.jsonl",), vocab_size=300, heldout=0.0)
    build_corpus(recipe, out)
    options = ("--corpus", out, "--weights", "prose", "1", "--run-dir", texts / "run")
    error = refused(capsys, "train", "demo", *options)
    assert f"`mmx data build --out {out}`, the same input, and --heldout above 0" in error
    assert "more text" not in error
    assert main(["data", "build", "--out", str(out), "--input", f"{texts}/prose.jsonl",
                 "--vocab-size", "300", "--heldout", "0.5"]) == 0  # fmt: skip
    Batches(out, seq_len=8, batch_size=1, weights=None, seed=0, split="heldout").close()


@pytest.mark.parametrize(("split", "change"), [("train", "smaller"), ("heldout", "larger")])
def test_an_empty_split_by_chance(tmp_path, split, change):
    other = {"train": "heldout", "heldout": "train"}[split]
    make_corpus(tmp_path, {"a": numbered([9] * 9)}, split=other)
    with pytest.raises(ValueError, match=f"from more text, or with a {change} --heldout"):
        Batches(tmp_path, seq_len=8, batch_size=1, weights=None, seed=0, split=split)


def test_a_default_corpus_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"

    def read_only(path, *unused, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(corpus.Path, "mkdir", read_only)
    message = (
        f"{folder}: Read-only file system; .*mmx data build --out FOLDER --vocab-size 300` "
        "and give it with --corpus FOLDER"
    )
    with pytest.raises(ValueError, match=message):
        build_default(folder, vocab_size=300, workers=1)


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_output(texts, capsys, monkeypatch):
    def closed(path):
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(corpus.Path, "read_bytes", closed)
    options = ("--out", texts / "out", "--input", texts / "code", "--workers", 1)
    error = refused(capsys, "data", "build", *options)
    assert error.endswith("code/0.py: Permission denied; make it readable, or leave it out\n")
