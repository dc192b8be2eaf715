"""Where documents come from: jsonl, parquet and text files, cut into units that workers can share.

A *unit* is a piece of input that can be read alone: a text file, a range of bytes of a jsonl file,
some row groups of a parquet file, a file of the standard library (`embedded.py`). Units depend on
names and sizes only, never on the number of workers.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmx.data.shards import MAX_NAME

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz")
KINDS = ("jsonl", "parquet", "text")

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


# What a row holds beside its text may be anything that is one value.
_CONTAINERS = (dict, list, tuple)


class Document(NamedTuple):
    """A document: `split_key` decides whether it is held out (the same key, the same split)."""

    text: str
    source: str
    name: str
    split_key: bytes


@dataclass(frozen=True)
class Unit:
    """A piece of input.

    Attributes:
      kind: "jsonl", "parquet", "text", or one of `embedded.SOURCES`.
      path: the file; "" where there is none.
      name: what the documents are named after, the same on any machine.
      source: of documents that do not name one themselves.
      start, stop: bytes of a jsonl file, row groups of a parquet file, else 0 and the size.
      weight: about how many bytes of text it is.
      modified: nanoseconds, of the file.
    """

    kind: str
    path: str
    name: str
    source: str
    start: int
    stop: int
    weight: int
    modified: int


class Reading(NamedTuple):
    """How to read documents: the field that holds the text, and what to do with bad ones."""

    text_field: str = "text"
    on_bad: Literal["error", "skip"] = "error"


def held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a hash of its key decides."""
    digest = hashlib.sha256(document.split_key).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def find_units(inputs: tuple[str, ...], *, unit_bytes: int) -> list[Unit]:
    """The units of files and folders.

    Args:
      inputs: each `PATH` or `NAME=PATH`; a folder is searched for jsonl, parquet and text files.
        NAME is the source of its documents, in place of the file's or the folder's name.
      unit_bytes: jsonl files and parquet files are cut into units of about this size.

    Raises:
      ValueError: a path does not exist or a folder holds nothing that can be read.
    """
    units: list[Unit] = []
    for text in inputs:
        name, path = _named(text)
        files = [path] if path.is_file() else _files_below(path)
        for file in files:
            relative = file.name if file == path else file.relative_to(path).as_posix()
            units += _units_of(file, f"{name}/{relative}", name, unit_bytes)
    return units


def read_documents(unit: Unit, reading: Reading, tally: Counter[str]) -> Iterator[Document]:
    """The documents of a unit, in order; empty ones are left out.

    Args:
      unit: of `find_units`.
      reading: how.
      tally: counts what is left out: "empty", and "bad" with `on_bad="skip"`.

    Raises:
      ValueError: text is binary, or a line or row is not a document, with `on_bad="error"`; the
        message names the file and the place.
    """
    rows = {"jsonl": _jsonl_rows, "parquet": _parquet_rows, "text": _text_rows}[unit.kind]
    for kind, place, row in rows(unit, reading):
        where = f"{kind} {place:,}" if kind else "the file"
        try:
            document = _document(row, f"{unit.name}:{place}" if kind else unit.name, unit, reading)
        except ValueError as error:
            if reading.on_bad == "error":
                hint = "repair or remove it, or skip such documents with --on-bad skip"
                raise ValueError(f"{unit.path}: {where} {error}; {hint}") from None
            tally["bad"] += 1
            continue
        if not document.text.strip():
            tally["empty"] += 1
            continue
        yield document


def source_name(text: str) -> str:
    """A source's name as it may stand in a file's name.

    Raises:
      ValueError: nothing remains of it.
    """
    name = _UNSAFE.sub("-", text).strip(".-")[:64]
    if not name:
        raise ValueError(f"has the source {text!r}, which has no letter or digit")
    return name


def _named(text: str) -> tuple[str, Path]:
    name, found, rest = text.partition("=")
    path = Path(rest if found and not Path(text).exists() else text)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder to read text from")
    stem = path.resolve().name
    for suffix in (*JSONL_SUFFIXES, ".parquet", *TEXT_SUFFIXES):
        stem = stem.removesuffix(suffix)
    try:
        return source_name(name if found and path != Path(text) else stem), path
    except ValueError as error:
        raise ValueError(f"{path}: {error}; name it as NAME={path}") from None


def _files_below(folder: Path) -> list[Path]:
    suffixes = (*JSONL_SUFFIXES, ".parquet", *TEXT_SUFFIXES)
    files = [
        path
        for path in folder.rglob("*")
        if path.name.endswith(suffixes)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"{folder}: no text in it; looked for *{', *'.join(suffixes)}")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _units_of(file: Path, name: str, source: str, unit_bytes: int) -> list[Unit]:
    status = file.stat()

    def unit(kind: str, start: int, stop: int, weight: int) -> Unit:
        return Unit(kind, str(file), name, source, start, stop, weight, status.st_mtime_ns)

    if file.name.endswith(".parquet"):
        groups = _row_groups(file)
        return [unit("parquet", *cut) for cut in _cuts(groups, unit_bytes)]
    if file.name.endswith(JSONL_SUFFIXES):
        if file.name.endswith(".gz"):  # has to be read from its beginning
            return [unit("jsonl", 0, status.st_size, 4 * status.st_size)]
        starts = range(0, status.st_size, unit_bytes)
        stops = [min(start + unit_bytes, status.st_size) for start in starts]
        return [unit("jsonl", a, b, b - a) for a, b in zip(starts, stops, strict=True)]
    return [unit("text", 0, status.st_size, status.st_size)]


