"""Token shards on disk: ArrayRecord files, one record a document, and their manifest.

A corpus folder holds

    manifest.json            written last: what is here, with the SHA-256 of every file
    tokenizer.json           what the ids mean
    train/*.arrayrecord      one record a document, zstd, random access
    train/*.lengths          tokens of each record, little-endian uint32: packing plans on these
    heldout/...              the same, of documents that are in no train shard
    done/*.json              one marker a finished part of a build

A record is `header | source | document id | token ids` with the header `<4sHHII`: the magic
`MMXD`, the lengths in bytes of the two UTF-8 names, the number of tokens, and the CRC-32 of all
that follows the header. Token ids are little-endian uint32. Nothing about packing is on disk:
sequence lengths and mixtures change, the shards do not.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import UInt32

from mmx.convert.bounded import parse
from mmx.data.members import check_members

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

MAX_NAME = 0xFFFF  # bytes of a source's or a document's name

_MAGIC = b"MMXD"
_HEADER = struct.Struct("<4sHHII")
_IDS = np.dtype("<u4")
# One record a group, so that one document can be read alone; one thread writes, and all that may
# change a byte is spelt out.
_WRITER = "group_size:1,zstd:3,transpose:false,pad_to_block_boundary:false,max_parallelism:1"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # random access


class Record(NamedTuple):
    """One tokenised document."""

    source: str
    document: str
    ids: UInt32[np.ndarray, "T"]


def encode_record(record: Record) -> bytes:
    """The bytes of a record.

    Raises:
      ValueError: the source's or the document's name is longer than 65,535 bytes.
    """
    source, document = record.source.encode(), record.document.encode()
    if max(len(source), len(document)) > MAX_NAME:
        raise ValueError(
            f"the name {document[:40]!r}... is longer than {MAX_NAME:,} bytes; shorten it"
        )
    ids = np.ascontiguousarray(record.ids, _IDS)
    body = source + document + ids.tobytes()
    return _HEADER.pack(_MAGIC, len(source), len(document), len(ids), zlib.crc32(body)) + body


def decode_record(data: bytes) -> Record:
    """The record in these bytes; `ids` is read-only.

    Raises:
      ValueError: they are no record, or not as they were written.
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise ValueError("not a token record")
    _, source, document, count, crc = _HEADER.unpack_from(data)
    first = _HEADER.size + source + document
    if len(data) != first + count * _IDS.itemsize or zlib.crc32(data[_HEADER.size :]) != crc:
        raise ValueError("the record's checksum does not match")
    names = data[_HEADER.size : first]
    ids = np.frombuffer(data, _IDS, offset=first)
    return Record(names[:source].decode(), names[source:].decode(), ids)


@dataclass(frozen=True)
class Shard:
    """One shard of the manifest; `file` is relative to the corpus folder."""

    file: str
    source: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    lengths_sha256: str

    @property
    def lengths_file(self) -> str:
        """The file that holds the number of tokens of each record."""
        return self.file.removesuffix(".arrayrecord") + ".lengths"

    @classmethod
    def from_json(cls, data: Any, what: str) -> "Shard":
        """From the JSON of a manifest or a marker; `what` names it in messages.

        Raises:
          ValueError: a field is missing, unknown or of another type, or the file is not below the
            folder.
        """
        shard = cls(**check_members(data, get_type_hints(cls), what))
        if shard.file.startswith("/") or ".." in shard.file.split("/"):
            raise ValueError(f"'file' of {what} leads out of the folder")
        return shard


class ShardWriter:
    """Writes one shard under a temporary name and renames it when it is whole and on disk.

    Raises:
      OSError: the folder cannot be written to, or the disk is full.
    """

    def __init__(self, folder: Path, file: str, source: str):
        self._folder, self._file, self._source = folder, file, source
        self._lengths: list[int] = []
        self._path = folder / file
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._draft = temporary(self._path)
        self._draft.touch()  # a folder that cannot be written to is an OSError here
        try:
            self._writer = ArrayRecordWriter(str(self._draft), _WRITER)
        except (ValueError, RuntimeError) as error:
            raise self._failed(error) from None

    def add(self, ids: UInt32[np.ndarray, "T"], document: str) -> None:
        """Append a document; it has at least one token."""
        if not len(ids):
            raise ValueError(f"{document}: a document without tokens has no place in a shard")
        data = encode_record(Record(self._source, document, ids))
        try:
            self._writer.write(data)
        except (ValueError, RuntimeError) as error:
            raise self._failed(error) from None
        self._lengths.append(len(ids))

    def finish(self) -> Shard:
        """Make the shard durable under its name; what the manifest says about it."""
        try:
            self._writer.close()
            reader = ArrayRecordReader(str(self._draft), _READER)
            written = reader.num_records()
            reader.close()
        except (ValueError, RuntimeError) as error:
            raise self._failed(error) from None
        if written != len(self._lengths):
            raise self._failed(f"{written} of {len(self._lengths)} records arrived")
        lengths = np.array(self._lengths, _IDS).tobytes()
        shard = Shard(
            file=self._file,
            source=self._source,
            documents=len(self._lengths),
            tokens=sum(self._lengths),
            bytes=self._draft.stat().st_size,
            sha256=file_sha256(self._draft),
            lengths_sha256=hashlib.sha256(lengths).hexdigest(),
        )
        write_atomic(self._folder / shard.lengths_file, lengths)
        _rename_durably(self._draft, self._path)
        return shard

    def _failed(self, error: object) -> OSError:
        return OSError(None, f"the shard could not be written ({error})", str(self._path))


