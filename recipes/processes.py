"""A recipe run by several processes: they start together, end together, and one of them speaks."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from mmx.cli import report_error
from sharding.peers import Peers, meet
from sharding.processes import Processes, detect, start

INTERRUPTED = 130  # the exit code that shells give for Ctrl-C
PATIENCE = 10.0  # seconds in which the cause of a broken collective becomes known


@contextlib.contextmanager
def together(asked: Processes, recipe: Any) -> Iterator[Peers | None]:
    """Train with the processes that the flags or the environment name; None when alone.

    Whatever ends one process ends all of them, each with one line: they are not unwound, since
    what they would wait for does not come.

    Args:
      asked: the flags.
      recipe: the dataclass of the run; all processes must have an equal one.

    Raises:
      ValueError: as `detect` and `meet`.
    """
    cluster = detect(asked)
    if cluster is None:
        yield None
        return
    print(f"mmx: {cluster.describe()}", file=sys.stderr, flush=True)
    peers = meet(cluster, describe(recipe), timeout=asked.peer_timeout)
    ending = threading.Lock()

    def lost(process: int, words: str | None, code: int) -> None:
        told = f"ended: {words}" if words else "is gone (its connection broke)"
        again = "" if words else "; start all again to go on from the last checkpoint"
        _end(ending, f"process {process} {told}{again}", code)

    peers.watch(lost)
    try:
        start(cluster, timeout=asked.peer_timeout)
        yield peers
    except KeyboardInterrupt:
        words = "interrupted"
        peers.failed(words, INTERRUPTED)
        _end(ending, words, INTERRUPTED)
    except BaseException as error:
        code = 2 if isinstance(error, ValueError | NotImplementedError | OSError) else 1
        # A broken collective is the effect of what the watch is about to report.
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait(1.0 if code == 2 else PATIENCE)
        words = " ".join(str(error).split())[:500] or type(error).__name__
        peers.failed(words, code)
        if code == 1:
            traceback.print_exception(error)
        _end(ending, words, code)
    _finish(peers)


def describe(recipe: Any) -> dict[str, str]:
    """What must be the same in all processes: versions, every field, and the corpus if named."""
    about = {name: version(name) for name in ("jax", "mmx")}
    about |= {name: json.dumps(value, default=str) for name, value in
              dataclasses.asdict(recipe).items()}  # fmt: skip
    corpus: Path | None = getattr(recipe, "corpus", None)
    if corpus is not None:
        manifest = corpus / "manifest.json"
        found = manifest.read_bytes() if manifest.is_file() else None
        about["corpus_sha256"] = "none" if found is None else hashlib.sha256(found).hexdigest()
    return about


def _finish(peers: Peers) -> None:
    """Leave jax's runtime once all are ready to."""
    import jax

    peers.done()
    jax.distributed.shutdown()
    peers.close()


def _end(ending: threading.Lock, words: str, code: int) -> NoReturn:
    """Say why, once, and end this process without waiting for anyone."""
    ending.acquire()  # for ever: who comes second waits for the end
    report_error(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