def _cuts(sizes: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Consecutive items as (start, stop, size), each of at most this size or of one item."""
    start = size = 0
    for i, item in enumerate(sizes):
        if i > start and size + item > most:
            yield start, i, size
            start, size = i, 0
        size += item
    if sizes:
        yield start, len(sizes), size


# ---------------------------------------------------------------- rows of a unit


class _Row(NamedTuple):
    """What a unit holds at a place ("" 0 if it is all there is, as bytes).

    A str says what is wrong.
    """

    kind: str
    place: int
    row: dict[str, Any] | bytes | str


def _text_rows(unit: Unit, reading: Reading) -> Iterator[_Row]:
    del reading
    yield _Row("", 0, Path(unit.path).read_bytes())


def _jsonl_rows(unit: Unit, reading: Reading) -> Iterator[_Row]:
    """A line belongs to the unit in which it starts."""
    del reading
    compressed = unit.path.endswith(".gz")
    try:
        with gzip.open(unit.path) if compressed else open(unit.path, "rb") as file:
            if unit.start:
                file.seek(unit.start - 1)
                file.readline()
            while compressed or file.tell() < unit.stop:
                position = file.tell()
                line = file.readline()
                if not line:
                    return
                if line.strip():
                    yield _Row("line at byte", position, _parsed(line))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{unit.path}: damaged gzip file ({error})") from None


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"is not JSON ({error})"
    except RecursionError:
        return "is JSON that is nested too deep"
    return row if isinstance(row, dict) else f"is {type(row).__name__}, not an object"


def _parquet_rows(unit: Unit, reading: Reading) -> Iterator[_Row]:
    pyarrow = _pyarrow(unit.path)
    try:
        with pyarrow.ParquetFile(unit.path) as file:
            names = file.schema_arrow.names
            if reading.text_field not in names:
                raise ValueError(
                    f"no column {reading.text_field!r} among {', '.join(names)}; "
                    "name the text's with --text-field"
                )
            columns = [n for n in ("id", "source", reading.text_field) if n in names]
            groups = range(unit.start, unit.stop)
            before = range(unit.start)
            number = sum(file.metadata.row_group(group).num_rows for group in before)
            for batch in file.iter_batches(64, row_groups=groups, columns=columns):
                for row in batch.to_pylist():
                    yield _Row("row", number, row)
                    number += 1
    except (ValueError, OSError) as error:  # pyarrow's own errors are of these two
        raise ValueError(f"{unit.path}: {error}") from None


def _row_groups(file: Path) -> list[int]:
    pyarrow = _pyarrow(str(file))
    try:
        meta = pyarrow.read_metadata(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not a parquet file ({error})") from None
    return [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]


def _pyarrow(path: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs pyarrow; install mmx[parquet], or give jsonl"
        ) from None
    return pyarrow.parquet


def _document(
    row: dict[str, Any] | bytes | str, name: str, unit: Unit, reading: Reading
) -> Document:
    if isinstance(row, str):
        raise ValueError(row)
    if isinstance(row, bytes):
        text, row = _decoded(row), {}
    else:
        text = row.get(reading.text_field)
        if not isinstance(text, str):
            shown = "no" if text is None else f"a {type(text).__name__} as"
            raise ValueError(f"has {shown} {reading.text_field!r}; a string is wanted")
        if "\0" in text:
            raise ValueError("is binary (a zero character)")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"is not text ({error.reason})") from None
    source, given = _label(row, "source"), _label(row, "id")
    source = unit.source if source is None else source_name(source)
    what, name = ("a name", name) if given is None else ("an 'id'", given)
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"has {what} that is not text ({error.reason})") from None
    if size > MAX_NAME:
        raise ValueError(f"has {what} of {size:,} bytes in UTF-8; there is room for {MAX_NAME:,}")
    return Document(text, source, name, text.encode())


def _label(row: dict[str, Any], field: str) -> str | None:
    value = row.get(field)
    if isinstance(value, _CONTAINERS):
        raise ValueError(f"has a {type(value).__name__} as {field!r}; a string is wanted")
    return None if value is None else str(value)


def _decoded(data: bytes) -> str:
    if b"\0" in data:
        raise ValueError(f"is binary (a zero byte at {data.index(0):,})")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {data[error.start]:#04x} at {error.start:,}"
        raise ValueError(f"is binary or not UTF-8 ({at})") from None
