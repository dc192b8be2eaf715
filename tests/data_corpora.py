"""Corpora for tests of the data modules: made of given token ids, without text or tokenizer."""

import hashlib

import numpy as np

from mmx.data.shards import MANIFEST, Manifest, ShardWriter, write_atomic


def make_corpus(folder, documents, *, per_shard=100, split="train"):
    """Write shards of `{source: [ids, ...]}`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    shards = []
    for source, texts in sorted(documents.items()):
        for number, first in enumerate(range(0, len(texts), per_shard)):
            writer = ShardWriter(folder, f"{split}/{source}-{number:05d}.arrayrecord", source)
            for i, ids in enumerate(texts[first : first + per_shard], first):
                writer.add(np.asarray(ids, np.uint32), f"{source}:{i}")
            shards.append(writer.finish())
    splits = {"train": (), "heldout": ()} | {split: tuple(shards)}
    digest = hashlib.sha256(b"{}").hexdigest()
    manifest = Manifest(folder, digest, 1 << 31, 0, {}, {}, splits)
    write_atomic(folder / MANIFEST, manifest.to_bytes())
    return manifest


def numbered(sizes, *, first=0):
    """Documents of these lengths in which every token id occurs once, counting from `first`."""
    ends = first + np.cumsum(sizes)
    return [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
