"""Is a checkpoint whole? A manifest of SHA-256 digests, and its check. Imports no jax.

Formats for arrays keep no digest of values: a flipped bit is restored without a word. So every step
folder ends with a manifest: the size and SHA-256 of each of its files (of array chunks as they are
stored, and of metadata), and a digest of the manifest itself. It is written last, by an atomic
rename, after everything it names was forced to disk; a step is saved once it is there.

Hashing streams files through a pool of threads. One thread did 1.3 GB/s and two 2.6 GB/s on a CPU
with SHA extensions, faster than the disk.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
SAVING = ".saving"
REMOVING = ".removing"
_FORMAT = 1
_STEP = re.compile(r"[0-9]{8,18}")
_LEFTOVER = re.compile(rf"[0-9]{{8,18}}(?:\{SAVING}|\{REMOVING}).*")
_THREADS = 8  # more readers than this gain nothing on one disk


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, changed, or not one that was saved; one line naming it."""


@dataclass(frozen=True)
class Verified:
    """What a check has read: the number of files, the manifest apart, and their bytes."""

    files: int
    bytes: int


@dataclass(frozen=True)
class _Entry:
    size: int
    sha256: str


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{step:08d}"


def step_folders(folder: Path) -> dict[int, Path]:
    """The steps that were saved, lowest first, whole or damaged; nothing is read.

    A save that was killed after its manifest and before its last rename counts: its folder still
    ends in '.saving'.
    """
    found: dict[int, Path] = {}
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        if _is_step(name) and (folder / name).is_dir():
            found[int(name)] = folder / name
    for name in names:
        stem = name.removesuffix(SAVING)
        if stem != name and _is_step(stem) and (folder / name / MANIFEST).is_file():
            found.setdefault(int(stem), folder / name)
    return dict(sorted(found.items()))


def sweep(folder: Path) -> None:
    """Finish or remove what a killed process left in `folder`; for its only writer.

    Raises:
      OSError: the folder cannot be changed.
    """
    for step, found in step_folders(folder).items():
        if found.name.endswith(SAVING):
            found.rename(step_folder(folder, step))
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(folder / name)


def publish(folder: Path, *, step: int) -> None:
    """Give the complete folder of a save its name, replacing an earlier save of the same step.

    Raises:
      OSError: the folder cannot be changed.
    """
    final = step_folder(folder, step)
    remove(final)
    final.with_name(final.name + SAVING).rename(final)
    _sync(folder)


def remove(folder: Path) -> None:
    """Remove a step; renamed first, so that a kill never leaves a part of it under its name.

    Raises:
      OSError: the folder cannot be changed.
    """
    if folder.exists():
        doomed = folder.with_name(folder.name + REMOVING)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def write_manifest(folder: Path, *, step: int) -> None:
    """Force every file of `folder` to disk, then write the manifest of them.

    Raises:
      DamagedCheckpoint: a link or another special file is among them.
      OSError: a file cannot be read or the manifest not written.
    """

    def entry(found: tuple[str, Path]) -> tuple[str, dict[str, Any]]:
        name, path = found
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return name, {"size": os.fstat(file.fileno()).st_size, "sha256": digest}

    files = {name: path for name, path in _walk(folder).items() if name != MANIFEST}
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(pool.map(entry, files.items()))
    for parent, _, _ in os.walk(folder):
        _sync(Path(parent))
    content = _encode({"format": _FORMAT, "step": step, "files": entries})
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    _sync(folder)


def verify(folder: Path, *, under: str = "", share: tuple[int, int] = (0, 1)) -> Verified:
    """Read every byte of a step folder and compare with its manifest.

    Args:
      folder: a step folder.
      under: only the files whose names in the folder begin with this, as 'params/'.
      share: (index, number) of a reader among several, who read every number-th file each.

    Raises:
      DamagedCheckpoint: naming the first file that is missing, changed, unexpected, unreadable or a
        link, or the manifest itself.
    """
    entries = _present(folder)
    names = [name for name in sorted(entries) if name.startswith(under)]
    chosen = {name: entries[name] for name in names[share[0] :: share[1]]}

    def check(item: tuple[str, _Entry]) -> int:
        name, entry = item
        path = folder / name
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedCheckpoint(f"{_shown(path)}: cannot be read ({error.strerror})") from None
        _compare(path, digest, entry)
        return entry.size

    with ThreadPoolExecutor(_THREADS) as pool:
        return Verified(len(chosen), sum(pool.map(check, chosen.items())))


