"""The folder of a run before it goes on: in one run's hands, and nothing in it taken on trust."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from tokenizers import Tokenizer

from mmx.data.shards import Manifest
from mmx.data.tokenizer import load_tokenizer
from mmx.training import folders
from mmx.training.agreement import as_first
from mmx.training.checkpoint import Checkpoints


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; the lock ends with the process, however.

    Raises:
      ValueError: it cannot be made, or another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; choose another run folder") from None
    try:
        taken = False
        if jax.process_index() == 0:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # of others than this one: a file system without locks
                taken = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        if as_first(taken):
            raise ValueError(
                f"{folder}: another run is training in this folder; wait until it has ended, or "
                "choose another run folder"
            )
        yield
    finally:
        os.close(handle)


def last_step(checkpoints: Checkpoints) -> int | None:
    """The step to go on from, the same in all processes; None for a run that has saved none.

    Raises:
      ValueError: steps were saved and none is whole. To begin anew would remove them in the end.
    """
    latest = checkpoints.latest()
    saved = folders.step_folders(checkpoints.folder)
    found = as_first(latest if latest is not None else -2 if saved else -1)
    if found == -2:
        _, faults = folders.complete(checkpoints.folder)
        why = next(reversed(faults.values()), "as process 0 sees it")
        raise ValueError(
            f"{checkpoints.folder}: none of its {len(saved)} steps is whole ({why}); bring the "
            "files back, or choose another run folder"
        )
    return None if found < 0 else found


def tokenizer_of(manifest: Manifest) -> tuple[Tokenizer, bytes]:
    """The tokenizer of a corpus, and its file.

    Raises:
      ValueError: it is missing, or not the one that the shards were made with.
    """
    path, remedy = manifest.tokenizer_file, "bring it back, or build the corpus again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {remedy}") from None
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        raise ValueError(f"{path}: not the tokenizer that the shards were made with; {remedy}")
    return load_tokenizer(path), content


def loss_before(path: Path) -> float | None:
    """The held-out loss before the first step that run.json tells; None where there is none.

    Raises:
      ValueError: it is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{path}: not what a run writes; remove it, and it is written anew")
    loss = about.get("heldout_loss_before")
    return loss if isinstance(loss, int | float) and not isinstance(loss, bool) else None
