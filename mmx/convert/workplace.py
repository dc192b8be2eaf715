"""The folder in which an output comes to be, and the journal that makes it resumable.

An output is made in `DST.converting` and renamed once it is whole, so there is never half of one
under its name. The folder is locked by whoever works in it. Its journal has one line a finished
file, forced to disk after the file was; the first line says what is converted and how, so that only
the same conversion goes on. In the end the manifest is written, the journal removed, the folder
renamed.
"""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from mmx.integrity import MANIFEST, DamagedCheckpoint, check_files, read_manifest, sync

CONVERTING, REPLACED = ".converting", ".replaced"
JOURNAL = ".journal.jsonl"
State = Literal["begun", "finished", "published"]
_AGAIN = "or --overwrite to begin again"


class Workplace:
    """`DST.converting`, locked.

    Attributes:
      folder: where to write.
      done: what the journal says of each finished file: {'size', 'sha256', …} by its name.
      state: 'begun'; 'finished' when the manifest is there and only the rename is left;
        'published' when `destination` is already the result of this very conversion.
    """

    def __init__(
        self, destination: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
    ):
        """Look at what is there, and make the folder or take it up.

        Args:
          destination: the output's name.
          identity: of the conversion, as JSON values (`Plan.identity`).
          resume: go on with an unfinished conversion that is there.
          overwrite: replace an output that is there; and begin again unless `resume` is said.

        Raises:
          ValueError: something is there and must not be touched; what to do is said.
          OSError: the folder cannot be made.
        """
        self.destination = destination
        self.folder = destination.with_name(destination.name + CONVERTING)
        self.done: dict[str, dict[str, Any]] = {}
        self.state: State = "begun"
        self._identity = dict(identity)
        self._journal = -1
        self._lock = threading.Lock()
        if resume and self._published():
            self.state = "published"
            return
        self._overwrite = overwrite
        check_destination(destination, overwrite=overwrite)
        fresh = not self.folder.exists()
        if not fresh and not resume and not overwrite:
            raise ValueError(
                f"{self.folder}: holds an unfinished conversion; add --resume to go on with it, "
                f"{_AGAIN}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handle = self._locked()
        try:
            # Whoever held the lock may have published meanwhile.
            check_destination(destination, overwrite=overwrite)
            self._take_up(resume)
        except BaseException:
            self._release()
            raise

    def record(self, file: str, entry: Mapping[str, Any]) -> None:
        """Note that a file is finished and on disk; for any thread."""
        line = (json.dumps({"file": file, **entry}) + "\n").encode()
        with self._lock:
            os.write(self._journal, line)
            os.fsync(self._journal)
            self.done[file] = dict(entry)

    def finish(self) -> None:
        """Remove the journal; the manifest is there."""
        (self.folder / JOURNAL).unlink(missing_ok=True)
        sync(self.folder)
        self.state = "finished"

    def publish(self) -> None:
        """Give the output its name; what had it goes once the new one is there.

        Raises:
          ValueError: something else has come to be under the name meanwhile; the output stays where
            it is.
          OSError: a folder cannot be renamed or removed.
        """
        check_destination(self.destination, overwrite=self._overwrite)
        old = self.destination.with_name(self.destination.name + REPLACED)
        if self.destination.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.destination.rename(old)
        self.folder.rename(self.destination)
        sync(self.destination.parent)
        if old.exists():
            shutil.rmtree(old)
        self.state = "published"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _published(self) -> bool:
        """Whether the run that is resumed had come to its end."""
        if self.folder.exists() or not _made_by(self.destination, self._identity):
            return False
        check_files(self.destination)
        return True

    def _locked(self) -> int:
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have renamed it in the meantime.
            if not os.path.samestat(os.fstat(handle), os.stat(self.folder)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(handle)
            raise ValueError(
                f"{self.folder}: another process is converting to it; wait for it or end it"
            ) from None
        return handle

    def _release(self) -> None:
        for name in ("_journal", "_handle"):
            handle = getattr(self, name, -1)
            if handle >= 0:
                os.close(handle)
            setattr(self, name, -1)

    def _take_up(self, resume: bool) -> None:
        """Under the lock: continue, or empty the folder and begin."""
        journal = self.folder / JOURNAL
        names = set(os.listdir(self.folder))
        if names and not names & {JOURNAL, JOURNAL + ".tmp", MANIFEST}:
            raise ValueError(
                f"{self.folder}: holds files that are not of a conversion; move them, or choose "
                "another name"
            )
        if resume and (self.folder / MANIFEST).exists():
            if not _made_by(self.folder, self._identity):
                raise ValueError(f"{self.folder}: is of another conversion; add --overwrite")
            self.finish()
            return
        lines = _read_journal(journal) if resume else []
        if lines:
            _compare(self.folder, lines[0], self._identity)
            for line in lines[1:]:
                entry = dict(line)
                file = str(entry.pop("file"))
                path = self.folder / file
                if path.is_file() and path.stat().st_size == entry["size"]:
                    self.done[file] = entry
        self._sweep()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        # Written anew without the end of a torn line, and without files that have gone since.
        known = [self._identity, *({"file": name, **entry} for name, entry in self.done.items())]
        temporary = journal.with_name(JOURNAL + ".tmp")
        handle = os.open(temporary, flags, 0o644)
        content = "".join(json.dumps(line) + "\n" for line in known).encode()
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
        temporary.replace(journal)
        sync(self.folder)
        self._journal = handle

    def _sweep(self) -> None:
        """Remove what is not in the journal: files under way, and of a run before `overwrite`."""
        keep = {self.folder / name for name in (*self.done, JOURNAL)}
        for parent, folders, files in os.walk(self.folder, topdown=False):
            for name in files:
                if Path(parent, name) not in keep:
                    Path(parent, name).unlink()
            for name in folders:
                path = Path(parent, name)
                if path.is_symlink():
                    path.unlink()
                elif not any(path.iterdir()):
                    path.rmdir()


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Refuse to touch what is no output of ours, or was not meant.

    Raises:
      ValueError: something is there.
    """
    replaced = destination.with_name(destination.name + REPLACED)
    if replaced.exists() and not (replaced / MANIFEST).exists():
        raise ValueError(f"{replaced}: is in the way and no checkpoint of ours; move it")
    if not destination.exists() and not destination.is_symlink():
        return
    if os.path.ismount(destination):
        raise ValueError(
            f"{destination}: is where a disk is mounted, and cannot be renamed to; name a folder "
            "inside it"
        )
    if not destination.is_dir() or destination.is_symlink():
        raise ValueError(f"{destination}: exists and is no folder; choose another name")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{destination}: exists and is not empty; choose another folder, or --overwrite it"
        )
    if not any((destination / name).is_file() for name in (MANIFEST, "config.json")):
        raise ValueError(
            f"{destination}: holds no checkpoint, and --overwrite replaces nothing else; choose "
            "another folder"
        )


def check_apart(source: Path, destination: Path) -> None:
    """Refuse an output in its own source, or the reverse.

    Raises:
      ValueError: one folder is in the other.
    """
    theirs = source.resolve()
    for suffix in ("", CONVERTING, REPLACED):  # names that are used, and removed, on the way
        ours = destination.with_name(destination.name + suffix).resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise ValueError(f"{ours}: lies in {source}, or the reverse; choose another folder")


def _made_by(folder: Path, identity: Mapping[str, Any]) -> bool:
    try:
        return read_manifest(folder).about.get("conversion") == identity
    except DamagedCheckpoint:
        return False


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where it had not begun."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for line in content.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict) or (lines and not {"file", "size", "sha256"} <= set(entry)):
            break
        lines.append(entry)
    return lines


def _compare(folder: Path, seen: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a conversion of something else; says of what."""

    def differing(name: str, ours: Any, theirs: Any) -> str | None:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key in sorted({*ours, *theirs}):
                inner = f"{name} {key}".strip()
                found = differing(inner, ours.get(key), theirs.get(key))
                if found:
                    return found
            return None
        return None if ours == theirs else f"{name}: now {ours!r}, then {theirs!r}"

    difference = differing("", wanted, seen)
    if difference:
        raise ValueError(
            f"{folder}: was begun differently ({difference}); give the same source and options, "
            f"{_AGAIN}"
        )
