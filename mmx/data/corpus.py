"""From text to a corpus folder of token shards (`mmx data build`).

Documents are split into parts that depend on the input alone; a part becomes one shard for each
split and source. Parts are independent, so any number of workers writes the same bytes, and a part
that is done is not done again: its marker in `done/` says what it was made from. The manifest is
written last; a folder without one is unfinished, whatever else it holds.

Removing duplicates and bad text comes before: give the result as `--input`.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mmx.convert.bounded import parse
from mmx.data import tokenizer as bpe
from mmx.data.documents import Reading, Unit, held_out
from mmx.data.parts import Recipe, cut_parts, part_documents
from mmx.data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Shard,
    ShardWriter,
    check_sha256,
    file_sha256,
    write_atomic,
)

_MOST_SOURCES = 256
_SAMPLED_PARTS = 512


class _Job(NamedTuple):
    """All that a worker needs to make one part."""

    folder: Path
    number: int
    units: tuple[Unit, ...]
    reading: Reading
    heldout: float
    tokenizer_sha256: str
    end_id: int

    @property
    def marker(self) -> Path:
        return self.folder / "done" / f"{self.number:05d}.json"

    def fingerprint(self) -> str:
        """Of what determines the part's bytes; a copy of the input elsewhere has the same."""
        units = [asdict(unit) | {"path": ""} for unit in self.units]
        what = [FORMAT, units, *self.reading, self.heldout, self.tokenizer_sha256, self.end_id]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def build_default(folder: Path, *, vocab_size: int, workers: int, wait: bool = False) -> Manifest:
    """The embedded corpus with its own tokenizer, or what is done of it already.

    Raises:
      ValueError: see `build_corpus`; or the folder cannot be written to.
    """
    try:
        return build_corpus(Recipe(vocab_size=vocab_size), folder, workers=workers, wait=wait)
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder}: {error.strerror}; build the corpus elsewhere with "
            f"`mmx data build --out FOLDER --vocab-size {vocab_size}` and give it with "
            "--corpus FOLDER"
        ) from None


