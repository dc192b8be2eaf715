"""The folders of a run's steps: which are there, which are whole, and how they come and go.

Imports no jax.
"""

import os
import re
import shutil
from pathlib import Path

from mmx.integrity import MANIFEST, SAVING, DamagedCheckpoint, check_files, is_step, sync

REMOVING = ".removing"
_LEFTOVER = re.compile(rf"[0-9]{{8,18}}(?:\{SAVING}|\{REMOVING}).*")


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
        if is_step(name) and (folder / name).is_dir():
            found[int(name)] = folder / name
    for name in names:
        stem = name.removesuffix(SAVING)
        if stem != name and is_step(stem) and (folder / name / MANIFEST).is_file():
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


def prepare(folder: Path, step: int) -> None:
    """Make `folder` ready for the save of a step; for its only writer.

    Raises:
      OSError: it cannot be written; found here, before a save has threads under way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    saving = folder / (step_folder(folder, step).name + SAVING)
    saving.mkdir()
    saving.rmdir()


def publish(folder: Path, *, step: int) -> None:
    """Give the complete folder of a save its name, replacing an earlier save of the same step.

    Raises:
      OSError: the folder cannot be changed.
    """
    final = step_folder(folder, step)
    remove(final)
    final.with_name(final.name + SAVING).rename(final)
    sync(folder)


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


def complete(folder: Path) -> tuple[list[int], dict[int, str]]:
    """The steps that are complete, lowest first, and what is wrong with the others.

    Complete means a valid manifest and every file it names there with its size, none else. Only the
    manifests are read.
    """
    whole: list[int] = []
    faults: dict[int, str] = {}
    for step, found in step_folders(folder).items():
        try:
            check_files(found)
        except DamagedCheckpoint as error:
            faults[step] = str(error)
        else:
            whole.append(step)
    return whole, faults