def read_verified(folder: Path, name: str) -> bytes:
    """One file of a step folder, compared with the manifest.

    Raises:
      DamagedCheckpoint: the file or the manifest is missing or changed.
    """
    entries = _read_manifest(folder)
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


def complete(folder: Path) -> tuple[list[int], dict[int, str]]:
    """The steps that are complete, lowest first, and what is wrong with the others.

    Complete means a valid manifest and every file it names there with its size, none else. Only the
    manifests are read.
    """
    whole: list[int] = []
    faults: dict[int, str] = {}
    for step, found in step_folders(folder).items():
        try:
            _present(found)
        except DamagedCheckpoint as error:
            faults[step] = str(error)
        else:
            whole.append(step)
    return whole, faults


_REMEDY = "restore another step, or remove this one"


def _is_step(name: str) -> bool:
    return _STEP.fullmatch(name) is not None and name == f"{int(name):08d}"


def _present(folder: Path) -> Mapping[str, _Entry]:
    """The manifest, after comparing names and sizes with the files that are there."""
    entries = _read_manifest(folder)
    found = _walk(folder)
    found.pop(MANIFEST, None)
    for name, entry in entries.items():
        path = folder / name
        if name not in found:
            raise DamagedCheckpoint(f"{_shown(path)}: missing; {_REMEDY}")
        try:
            size = path.lstat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{_shown(path)}: cannot be read ({error.strerror})") from None
        if size != entry.size:
            sizes = f"{size:,} bytes where {entry.size:,} were saved"
            raise DamagedCheckpoint(f"{_shown(path)}: {sizes}; {_REMEDY}")
    for name in found:
        if name not in entries:
            raise DamagedCheckpoint(
                f"{_shown(folder / name)}: not part of the checkpoint; remove the file"
            )
    return entries


def _read_manifest(folder: Path) -> Mapping[str, _Entry]:
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or folder.is_symlink():
            raise DamagedCheckpoint(f"{_shown(path)}: reached by a link; {_REMEDY}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{_shown(path)}: missing; {_REMEDY}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{_shown(path)}: cannot be read ({error.strerror})") from None
    try:
        manifest = json.loads(content)["manifest"]
        # Comparing bytes leaves no flip unseen, not even one of white space.
        if _encode(manifest) != content:
            raise DamagedCheckpoint(f"{_shown(path)}: changed after it was written; {_REMEDY}")
        version, step = manifest["format"], int(manifest["step"])
        entries = {
            n: _Entry(int(e["size"]), str(e["sha256"])) for n, e in manifest["files"].items()
        }
    except DamagedCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedCheckpoint(f"{_shown(path)}: not a manifest; {_REMEDY}") from None
    if version != _FORMAT:
        raise DamagedCheckpoint(f"{_shown(path)}: format {version!r}; this version reads {_FORMAT}")
    name = folder.name.removesuffix(SAVING)
    if _is_step(name) and int(name) != step:
        raise DamagedCheckpoint(f"{_shown(path)}: of step {step}, not of {int(name)}; {_REMEDY}")
    return entries


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


def _compare(path: Path, digest: str, entry: _Entry) -> None:
    if digest != entry.sha256:
        digests = f"its SHA-256 is {digest[:16]}… where {entry.sha256[:16]}… was saved"
        raise DamagedCheckpoint(f"{_shown(path)}: {digests}; {_REMEDY}")


def _encode(manifest: Mapping[str, Any]) -> bytes:
    def dump(value: object) -> str:
        return json.dumps(value, indent=1, sort_keys=True)

    digest = hashlib.sha256(dump(manifest).encode()).hexdigest()
    return (dump({"manifest": manifest, "sha256": digest}) + "\n").encode()


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
