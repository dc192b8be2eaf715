"""Tokenizers of others: whole texts, nothing but texts, and one line where they fail."""

import json
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mmx.cli import main
from mmx.data import tokenizer as bpe
from mmx.data.corpus import build_corpus
from mmx.data.parts import Recipe
from mmx.data.shards import ShardReader, read_lengths

TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture
def trained():
    return bpe.train_tokenizer([TEXT], vocab_size=300)


def shard_ids(manifest):
    shard = manifest.splits["train"][0]
    lengths = read_lengths(manifest.folder, shard)
    reader = ShardReader(manifest.folder, shard)
    return [reader.read(i, length=int(n)).ids.tolist() for i, n in enumerate(lengths)]


@pytest.mark.parametrize("limit", ["truncation", "padding", "both"])
def test_a_tokenizer_neither_cuts_nor_pads(trained, limit, tmp_path):
    whole = [*bpe.encode(trained, TEXT).tolist(), bpe.end_id(trained)]
    (tmp_path / "a.txt").write_text(TEXT)
    if limit != "padding":
        trained.enable_truncation(3)
    if limit != "truncation":
        trained.enable_padding(length=64, pad_id=7)
    file = tmp_path / "given.json"
    trained.save(str(file))
    recipe = Recipe((str(tmp_path / "a.txt"),), tokenizer=file, heldout=0.0)
    manifest = build_corpus(recipe, tmp_path / "out")
    assert shard_ids(manifest) == [whole]
    # So does the copy, for whoever reads it with the library alone; nothing else is changed.
    copy, given = (json.loads(path.read_text()) for path in (manifest.tokenizer_file, file))
    assert copy == given | {"truncation": None, "padding": None}
    other = Tokenizer.from_file(str(manifest.tokenizer_file))
    assert other.encode(TEXT, add_special_tokens=False).ids == whole[:-1]
    manifest.verify()


MODELS = {
    "words": models.WordLevel({"</s>": 0, "one": 1}, unk_token="[UNK]"),
    "unigram": models.Unigram([("</s>", 0.0), ("one", -1.0)]),
    "pieces": models.WordPiece({"</s>": 0, "one": 1}, unk_token="[UNK]"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tokenizer_that_fails_is_one_line(name, tmp_path, capsys):
    tokenizer = Tokenizer(MODELS[name])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "given.json"))
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    arguments = ["--out", tmp_path / "out", "--input", path, "--tokenizer", tmp_path / "given.json"]
    assert main(["data", "build", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    # Unigram wants the unknown token for single characters, of known words too.
    place = 0 if name == "unigram" else 16
    message = f"out/tokenizer.json: document 'in/in.jsonl:{place}' of 'in': .*cannot encode"
    assert re.search(f"{message}.*--tokenizer", error), error