class ShardReader:
    """Random access to the records of one shard.

    Raises:
      ValueError: the shard is missing or not what the manifest says; the message names it.
    """

    def __init__(self, folder: Path, shard: Shard):
        self._path, self._shard = folder / shard.file, shard
        self.check(folder, shard)
        try:
            self._reader = ArrayRecordReader(str(self._path), _READER)
            records = self._reader.num_records()
        except (ValueError, RuntimeError, OSError, IndexError) as error:
            raise _corrupt(self._path, error) from None
        if records != shard.documents:
            raise _corrupt(self._path, f"{records} records where {shard.documents} belong")

    @staticmethod
    def check(folder: Path, shard: Shard) -> None:
        """Raise a ValueError if a shard's file is missing or has another size; reads nothing."""
        _check_size(folder / shard.file, shard.bytes)

    def read(self, index: int, *, length: int) -> Record:
        """Record `index` of the shard, of `length` tokens."""
        try:
            (data,) = self._reader.read([index])
            record = decode_record(data)
        except (ValueError, RuntimeError, OSError, IndexError) as error:
            raise _corrupt(self._path, error) from None
        if (record.source, len(record.ids)) != (self._shard.source, length):
            raise _corrupt(self._path, f"record {index} is another document")
        return record

    def close(self) -> None:
        """Give the file back."""
        self._reader.close()


def read_lengths(folder: Path, shard: Shard) -> UInt32[np.ndarray, "documents"]:
    """Tokens of each record of a shard.

    Raises:
      ValueError: the file is missing or not what the manifest says; the message names it.
    """
    path = folder / shard.lengths_file
    _check_size(path, shard.documents * _IDS.itemsize)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.lengths_sha256:
        raise _corrupt(path, "its SHA-256 is not that of the manifest")
    return np.frombuffer(data, _IDS)


_MEMBERS = {"tokenizer_sha256": str, "vocab_size": int, "end_id": int, "recipe": dict,
            "skipped": dict, "splits": dict}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """What a corpus folder holds.

    Attributes:
      folder: where it lies; not part of the file.
      tokenizer_sha256: of tokenizer.json.
      vocab_size: highest token id plus one.
      end_id: the token that ends each document.
      recipe: what was built from what, for people.
      skipped: documents left out, by reason.
      splits: the shards of "train" and "heldout", in the order that numbers their documents.
    """

    folder: Path
    tokenizer_sha256: str
    vocab_size: int
    end_id: int
    recipe: Mapping[str, Any]
    skipped: Mapping[str, int]
    splits: Mapping[str, tuple[Shard, ...]]

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read `manifest.json` of a corpus folder; the shards are checked when they are opened.

        Raises:
          ValueError: there is none, or it is not one that this version reads.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            data = parse(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{folder}: no {MANIFEST}, so no finished corpus; "
                f"build or finish it with `mmx data build --out {folder}`"
            ) from None
        except ValueError as error:
            raise _corrupt(path, error) from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a corpus of format {FORMAT}; build it again")
        try:
            check_members(data, _MEMBERS, "the manifest")
            check_members(data["skipped"], dict.fromkeys(data["skipped"], int), "'skipped'")
            listed = check_members(data["splits"], dict.fromkeys(SPLITS, list), "'splits'")
            splits = {
                split: tuple(
                    Shard.from_json(shard, f"shard {number} of {split!r}")
                    for number, shard in enumerate(shards)
                )
                for split, shards in listed.items()
            }
        except ValueError as error:
            raise _corrupt(path, error) from None
        return cls(**{**data, "folder": folder, "splits": splits})

    def to_bytes(self) -> bytes:
        """The contents of `manifest.json`: a function of the corpus alone."""
        data = {"format": FORMAT, **asdict(self)}
        del data["folder"]
        return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources of both splits, sorted."""
        return tuple(sorted({s.source for shards in self.splits.values() for s in shards}))

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer's file."""
        return self.folder / TOKENIZER

    def tokens(self, split: str) -> dict[str, int]:
        """Tokens of each source in a split; sources that have none there are 0."""
        counts = dict.fromkeys(self.sources, 0)
        for shard in self.splits[split]:
            counts[shard.source] += shard.tokens
        return counts

    def fingerprint(self, split: str) -> str:
        """SHA-256 over the tokenizer and the shards of a split, in order."""
        parts = [self.tokenizer_sha256, *(shard.sha256 for shard in self.splits[split])]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def verify(self) -> None:
        """Read every file and compare its SHA-256.

        Raises:
          ValueError: a file is missing or changed; the message names it.
        """
        check_sha256(self.tokenizer_file, self.tokenizer_sha256)
        for shards in self.splits.values():
            for shard in shards:
                check_sha256(self.folder / shard.file, shard.sha256)
                check_sha256(self.folder / shard.lengths_file, shard.lengths_sha256)


def temporary(path: Path) -> Path:
    """Where to write a file before it is renamed to `path`; one name a process."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that at any moment it is absent, old or whole, also after a power cut."""
    draft = temporary(path)
    draft.write_bytes(data)
    _rename_durably(draft, path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, wanted: str) -> None:
    """Compare a file with its digest.

    Raises:
      ValueError: it is missing or another.
    """
    if not path.is_file():
        raise _corrupt(path, "no such file")
    if file_sha256(path) != wanted:
        raise _corrupt(path, "its SHA-256 is not that of the manifest")


def _rename_durably(draft: Path, path: Path) -> None:
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_size(path: Path, wanted: int) -> None:
    if not path.is_file():
        raise _corrupt(path, "no such file")
    if (size := path.stat().st_size) != wanted:
        raise _corrupt(path, f"{size:,} bytes where {wanted:,} belong")


def _corrupt(path: Path, error: object) -> ValueError:
    why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ValueError(f"{path}: corrupt or incomplete ({why}); run `mmx data build` on it again")
