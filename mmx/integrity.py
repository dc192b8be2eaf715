"""Is a checkpoint whole? A manifest of SHA-256 digests, and its check. Imports no jax.

Formats for arrays keep no digest of values: a flipped bit is restored without a word. So every
checkpoint folder ends with a manifest: the size and SHA-256 of each of its files (of array chunks
as they are stored, and of metadata), of a converted one also those of each tensor and where it
lies, and a digest of the manifest itself. It is written last, by an atomic rename, after everything
it names was forced to disk; a checkpoint is whole once it is there.

Hashing streams files through a pool of threads. One thread did 1.3 GB/s and two 2.6 GB/s on a CPU
with SHA extensions, faster than the disk.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
SAVING = ".saving"
_FORMAT = 1
_MAX_MANIFEST = 64 << 20  # bytes; that of MiniMax-Text-01 has 4 MB
_STEP = re.compile(r"[0-9]{8,18}")
_THREADS = 8  # more readers than this gain nothing on one disk


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, changed, or not one that was saved; one line naming it."""


@dataclass(frozen=True)
class Verified:
    """What a check has read: the number of files, the manifest apart, and their bytes."""

    files: int
    bytes: int


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of a file.

    Of a file with several tensors it is that of the digests of its header and of each tensor
    (`joined`): every byte is hashed once, and the tensors' own digests come with it.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a converted checkpoint.

    Attributes:
      dtype: as its format names it.
      shape: its shape.
      sha256: of its bytes where it is one chunk, else of the digests of its chunks in their order.
      chunks: where its bytes lie: (file, first byte, byte after the last).
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    chunks: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: files by name, the step of a run, tensors, and what made it."""

    files: Mapping[str, FileEntry]
    step: int | None = None
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def is_step(name: str) -> bool:
    """Whether the folder of a step may have this name: its number in eight digits or more."""
    return _STEP.fullmatch(name) is not None and name == f"{int(name):08d}"


def write_manifest(
    folder: Path,
    *,
    step: int | None = None,
    known: Mapping[str, FileEntry] | None = None,
    tensors: Mapping[str, TensorEntry] | None = None,
    about: Mapping[str, Any] | None = None,
    but: str = "",
) -> None:
    """Force every file of `folder` to disk, then write the manifest of them.

    Args:
      folder: of the checkpoint.
      step: of the run that saved it.
      known: files that are on disk already, with digests taken as they were written; only their
        sizes are looked at.
      tensors: of a converted checkpoint.
      about: JSON values for whoever reads the manifest.
      but: a file that is left out, since it goes before the checkpoint is used.

    Raises:
      DamagedCheckpoint: a link or another special file is among them, or a known one is missing or
        of another size.
      OSError: a file cannot be read or the manifest not written.
    """
    known = known or {}

    def entry(found: tuple[str, Path]) -> tuple[str, dict[str, Any]]:
        name, path = found
        if name in known:
            _compare_size(path, path.lstat().st_size, known[name])
            return name, vars(known[name])
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return name, {"size": os.fstat(file.fileno()).st_size, "sha256": digest}

    files = {name: path for name, path in _walk(folder).items() if name not in (MANIFEST, but)}
    for name in known:
        if name not in files:
            raise DamagedCheckpoint(f"{_shown(folder / name)}: missing; {_REMEDY}")
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(pool.map(entry, files.items()))
    for parent, _, _ in os.walk(folder):
        sync(Path(parent))
    manifest: dict[str, Any] = {"format": _FORMAT, "files": entries}
    if step is not None:
        manifest["step"] = step
    if tensors is not None:
        manifest["tensors"] = {name: vars(tensor) for name, tensor in tensors.items()}
    if about is not None:
        manifest["about"] = about
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("wb") as file:
        file.write(_encode(manifest))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    sync(folder)


def verify(folder: Path, *, under: str = "", share: tuple[int, int] = (0, 1)) -> Verified:
    """Read every byte of a checkpoint folder and compare with its manifest.

    Args:
      folder: of a step or of a converted checkpoint.
      under: only the files whose names in the folder begin with this, as 'params/'.
      share: (index, number) of a reader among several, who read every number-th file each.

    Raises:
      DamagedCheckpoint: naming the first file that is missing, changed, unexpected, unreadable or a
        link, with the tensors in it that differ, or the manifest itself.
    """
    manifest = check_files(folder)
    entries, parts = manifest.files, _parts(manifest)
    names = [name for name in sorted(entries) if name.startswith(under)]
    chosen = {name: entries[name] for name in names[share[0] :: share[1]]}

    def check(item: tuple[str, FileEntry]) -> int:
        name, entry = item
        path = folder / name
        try:
            if name in parts:
                digest = joined(_digest(path, begin, end) for begin, end in parts[name])
            else:
                digest = _digest(path, 0, entry.size)
        except OSError as error:
            raise DamagedCheckpoint(f"{_shown(path)}: cannot be read ({error.strerror})") from None
        if digest != entry.sha256:
            _compare(path, digest, entry, _damaged_tensors(folder, name, manifest))
        return entry.size

    with ThreadPoolExecutor(_THREADS) as pool:
        return Verified(len(chosen), sum(pool.map(check, chosen.items())))


def read_verified(folder: Path, name: str) -> bytes:
    """One file of a step folder, compared with the manifest.

    Raises:
      DamagedCheckpoint: the file or the manifest is missing or changed.
    """
    entries = read_manifest(folder).files
    path = folder / name
    if name not in entries:
        raise DamagedCheckpoint(f"{_shown(path)}: not in the manifest; {_REMEDY}")
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DamagedCheckpoint(f"{_shown(path)}: not a plain file; {_REMEDY}")
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{_shown(path)}: cannot be read ({error.strerror})") from None
    _compare(path, hashlib.sha256(content).hexdigest(), entries[name])
    return content


_REMEDY = "use another copy or step, and remove this one"


def check_files(folder: Path) -> Manifest:
    """The manifest, after comparing names and sizes with the files that are there.

    Raises:
      DamagedCheckpoint: naming the first file that is missing, of another size, or unexpected.
    """
    manifest = read_manifest(folder)
    found = _walk(folder)
    found.pop(MANIFEST, None)
    for name, entry in manifest.files.items():
        path = folder / name
        if name not in found:
            raise DamagedCheckpoint(f"{_shown(path)}: missing; {_REMEDY}")
        try:
            size = path.lstat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{_shown(path)}: cannot be read ({error.strerror})") from None
        _compare_size(path, size, entry)
    for name in found:
        if name not in manifest.files:
            raise DamagedCheckpoint(
                f"{_shown(folder / name)}: not part of the checkpoint; remove the file"
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; no other file is looked at.

    Raises:
      DamagedCheckpoint: it is missing, changed, a link, or of another version.
    """
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or folder.is_symlink():
            raise DamagedCheckpoint(f"{_shown(path)}: reached by a link; {_REMEDY}")
        if path.stat().st_size > _MAX_MANIFEST:
            raise DamagedCheckpoint(f"{_shown(path)}: too large for a manifest; {_REMEDY}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{_shown(path)}: missing; {_REMEDY}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{_shown(path)}: cannot be read ({error.strerror})") from None
    try:
        fields = json.loads(content)["manifest"]
        # Comparing bytes leaves no flip unseen, not even one of white space.
        if _encode(fields) != content:
            raise DamagedCheckpoint(f"{_shown(path)}: changed after it was written; {_REMEDY}")
        version, manifest = fields["format"], _manifest(fields)
    except DamagedCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise DamagedCheckpoint(f"{_shown(path)}: not a manifest; {_REMEDY}") from None
    if version != _FORMAT:
        raise DamagedCheckpoint(f"{_shown(path)}: format {version!r}; this version reads {_FORMAT}")
    name = folder.name.removesuffix(SAVING)
    if is_step(name) and int(name) != manifest.step and not manifest.tensors:
        raise DamagedCheckpoint(
            f"{_shown(path)}: of step {manifest.step}, not of {int(name)}; {_REMEDY}"
        )
    return manifest


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    files = {n: FileEntry(int(e["size"]), str(e["sha256"])) for n, e in fields["files"].items()}
    tensors = {
        name: TensorEntry(
            str(entry["dtype"]),
            tuple(map(int, entry["shape"])),
            str(entry["sha256"]),
            tuple((str(file), int(begin), int(end)) for file, begin, end in entry["chunks"]),
        )
        for name, entry in fields.get("tensors", {}).items()
    }
    if not all(file in files for entry in tensors.values() for file, _, _ in entry.chunks):
        raise ValueError("a tensor in a file that is not listed")
    if not isinstance(fields.get("about", {}), dict):
        raise ValueError("about is no object")
    step = fields.get("step")
    return Manifest(files, None if step is None else int(step), tensors, fields.get("about", {}))


