"""Metrics on disk: `metrics.jsonl` always, TensorBoard and Weights & Biases as mirrors of it.

The file holds one JSON object a line and a step, in order. That survives a kill at any moment: what
a kill can leave is a torn last line and steps that the last checkpoint does not know of, and the
next `Logbook` on the folder drops both before it appends.
"""

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

METRICS = "metrics.jsonl"
_FLUSH_SECONDS = 30.0  # between TensorBoard's forced writes, each of which waits for the disk


class Logbook:
    """The metrics of a run, open for appending; one process a run may hold it.

    Args:
      run_dir: folder of the run; made where it is missing.
      first_step: the first step that will be written. Steps count from 1: a record's step is the
        number of steps done, so a run resumed from the checkpoint of step s begins at s + 1.
        Records from this step on are dropped, and so is a torn last line.
      tensorboard: also write event files under `run_dir`/tensorboard.
      wandb: also log to this Weights & Biases project. A resumed run goes on as the same run there;
        steps that are repeated keep their first values.
      run_config: what the run is, for Weights & Biases; 'source_names' names the sources.

    Raises:
      ValueError: a line before `first_step` that is no record, wandb asked for and not usable.
      OSError: the folder or a file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        tensorboard: bool = True,
        wandb: str | None = None,
        run_config: dict[str, Any] | None = None,
    ):
        self.path = Path(run_dir) / METRICS
        self._source_names = tuple((run_config or {}).get("source_names", ()))
        with ExitStack() as stack:
            # What may be refused comes before the file is touched.
            run = _import_wandb() if wandb is not None else None
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, self._file)
            self._last_step, self._size = _trim(self._file, self.path, first_step)
            self._mirrors: list[_TensorBoard | _WandB] = []
            if tensorboard:
                self._mirrors.append(_TensorBoard(self.path.parent / "tensorboard", first_step))
                stack.callback(self._mirrors[-1].close)
            if wandb is not None:
                self._mirrors.append(_WandB(run, wandb, self.path.parent, run_config or {}))
                stack.callback(self._mirrors[-1].close)
            self._stack = stack.pop_all()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record and hand it to the operating system; a kill does not lose it any more.

        Args:
          record: plain or numpy numbers, lists of them, text; 'step' is its number. What is not
            finite is written as null: JSON has no NaN.

        Raises:
          ValueError: its step is not after the last one, or another process has written the file.
          OSError: no space, say; with the file's name. The lines before it are whole.
        """
        plain = {name: _plain(value) for name, value in record.items()}
        step = plain.get("step")
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(f"{self.path}: a record of step {step!r} after step {self._last_step}")
        self._append(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._last_step = step
        scalars = dict(_scalars(plain, self._source_names))
        for mirror in self._mirrors:
            mirror.write(step, scalars)

    def close(self) -> None:
        """Close the file and finish its mirrors; nothing happens the second time."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        if os.fstat(self._file).st_size != self._size:
            raise ValueError(f"{self.path}: another process writes it too; one process a run")
        written = 0
        with _named(self.path):
            try:
                while written < len(line):
                    written += os.pwrite(self._file, line[written:], self._size + written)
            except OSError:
                # Half a line would make the next one, of a caller that goes on, unreadable.
                with suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
        self._size += len(line)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order of their steps; a torn last line is left out.

    Raises:
      ValueError: no such folder or file; a line that is no record, with its number.
    """
    path = Path(run_dir) / METRICS
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder; give the folder of a run")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a run that has done a step")
    with path.open("rb") as file:
        return [record for _, record in _scan(file, path)]