def build_corpus(
    recipe: Recipe,
    out_dir: str | Path,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    wait: bool = False,
) -> Manifest:
    """Build a corpus folder, or finish one; what is done and whole is kept.

    The bytes of all shards, the tokenizer and the manifest depend on the recipe and the input, not
    on `workers`, interruptions or earlier builds. With `workers > 1` scripts need the usual
    `if __name__ == "__main__":`, since workers are started afresh.

    Args:
      recipe: what to build.
      out_dir: the folder; made where it is missing.
      workers: processes.
      progress: called with the numbers of finished and of all parts.
      wait: for the end of another build in the folder, as processes of one run do; else an error.

    Raises:
      ValueError: the input is missing, empty, binary or malformed; no document is left; or another
        build is running in the folder.
      OSError: the folder cannot be written to.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one is needed")
    out = Path(out_dir)
    parts = cut_parts(recipe)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out, wait=wait), _without_drafts(out):
        tokenizer = _prepare_tokenizer(recipe, parts, out)
        digest = file_sha256(out / TOKENIZER)
        end = bpe.end_id(tokenizer, recipe.end_token)
        jobs = [
            _Job(out, number, part, recipe.reading, recipe.heldout, digest, end)
            for number, part in enumerate(parts)
        ]
        _remove_others(out, jobs)
        todo = [job for job in jobs if _finished(job) is None]
        if todo:
            (out / MANIFEST).unlink(missing_ok=True)
        _run(todo, workers, progress, len(jobs))
        manifest = _manifest(recipe, jobs, bpe.vocab_size(tokenizer))
        if not _holds(out / MANIFEST, manifest.to_bytes()):
            write_atomic(out / MANIFEST, manifest.to_bytes())
    return manifest


# ---------------------------------------------------------------- a part


def _build_part(job: _Job) -> None:
    """Write the shards of a part, then its marker."""
    tokenizer = _tokenizer_of(job.folder / TOKENIZER, job.tokenizer_sha256)
    writers: dict[tuple[str, str], ShardWriter] = {}
    tally: Counter[str] = Counter()
    for document in part_documents(job.units, job.reading, tally):
        split = SPLITS[held_out(document, job.heldout)]
        key = split, document.source
        if key not in writers:
            if len(writers) == 2 * _MOST_SOURCES:
                raise ValueError(
                    f"{job.units[0].path}: more than {_MOST_SOURCES} values of 'source'; merge them"
                )
            file = f"{split}/{document.source}-{job.number:05d}.arrayrecord"
            writers[key] = ShardWriter(job.folder, file, document.source)
        try:
            ids = bpe.encode(tokenizer, document.text)
        except ValueError as error:
            raise ValueError(
                f"{job.folder / TOKENIZER}: document {document.name[:200]!r} of "
                f"{document.source!r}: {error}; give a --tokenizer that has a token for what it "
                "does not know"
            ) from None
        writers[key].add(np.append(ids, np.uint32(job.end_id)), document.name)
    shards = {split: [] for split in SPLITS}
    for split, source in sorted(writers):
        shards[split].append(asdict(writers[split, source].finish()))
    done = {"fingerprint": job.fingerprint(), "skipped": dict(tally), "shards": shards}
    job.marker.parent.mkdir(exist_ok=True)
    write_atomic(job.marker, json.dumps(done, sort_keys=True).encode())


@functools.lru_cache(maxsize=1)
def _tokenizer_of(file: Path, digest: str) -> Tokenizer:
    check_sha256(file, digest)
    return bpe.load_tokenizer(file)


def _run(
    jobs: list[_Job], workers: int, progress: Callable[[int, int], None] | None, total: int
) -> None:
    done = total - len(jobs)
    report = progress or (lambda finished, of: None)
    report(done, total)
    with contextlib.ExitStack() as stack:
        if min(workers, len(jobs)) > 1:
            # Started afresh: a fork of a process that runs jax or tokenizers can hang.
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    min(workers, len(jobs)),
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_end_with_parent,
                )
            )
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_build_part, jobs)
        else:
            results = map(_build_part, jobs)
        try:
            for _ in results:
                done += 1
                report(done, total)
        except BrokenProcessPool:
            raise ValueError(
                "a worker was killed, for want of memory perhaps; run again with fewer workers or "
                "smaller parts, what is done is kept"
            ) from None


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ---------------------------------------------------------------- what is done


def _finished(job: _Job) -> dict | None:
    """The marker of a part, if the part is done, of the same input, and whole."""
    try:
        done = parse(job.marker.read_text("utf-8"))
        if done["fingerprint"] != job.fingerprint():
            return None
        for split in SPLITS:
            for shard in (Shard.from_json(entry, "a shard") for entry in done["shards"][split]):
                check_sha256(job.folder / shard.file, shard.sha256)
                check_sha256(job.folder / shard.lengths_file, shard.lengths_sha256)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return done


def _remove_others(out: Path, jobs: list[_Job]) -> None:
    """Remove what an earlier build of other input or options left: only what its markers name."""
    current = {job.marker: job.fingerprint() for job in jobs}
    for marker in sorted((out / "done").glob("[0-9]*.json")):
        try:
            done = parse(marker.read_text("utf-8"))
            if done["fingerprint"] == current.get(marker):
                continue
            shards = [
                Shard.from_json(entry, "a shard")
                for split in SPLITS
                for entry in done["shards"][split]
            ]
        except (ValueError, KeyError, TypeError):
            shards = []  # the part will be made again
        (out / MANIFEST).unlink(missing_ok=True)
        for shard in shards:
            (out / shard.file).unlink(missing_ok=True)
            (out / shard.lengths_file).unlink(missing_ok=True)
        marker.unlink()


@contextlib.contextmanager
def _without_drafts(out: Path) -> Iterator[None]:
    """Remove what a build that was killed has left, and afterwards what this one leaves.

    On a full disk that is the room that others wait for.
    """

    def remove() -> None:
        for folder in (out, out / "done", *(out / split for split in SPLITS)):
            for draft in folder.glob(".*.tmp"):
                draft.unlink(missing_ok=True)

    remove()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # rather the error that ended the build
            remove()


@contextlib.contextmanager
def _locked(out: Path, *, wait: bool) -> Iterator[None]:
    """One build a folder; the lock ends with the process, however that ends."""
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"{out}: another build is running in this folder") from None
        yield


def _holds(file: Path, data: bytes) -> bool:
    return file.is_file() and file.read_bytes() == data


def _manifest(recipe: Recipe, jobs: list[_Job], vocab_size: int) -> Manifest:
    skipped: Counter[str] = Counter()
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for job in jobs:
        done = _finished(job)
        if done is None:
            raise ValueError(f"{job.marker}: changed during the build; build again")
        skipped.update(done["skipped"])
        for split in SPLITS:
            splits[split] += [Shard.from_json(entry, "a shard") for entry in done["shards"][split]]
    if not any(splits.values()):
        raise ValueError(
            f"no document with text in {', '.join(recipe.inputs) or 'the embedded corpus'} "
            f"({skipped['empty']} empty, {skipped['bad']} bad)"
        )
    about = {
        "inputs": [Path(text.partition("=")[2] or text).name for text in recipe.inputs],
        "tokenizer": "trained" if recipe.tokenizer is None else "given",
        "heldout": recipe.heldout,
    }
    return Manifest(
        folder=jobs[0].folder,
        tokenizer_sha256=jobs[0].tokenizer_sha256,
        vocab_size=vocab_size,
        end_id=jobs[0].end_id,
        recipe=about,
        skipped=dict(skipped),
        splits={split: tuple(shards) for split, shards in splits.items()},
    )


# ---------------------------------------------------------------- the tokenizer


def _prepare_tokenizer(recipe: Recipe, parts: list[tuple[Unit, ...]], out: Path) -> Tokenizer:
    """Put tokenizer.json into the folder, unless the same is there."""
    if recipe.tokenizer is not None:
        tokenizer = bpe.load_tokenizer(recipe.tokenizer)
        data = bpe.without_limits(recipe.tokenizer.read_bytes())
        if not _holds(out / TOKENIZER, data):
            (out / MANIFEST).unlink(missing_ok=True)
            write_atomic(out / TOKENIZER, data)
        return tokenizer
    marker = out / "done" / "tokenizer.json"
    units = [[asdict(unit) | {"path": ""} for unit in part] for part in parts]
    what = [FORMAT, units, *recipe.reading, recipe.heldout, recipe.vocab_size, recipe.sample_bytes]
    made_from = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    try:
        done = parse(marker.read_text("utf-8"))
        if done["fingerprint"] == made_from:
            check_sha256(out / TOKENIZER, done["sha256"])
            return bpe.load_tokenizer(out / TOKENIZER)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # to be trained
    (out / MANIFEST).unlink(missing_ok=True)
    tokenizer = bpe.train_tokenizer(_sample(recipe, parts), vocab_size=recipe.vocab_size)
    write_atomic(out / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    marker.parent.mkdir(exist_ok=True)
    done = {"fingerprint": made_from, "sha256": file_sha256(out / TOKENIZER)}
    write_atomic(marker, json.dumps(done).encode())
    return tokenizer


def _sample(recipe: Recipe, parts: list[tuple[Unit, ...]]) -> Iterator[str]:
    """Texts of the train split: as much of each part's beginning as its size among all."""
    chosen = parts[:: -(-len(parts) // _SAMPLED_PARTS)] if parts else []
    sizes = [sum(unit.weight for unit in part) for part in chosen]
    share = min(1.0, recipe.sample_bytes / max(1, sum(sizes)))
    for part, size in zip(chosen, sizes, strict=True):
        left = size * share
        for document in part_documents(part, recipe.reading, Counter()):
            if left <= 0:
                break
            if not held_out(document, recipe.heldout):
                text = document.text[: max(1, int(left))]
                left -= len(text)
                yield text
