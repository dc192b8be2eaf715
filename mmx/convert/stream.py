"""A planned conversion, carried out: read ahead, turned over and written behind by threads.

Pieces in flight never take more memory than the budget. Files of Hugging Face's forms are written
one after the other, their pieces in order; Orbax chunks in any order. Each finished file is noted
in the journal, so a killed run loses what was under way and nothing else.
"""

import errno
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from mmx import integrity
from mmx.convert.checkpoint import INDEX
from mmx.convert.documents import read_carried
from mmx.convert.memory import Budget, resident
from mmx.convert.orbax_store import TreeWriter
from mmx.convert.pieces import Piece, carried_pieces, chunk_piece, tensor_pieces
from mmx.convert.plan import Plan
from mmx.convert.safetensors_file import DTYPE_NAMES, read_header
from mmx.convert.safetensors_writer import ShardWriter
from mmx.convert.source import PARAMS
from mmx.convert.workplace import JOURNAL, Workplace

MARGIN = 64 << 20  # bytes for what is not counted: small arrays, threads, the allocator
_AHEAD = 2  # pieces in flight a worker
Progress = Callable[[int], None]  # called with bytes of tensors that are finished


@dataclass(frozen=True)
class Machine:
    """How a conversion may use the machine.

    Attributes:
      budget: bytes of pieces in flight.
      workers: threads.
    """

    budget: int
    workers: int


def largest_piece(plan: Plan) -> int:
    """Bytes that the costliest piece of a plan takes."""
    return max((piece.memory for piece in _all_pieces(plan)), default=0)


def _all_pieces(plan: Plan) -> Iterator[Piece]:
    for name in plan.tensors:
        yield from _pieces_of(plan, name)
    for tree, arrays in plan.trees.items():
        for name, layout in arrays.items():
            entries = plan.source.by_path.get(name, []) if tree == PARAMS else []
            one_dtype = len({plan.source.dtype(entry) for entry in entries}) < 2
            # Chunks of an array cost the same, but for the last and for casts of some.
            indices = [(0,) * len(layout.shape)] if one_dtype else layout.chunks()
            for index in indices:
                yield chunk_piece(plan, tree, name, layout.region(index))