def joined(digests: Iterable[str]) -> str:
    """SHA-256 of digests, hexadecimal, one after the other."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _parts(manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    """Of the files with several tensors, or a header, the bytes of the header and of each."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for entry in manifest.tensors.values():
        for file, begin, end in entry.chunks:
            if (begin, end) != (0, manifest.files[file].size):
                parts.setdefault(file, []).append((begin, end))
    return {file: [(0, min(found)[0]), *sorted(found)] for file, found in parts.items()}


def _damaged_tensors(folder: Path, name: str, manifest: Manifest) -> str:
    """Which tensors a changed file of this name has lost, as words for a message."""
    lost: list[str] = []
    for tensor, entry in manifest.tensors.items():
        for file, begin, end in entry.chunks:
            if file != name:
                continue
            alone = len(entry.chunks) == 1
            if not alone or _digest(folder / name, begin, end) != entry.sha256:
                lost.append(tensor)
    if not lost:
        return ""
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f" (tensor {ascii(lost[0])[1:-1]}{more})"


def _digest(path: Path, begin: int, end: int) -> str:
    """SHA-256 of a part of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end and (piece := file.read(min(end - begin, 1 << 20))):
            digest.update(piece)
            begin += len(piece)
    return digest.hexdigest()


def _walk(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its name in it, sorted; links and special files are refused."""
    found: dict[str, Path] = {}

    def visit(entries: Iterable[os.DirEntry[str]]) -> None:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                with os.scandir(path) as inner:
                    visit(inner)
            elif entry.is_file(follow_symlinks=False):
                found[path.relative_to(folder).as_posix()] = path
            else:
                raise DamagedCheckpoint(
                    f"{_shown(path)}: a link or special file; a checkpoint holds plain files only"
                )

    try:
        with os.scandir(folder) as entries:
            visit(entries)
    except OSError as error:
        raise DamagedCheckpoint(
            f"{_shown(Path(error.filename or folder))}: cannot be read ({error.strerror})"
        ) from None
    return dict(sorted(found.items()))


def _compare(path: Path, digest: str, entry: FileEntry, which: str = "") -> None:
    if digest != entry.sha256:
        digests = f"its SHA-256 is {digest[:16]}… where {entry.sha256[:16]}… was saved"
        raise DamagedCheckpoint(f"{_shown(path)}{which}: {digests}; {_REMEDY}")


def _compare_size(path: Path, size: int, entry: FileEntry) -> None:
    if size != entry.size:
        sizes = f"{size:,} bytes where {entry.size:,} were saved"
        raise DamagedCheckpoint(f"{_shown(path)}: {sizes}; {_REMEDY}")


def _encode(manifest: Mapping[str, Any]) -> bytes:
    def dump(value: object) -> str:
        return json.dumps(value, indent=1, sort_keys=True)

    digest = hashlib.sha256(dump(manifest).encode()).hexdigest()
    return (dump({"manifest": manifest, "sha256": digest}) + "\n").encode()


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


def sync(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
