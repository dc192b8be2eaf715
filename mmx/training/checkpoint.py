"""Checkpoints: the whole state of a run in one folder a step, saved beside the training.

    run/checkpoints/00000100/
        params/         the parameters, an Orbax tree of its own
        state/          everything else of the state: optimizer, random keys, counters
        data.json       where the data iterator stands
        config.json     configuration and schedule
        arrays.json     name, shape and dtype of every array
        MANIFEST.json   sizes and SHA-256 of the files above (`mmx.integrity`)

`save` copies the arrays to the host and returns; Orbax writes them to '00000100.saving', the
manifest is written last, and one rename gives the folder its name. A kill at any moment costs the
steps since the last completed save. Restoring reads every byte against the manifest first.
"""

import json
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mmx import integrity
from mmx.training import folders, save_errors
from mmx.training.agreement import by_first
from mmx.training.checkpoint_arrays import (
    PARAMS,
    Arrays,
    compare_arrays,
    compare_config,
    description,
    item_of,
    named,
    read_arrays,
    stored,
)


class SaveFailed(ValueError):
    """A save did not complete; earlier steps are as they were. One line with the cause."""


@dataclass(frozen=True)
class Restored:
    """What a step holds.

    Attributes:
      state: the tree of `abstract_state`, its leaves arrays on the shardings asked for.
      data: the state of the data iterator, as it was given to `save`.
      config: the configuration, as it was given to `save`; tuples have become lists.
    """

    state: Any
    data: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; one writer, any number of readers.

    In a run of several processes each calls every method with the same arguments; the folder must
    be one that all of them see.
    """

    def __init__(self, folder: Path, *, keep: int = 3, save_every: int | None = None):
        """Nothing is written before the first save.

        Args:
          folder: where the step folders lie.
          keep: complete steps to keep; older ones are removed once a new one is complete.
          save_every: for `due`, in steps; None for never.

        Raises:
          ValueError: `keep` or `save_every` below 1.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept")
        if save_every is not None and save_every < 1:
            raise ValueError(f"save_every is {save_every}; it must be at least 1, or None")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.save_every = save_every
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._saving: int | None = None
        self._failure: SaveFailed | None = None
        self._silenced = False

    def due(self, step: int) -> bool:
        """Whether `save_every` asks for a save after this many steps."""
        return self.save_every is not None and step > 0 and step % self.save_every == 0

    def steps(self) -> list[int]:
        """The complete steps, lowest first; a warning of one line for each that is not.

        Complete means a valid manifest and every file there with its size; contents are read by
        `restore`.
        """
        return complete_steps(self.folder)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return (self.steps() or [None])[-1]

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        wait: bool = False,
    ) -> None:
        """Save a step in the background, after waiting for the save before it.

        The arrays may be donated or deleted and `data` changed as soon as this returns. A step that
        exists is replaced once the new one is complete.

        Args:
          step: optimizer steps done, >= 0.
          state: any tree of jax arrays with its parameters under 'params'; keys of `jax.random.key`
            are stored as their uint32 data.
          data: the state of the data iterator, of JSON values.
          config: configuration and schedule, of JSON values.
          wait: return when the step is complete.

        Raises:
          SaveFailed: this save could not begin, or the one before it failed; then nothing of this
            step was written, and `save` can be called again.
          ValueError: an argument cannot be stored.
        """
        step = int(step)  # a number of numpy's would not do in the manifest
        if step < 0:
            raise ValueError(f"step is {step}; it must be at least 0")
        arrays = named(state)
        if not any(item_of(name) == PARAMS for name in arrays):
            raise ValueError("the state has no 'params'; they must be an entry of its first level")
        for name, leaf in arrays.items():
            if not isinstance(leaf, jax.Array):
                kind = type(leaf).__name__
                raise ValueError(f"state {name} is a {kind}; it must be a jax array")
        documents = {
            "data.json": _json(data, "data"),
            "config.json": _json(config, "config"),
            "arrays.json": _json(description(arrays), "arrays"),
        }
        self.wait()
        try:
            self._begin(step, arrays)
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step
        self._thread = threading.Thread(
            target=self._finish, args=(step, documents), name=f"checkpoint-{step}"
        )
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
          SaveFailed: a save has failed since the last call.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if jax.process_count() > 1:
            # The first process writes the manifest; the others learn here how it went.
            ocp.multihost.sync_global_processes(f"checkpoint {self._saving}")
            if failure is None and self._saving not in complete_steps(self.folder):
                failure = SaveFailed(f"{self.folder}: step {self._saving} could not be saved")
        if failure is not None:
            raise failure

    def restore(
        self,
        step: int,
        abstract_state: Any,
        *,
        config: Mapping[str, Any] | None = None,
    ) -> Restored:
        """Read a step after checking every byte of it.

        Args:
          step: one of `steps()`.
          abstract_state: the tree that was saved, of `jax.ShapeDtypeStruct`s or arrays; leaves are
            placed on their shardings, whatever the devices were that saved them. One without a
            sharding, or an array that was never placed, is left uncommitted.
          config: entries that must be equal to those saved; others are not compared.

        Raises:
          ValueError: no such step; another config, array, shape or dtype was saved (the first that
            differs is named).
          DamagedCheckpoint: a file is missing or changed; it is named.
          SaveFailed: a save under way has failed; the call can be repeated.
        """
        self.wait()
        folder = _existing(self.folder, step)
        saved_config = _read_json(folder, "config.json")
        if config is not None:
            compare_config(folder, json.loads(_json(config, "config")), saved_config)
        wanted = named(abstract_state)
        compare_arrays(folder, wanted, _read_json(folder, "arrays.json"))
        _verify(folder)
        arrays = read_arrays(folder, wanted)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), list(arrays.values()))
        return Restored(state, _read_json(folder, "data.json"), saved_config)

    def close(self) -> None:
        """Wait for the last save and end the threads.

        Raises:
          SaveFailed: the last save failed.
        """
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None
            if self._silenced:
                save_errors.restore()
                self._silenced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, step: int, arrays: Arrays) -> None:
        """Copy the arrays to the host and start to write them."""
        by_first(lambda: folders.prepare(self.folder, step))
        if self._checkpointer is None:
            if not self._silenced:
                save_errors.silence()
                self._silenced = True
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        items = {item: ocp.args.StandardSave(tree) for item, tree in stored(arrays).items()}
        folder = _folder_of_save(self.folder, step)
        self._checkpointer.save(folder, args=ocp.args.Composite(**items))

    def _finish(self, step: int, documents: Mapping[str, bytes]) -> None:
        """In the background: wait for Orbax, then make the step complete and remove old ones."""
        try:
            assert self._checkpointer is not None
            self._checkpointer.wait_until_finished()
            if jax.process_index() != 0:
                return
            folder = _folder_of_save(self.folder, step)
            for name, content in documents.items():
                (folder / name).write_bytes(content)
            integrity.write_manifest(folder, step=step)
            folders.publish(self.folder, step=step)
        except Exception as error:
            self._failure = self._failed(step, error)
            return
        self._remove_old(step)

    def _remove_old(self, saved: int) -> None:
        try:
            oldest = min(folders.complete(self.folder)[0][-self.keep :], default=saved)
            for step, folder in folders.step_folders(self.folder).items():
                if step < oldest and step != saved:
                    folders.remove(folder)
        except OSError as error:
            warnings.warn(f"{self.folder}: old steps stay ({error.strerror})", stacklevel=2)

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        """Remove what the save has written; the error to raise."""
        self._checkpointer = None  # one that has failed may hold futures that never end
        try:
            whole = folders.step_folders(self.folder).get(step)  # may lack its last rename alone
            _remove_partial(self.folder, step, keep=whole)
            steps = ", ".join(map(str, folders.complete(self.folder)[0]))
            left = f"steps {steps} are intact" if steps else "no step was lost"
        except OSError as unreadable:
            left = f"the folder cannot be read ({unreadable.strerror})"
        remedy = "make room or make the folder writable"
        return SaveFailed(
            f"{self.folder}: step {step} could not be saved; {left}; {remedy} "
            f"({save_errors.cause_of(error)})"
        )