def _scan(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record and the offset of the byte after its line."""
    end, last_step = 0, -1
    for number, line in enumerate(file, start=1):
        end += len(line)
        try:
            # Text first: given bytes, json guesses encodings.
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        record = record if isinstance(record, dict) else {}
        step = record.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            step = None
        if step is not None and step > last_step:
            yield end, record
            last_step = step
        elif not line.endswith(b"\n"):
            return  # torn: only the last line can lack its end
        elif step is not None:
            raise ValueError(
                f"{path}: line {number} is of step {step} and follows step {last_step}; two "
                "processes wrote it, or it was edited: remove the line"
            )
        else:
            raise ValueError(
                f"{path}: line {number} is not a JSON object with a step; the file is damaged: "
                "remove the line"
            )


def _trim(file: int, path: Path, first_step: int) -> tuple[int, int]:
    """Cut the file before `first_step`; the last step it still has (-1: none), and its bytes."""
    last_step, size = -1, 0
    with open(file, "rb", closefd=False) as reader:
        for end, record in _scan(reader, path):
            if record["step"] >= first_step:
                break
            last_step, size = record["step"], end
    with _named(path):
        # One change of the file's length: a kill leaves it as it was or as it should be.
        os.ftruncate(file, size)
        if size and os.pread(file, 1, size - 1) != b"\n":
            size += os.pwrite(file, b"\n", size)
    return max(last_step, first_step - 1), size


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of calls that know a descriptor alone get the name of the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _plain(value: Any) -> Any:
    """Numbers and nested sequences as `json` writes them; None for what is not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _scalars(record: Mapping[str, Any], source_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Tag and value of each number; of a list, 'name/0', 'name/1', ... or the source's name.

    The sums `loss_by_source` are shown as means over the source's targets.
    """
    for name, value in record.items():
        if isinstance(value, list):
            tokens = record.get("tokens_by_source") if name == "loss_by_source" else None
            for index, part in enumerate(value):
                named = name.endswith("_by_source") and index < len(source_names)
                if tokens is not None and part is not None:
                    part = part / tokens[index] if tokens[index] else None
                if isinstance(part, int | float):
                    yield f"{name}/{source_names[index] if named else index}", float(part)
        elif isinstance(value, int | float) and name != "step":
            yield name, float(value)


class _TensorBoard:
    """Event files, written by the caller's thread.

    tensorboardX's SummaryWriter has a thread and a queue of ten; where a full disk ends the thread,
    the queue fills and the training would wait for it for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        # Protobuf makes these classes at run time; no type checker sees them.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._folder = folder
        folder.mkdir(exist_ok=True)
        # A name has a time in whole seconds; the suffix keeps runs of the same second apart.
        self._writer = EventsWriter(str(folder / "events"), f".{first_step}.{os.getpid()}")
        # TensorBoard hides what earlier files say about this step and later ones.
        start = events.SessionLog(status=events.SessionLog.START)
        self._put(self._event(wall_time=time.time(), step=first_step, session_log=start))
        self._flush_at = 0.0  # what there is after the first step shows at once

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=t, simple_value=x) for t, x in scalars.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._put(event)
        if time.monotonic() >= self._flush_at:
            with _named(self._folder):
                self._writer.flush()
            self._flush_at = time.monotonic() + _FLUSH_SECONDS

    def close(self) -> None:
        with _named(self._folder):
            self._writer.close()

    def _put(self, event: Any) -> None:
        with _named(self._folder):
            self._writer.write_event(event)


def _import_wandb() -> Any:
    # By name: it is no dependency, and where it is missing that is no error of this package.
    try:
        module = importlib.import_module("wandb")
    except ImportError:
        module = None
    # A folder of runs called wandb beside the script imports as an empty package.
    if not hasattr(module, "init"):
        raise ValueError("wandb is not installed; install wandb or leave --wandb out")
    return module


class _WandB:
    """A run at Weights & Biases, the same one after every resume."""

    def __init__(self, module: Any, project: str, run_dir: Path, config: Mapping[str, Any]):
        file = run_dir / "wandb_id.txt"
        name = file.read_text().strip() if file.is_file() else ""
        if not name:
            name = uuid.uuid4().hex
            file.write_text(name + "\n")
        try:
            self._run = module.init(
                project=project,
                id=name,
                name=run_dir.resolve().name,
                dir=str(run_dir),
                config=dict(config),
                resume="allow",
            )
        except module.errors.Error as error:
            raise ValueError(
                f"wandb: {error}; run `wandb login` first or leave --wandb out"
            ) from None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