def machine(plan: Plan, max_ram: int, workers: int) -> Machine:
    """Divide the memory: what the process holds already, and the rest for pieces.

    Raises:
      ValueError: too little for one piece; the least that works is said.
    """
    held = resident() + MARGIN
    largest = largest_piece(plan)
    if max_ram - held < largest:
        least = -(-(held + largest) // (1 << 20)) + 16  # the process grows a little meanwhile
        raise ValueError(
            f"--max-ram {decimal(max_ram)} is too little: the program itself takes "
            f"{decimal(held)} and a piece {decimal(largest)}; give at least {least}MiB"
        )
    return Machine(max_ram - held, workers)


def execute(plan: Plan, work: Workplace, use: Machine, progress: Progress) -> int:
    """Write everything the plan names into the workplace, the manifest last.

    Returns:
      Bytes of tensors that were written, not found finished.

    Raises:
      ValueError: the source is damaged, or the disk is full; what is finished stays.
      OSError: the output cannot be written.
    """
    written = 0

    def count(number: int) -> None:
        nonlocal written
        with counting:
            written += number
        progress(number)

    counting = threading.Lock()
    progress(_finished_bytes(plan, work))
    with _telling_of_full_disks(work.folder):
        tensors = (_write_trees if plan.trees else _write_shards)(plan, work, use, count)
        for name in plan.files:
            (work.folder / name).write_bytes(read_carried(plan.source.folder, name))
        for name, content in plan.documents.items():
            (work.folder / name).write_bytes(content)
        known = {
            name: integrity.FileEntry(entry["size"], entry["sha256"])
            for name, entry in work.done.items()
        }
        about = {"conversion": plan.identity(), "form": plan.options.to}
        integrity.write_manifest(
            work.folder, known=known, tensors=tensors, about=about, but=JOURNAL
        )
        work.finish()
    return written


def _finished_bytes(plan: Plan, work: Workplace) -> int:
    """Bytes of tensors that an interrupted run has left."""
    shards = [name for file, names in plan.shards.items() if file in work.done for name in names]
    chunks = sum(entry["size"] for entry in work.done.values()) if plan.trees else 0
    return chunks + sum(plan.tensors[name].stored.nbytes for name in shards)


@contextmanager
def _telling_of_full_disks(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"{folder}: the disk is full; make room and run the same again with --resume"
            ) from None
        if error.filename is None and error.strerror:
            raise ValueError(
                f"{folder}: cannot be written ({error.strerror}); see to it and run the same "
                "again with --resume"
            ) from None
        raise


# ---------------------------------------------------------------- Hugging Face


def _write_shards(
    plan: Plan, work: Workplace, use: Machine, progress: Progress
) -> dict[str, integrity.TensorEntry]:
    with _threads(use) as run:
        for file, names in plan.shards.items():
            if file in work.done:
                continue
            described = {
                name: (
                    DTYPE_NAMES[plan.tensors[name].stored.dtype],
                    plan.tensors[name].stored.shape,
                )
                for name in names
            }
            pieces = (piece for name in names for piece in _pieces_of(plan, name))
            with ShardWriter(work.folder / file, described) as writer:
                for piece, array in run.in_order(pieces):
                    writer.write(array)
                    del array  # before the next one is there
                    progress(piece.nbytes)
                written = writer.close()
            entry = {"size": written.size, "sha256": written.sha256, "tensors": written.tensors}
            work.record(file, entry)
    if len(plan.shards) > 1:
        _write_index(plan, work.folder)
    return _shard_entries(plan, work)


def _pieces_of(plan: Plan, name: str) -> Iterator[Piece]:
    tensor = plan.tensors[name]
    if tensor.kind == "carried":
        return carried_pieces(plan.source, name)
    return tensor_pieces(plan, tensor)


def _write_index(plan: Plan, folder: Path) -> None:
    weight_map = {name: file for file, names in plan.shards.items() for name in names}
    index = {
        "metadata": {"total_size": plan.nbytes},
        "weight_map": {name: weight_map[name] for name in plan.tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shard_entries(plan: Plan, work: Workplace) -> dict[str, integrity.TensorEntry]:
    entries: dict[str, integrity.TensorEntry] = {}
    for file in plan.shards:
        found, _ = read_header(work.folder / file)
        for name, info in found.items():
            digest = work.done[file]["tensors"][name]
            chunk = (file, info.begin, info.end)
            entries[name] = integrity.TensorEntry(info.dtype, info.shape, digest, (chunk,))
    return entries


# ---------------------------------------------------------------- Orbax


def _write_trees(
    plan: Plan, work: Workplace, use: Machine, progress: Progress
) -> dict[str, integrity.TensorEntry]:
    entries: dict[str, integrity.TensorEntry] = {}
    writers = {tree: TreeWriter(work.folder / tree, arrays) for tree, arrays in plan.trees.items()}
    with _threads(use) as run:
        run.all(_chunk_tasks(plan, work, writers, progress))
    for tree, writer in writers.items():
        writer.finish()
        for name, layout in plan.trees[tree].items():
            files = [f"{tree}/{writer.file(name, index)}" for index in layout.chunks()]
            digests = [work.done[file]["sha256"] for file in files]
            entries[f"{tree}/{name}"] = integrity.TensorEntry(
                layout.dtype,
                layout.shape,
                digests[0] if len(digests) == 1 else integrity.joined(digests),
                tuple((file, 0, work.done[file]["size"]) for file in files),
            )
    return entries


def _chunk_tasks(
    plan: Plan, work: Workplace, writers: dict[str, TreeWriter], progress: Progress
) -> Iterator[tuple[Piece, Callable[[np.ndarray], None]]]:
    """Chunks that are not there, with what to do with each."""
    for tree, arrays in plan.trees.items():
        writer = writers[tree]
        for name, layout in arrays.items():
            for index in layout.chunks():
                file = f"{tree}/{writer.file(name, index)}"
                if file in work.done:
                    continue
                piece = chunk_piece(plan, tree, name, layout.region(index))
                yield piece, _writing(work, writer, file, name, index, progress)


def _writing(
    work: Workplace,
    writer: TreeWriter,
    file: str,
    name: str,
    index: tuple[int, ...],
    progress: Progress,
) -> Callable[[np.ndarray], None]:
    def write(array: np.ndarray) -> None:
        made = writer.write(name, index, array)
        work.record(file, {"size": made.size, "sha256": made.sha256})
        progress(array.nbytes)

    return write


# ---------------------------------------------------------------- threads


class _Threads:
    """A pool whose work in flight stays within a budget; the first error ends all of it."""

    def __init__(self, use: Machine, pool: ThreadPoolExecutor):
        self._budget = Budget(use.budget)
        self._most = _AHEAD * use.workers
        self._pool = pool

    def in_order(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
        """Make pieces ahead; hand each over in its order, valid until the next is asked for."""
        ahead: deque[tuple[Piece, Future[np.ndarray]]] = deque()
        taken = 0
        upcoming = next(pieces, None)
        while upcoming is not None or ahead:
            while upcoming is not None and len(ahead) < self._most:
                if ahead and taken + upcoming.memory > self._budget.size:
                    break
                taken += upcoming.memory
                ahead.append((upcoming, self._pool.submit(upcoming.make)))
                upcoming = next(pieces, None)
            piece, future = ahead.popleft()
            yield piece, future.result()
            del future
            taken -= piece.memory

    def all(self, tasks: Iterator[tuple[Piece, Callable[[np.ndarray], None]]]) -> None:
        """Make every piece and do with it what is to be done, in any order."""
        stop = threading.Event()

        def do(piece: Piece, use: Callable[[np.ndarray], None]) -> None:
            try:
                if not stop.is_set():
                    use(piece.make())
            except BaseException:
                stop.set()
                raise
            finally:
                self._budget.give(piece.memory)

        running: set[Future[None]] = set()
        try:
            for piece, use in tasks:
                self._budget.take(piece.memory)
                running.add(self._pool.submit(do, piece, use))
                if len(running) >= self._most:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in running:
                future.result()
        finally:
            stop.set()


@contextmanager
def _threads(use: Machine) -> Iterator[_Threads]:
    pool = ThreadPoolExecutor(use.workers)
    try:
        yield _Threads(use, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """Threads that are worth having here."""
    return min(4, 2 * len(os.sched_getaffinity(0)))  # half of them wait for the disk