def _remove_partial(folder: Path, step: int, *, keep: Path | None) -> None:
    """Remove what a failed save has written, and what its other writers still write meanwhile."""
    clean = 0
    for _ in range(50):  # they end within moments; what would still be left the next save removes
        found = [p for p in folder.glob(f"{_folder_of_save(folder, step).name}*") if p != keep]
        for partial in found:
            shutil.rmtree(partial, ignore_errors=True)
        clean = 0 if found else clean + 1
        if clean == 3:
            return
        time.sleep(0.1)


def complete_steps(folder: Path) -> list[int]:
    """As `Checkpoints.steps`, of a folder."""
    whole, faults = folders.complete(folder)
    for step, problem in faults.items():
        warnings.warn(f"step {step} is not complete and ignored: {problem}", stacklevel=2)
    return whole


def read_config(folder: Path, step: int) -> dict[str, Any]:
    """The configuration a step was saved with, compared with the manifest.

    Raises:
      ValueError: no such step.
      DamagedCheckpoint: the file is missing or changed.
    """
    return _read_json(_existing(folder, step), "config.json")


def restore_params(folder: Path, step: int, abstract_params: Any) -> Any:
    """The parameters alone, after checking every byte of them; optimizer files are not read.

    Args:
      folder: of the checkpoints.
      step: one of `complete_steps(folder)`.
      abstract_params: the tree of the parameters, of `jax.ShapeDtypeStruct`s or arrays, with
        shardings. A leaf of another floating dtype than saved is rounded to it.

    Raises:
      ValueError: no such step; another array or shape was saved (the first that differs is named).
      DamagedCheckpoint: a file is missing or changed; it is named.
    """
    found = _existing(folder, step)
    wanted = named({PARAMS: abstract_params})
    saved = {n: a for n, a in _read_json(found, "arrays.json").items() if item_of(n) == PARAMS}
    compare_arrays(found, wanted, saved, cast=True)
    _verify(found, under=f"{PARAMS}/")
    arrays = read_arrays(found, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract_params), list(arrays.values()))


def _verify(folder: Path, *, under: str = "") -> None:
    """Check every byte; several processes share the work and agree on the result."""
    index, number = jax.process_index(), jax.process_count()
    problem = None
    try:
        integrity.verify(folder, under=under, share=(index, number))
    except integrity.DamagedCheckpoint as error:
        problem = error
    if number > 1:
        sound = multihost_utils.process_allgather(np.array(problem is None))
        if problem is None and not sound.all():
            finder = int(np.argmin(sound))
            problem = integrity.DamagedCheckpoint(f"{folder}: damaged, as process {finder} found")
    if problem is not None:
        raise problem


def _existing(folder: Path, step: int) -> Path:
    found = folders.step_folders(Path(folder).absolute())
    if step not in found:
        there = f"steps {', '.join(map(str, found))}" if found else "no step"
        raise ValueError(f"{folder}: holds no step {step}; it holds {there}")
    return found[step]


def _folder_of_save(folder: Path, step: int) -> Path:
    return folder / (folders.step_folder(folder, step).name + folders.SAVING)


def _json(value: Mapping[str, Any], name: str) -> bytes:
    try:
        return (json.dumps(value, indent=1) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads(integrity.read_verified(folder, name))
