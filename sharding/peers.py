"""Processes that know of each other: one TCP connection from each to process 0, for a whole run.

jax's runtime answers a process that does not come, or that dies, by aborting the others with a
stack trace, after minutes, or by leaving them in a collective for ever. So before it starts, all
processes meet at process 0 (`meet`), at the coordinator's port, which is free until then: who is
missing, who has another number or configuration is known there, and told to all. The connections
stay: when a process ends, however it does, the kernel closes its connection, and the others hear of
it within moments; where a whole host falls silent, TCP's keep-alive tells within a minute.

A message is one line of JSON. What is no such line, or a longer one, closes its connection.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sharding.processes import Cluster

MAX_MESSAGE = 1 << 20  # bytes

# Seconds for which a process that has heard from process 0 awaits its verdict after the time is
# over: one that left at that moment would be taken for one that never came.
VERDICT = 5.0

Lost = Callable[[int, str | None, int], None]


@dataclass(eq=False)
class _Connection:
    """A socket, the bytes of a message that has not ended, and whose it is."""

    socket: socket.socket
    process: int | None = None
    rest: bytes = b""
    done: bool = False  # it has said that it needs no one any more
    about: dict[str, Any] = field(default_factory=dict)

    def send(self, message: Mapping[str, Any]) -> None:
        """A message; nothing happens where the other end has gone, which is noticed by reading."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None once the connection has ended."""
        try:
            data = self.socket.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        whole = all(isinstance(message, dict) for message in messages)
        return messages if data and whole and len(self.rest) <= MAX_MESSAGE else None


class Peers:
    """The other processes of a run, once all are there; made by `meet`."""

    def __init__(self, cluster: Cluster, connections: list[_Connection]):
        """Of process 0: one connection a peer; of the others: one to process 0."""
        self.cluster = cluster
        self._connections = connections
        self._passed = threading.Event()
        self._closing = False
        self._lost: Lost | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which speaks and writes for all."""
        return self.cluster.process_id == 0

    def watch(self, lost: Lost) -> None:
        """Call `lost(process, its last words or None, exit code)` when another process ends early.

        It is called once, in a thread of its own, and should end this process: a collective that
        lacks a process cannot be left in another way.
        """
        self._lost = lost
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Process 0 runs the block before the others do; once a run."""
        if self.cluster.process_id == 0:
            yield
            self._tell({"passed": True})
        else:
            self._passed.wait()
            yield

    def failed(self, words: str, code: int) -> None:
        """Tell the others why this process ends, and with which exit code they should."""
        self._tell({"failed": words, "code": code})

    def done(self) -> None:
        """Tell the others that this process may end without harm."""
        self._tell({"done": True})

    def close(self) -> None:
        """End the connections."""
        self._closing = True
        for connection in self._connections:
            connection.socket.close()

    def _tell(self, message: Mapping[str, Any], *, but: _Connection | None = None) -> None:
        for connection in self._connections:
            if connection is not but:
                connection.send(message)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            while not self._closing and selector.get_map():
                for key, _ in selector.select(timeout=0.5):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)

    def _hear(self, connection: _Connection) -> bool:
        """Read from a connection; False once nothing more will come from it."""
        messages = connection.receive()
        for message in messages or ():
            if "failed" in message:
                self._report(connection, message)
                return False
            self._passed.set()  # harmless where it is another message: 0 sends it before "done"
            connection.done |= "done" in message
        if messages is None and not connection.done and not self._closing:
            self._report(connection, {"failed": None, "code": 1})
        return messages is not None

    def _report(self, connection: _Connection, message: Mapping[str, Any]) -> None:
        """Pass on that a process has ended, and say so here."""
        process, words, code = connection.process, message["failed"], message["code"]
        if self.cluster.process_id == 0:
            self._tell({"failed": words, "code": code, "process": process}, but=connection)
        assert self._lost is not None
        self._lost(message.get("process", process), words, code)


def meet(cluster: Cluster, about: Mapping[str, str], *, timeout: float) -> Peers:
    """Return when all processes are there and agree.

    Args:
      cluster: as detected.
      about: what must be equal in all of them, by name.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: processes that did not come, or that differ in what they are about, with their
        numbers; process 0 cannot listen. All that came raise it, with the same text but for
        what each knows of who is missing.
    """
    deadline = time.monotonic() + timeout
    if cluster.process_id == 0:
        connections = _gather(cluster, about, timeout, deadline)
    else:
        connections = [_present(cluster, about, timeout, deadline)]
    for connection in connections:
        _keep_alive(connection.socket)
    return Peers(cluster, connections)


def _gather(
    cluster: Cluster, about: Mapping[str, str], timeout: float, deadline: float
) -> list[_Connection]:
    """Process 0: wait for the others, compare, and tell them how it went."""
    with _listener(cluster) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        there: dict[int, _Connection] = {}
        problem = None
        while problem is None and len(there) < cluster.num_processes - 1:
            if time.monotonic() >= deadline:
                problem = _absent(_others(cluster, there), cluster, timeout)
                break
            for key, _ in selector.select(timeout=max(0.0, deadline - time.monotonic())):
                if key.fileobj is listener:
                    accepted = _Connection(listener.accept()[0])
                    accepted.socket.settimeout(10.0)
                    selector.register(accepted.socket, selectors.EVENT_READ, accepted)
                    continue
                came = _introduce(key.data, there, cluster)
                if came is False:
                    selector.unregister(key.fileobj)
                problem = problem or (came if isinstance(came, str) else None)
            for connection in there.values():
                connection.send({"missing": _others(cluster, there)})
    connections = [there[process] for process in sorted(there)]
    for connection in connections:
        problem = problem or _difference(about, connection.about, connection.process)
    for connection in connections:
        connection.send({"problem": problem})
    if problem is not None:
        raise ValueError(problem)
    return connections


def _introduce(
    connection: _Connection, there: dict[int, _Connection], cluster: Cluster
) -> bool | str:
    """Read who has connected; False when no one of ours is there (any more), text for a problem."""
    messages = connection.receive()
    if messages is None:
        connection.socket.close()
        if connection.process is not None:
            there.pop(connection.process, None)  # it has waited long enough, and gone
        return False
    for message in messages:
        process, count, about = (message.get(name) for name in ("process", "of", "about"))
        if isinstance(process, bool) or not isinstance(process, int):
            connection.socket.close()
            return False
        if not isinstance(count, int) or not isinstance(about, dict):
            connection.socket.close()
            return False
        connection.process, connection.about = process, about
        if count != cluster.num_processes:
            there[process] = connection
            return (
                f"process {process} was started as one of {count}, process 0 as one of "
                f"{cluster.num_processes}; give all the same number of processes"
            )
        if process in there or not 0 < process < cluster.num_processes:
            connection.send({"problem": f"there is another process {process}"})
            return f"two processes are number {process}; give each a --process-id of its own"
        there[process] = connection
    return True


def _present(
    cluster: Cluster, about: Mapping[str, str], timeout: float, deadline: float
) -> _Connection:
    """Another process than 0: connect, say who this is, and wait for the verdict."""
    missing, unresolved = [0], None
    hello = {"process": cluster.process_id, "of": cluster.num_processes, "about": dict(about)}
    while (left := deadline - time.monotonic()) > 0:
        try:
            reached = _connect(cluster, left)
        except socket.gaierror as error:
            reached, known = None, unresolved
            unresolved = error.strerror or str(error)
            if known is None:
                warnings.warn(
                    f"{cluster.host} does not resolve ({unresolved}); trying on for {left:.0f} s",
                    stacklevel=2,
                )
        if reached is None:
            time.sleep(min(0.2, left))
            continue
        unresolved = None
        reached.send(hello)
        while (left := deadline + VERDICT * (missing != [0]) - time.monotonic()) > 0:
            reached.socket.settimeout(left)
            messages = reached.receive()
            if messages is None:  # process 0 has gone, or it is no process of ours
                missing = [0]
                break
            for message in messages:
                missing = message.get("missing", missing)
                if message.get("problem"):
                    raise ValueError(str(message["problem"]))
                if "problem" in message:
                    return reached
        reached.socket.close()
    if unresolved is not None:
        raise ValueError(
            f"the coordinator's name {cluster.host!r} did not resolve within {timeout:g} seconds "
            f"({unresolved}); give --coordinator a name or an address that this host knows"
        )
    raise ValueError(_absent(missing, cluster, timeout))


def _connect(cluster: Cluster, timeout: float) -> _Connection | None:
    """A connection to process 0; None when nothing answers there.

    Raises:
      socket.gaierror: its name has no address, which it may still get where hosts start together.
    """
    try:
        reached = socket.create_connection((cluster.host, cluster.port), min(5.0, timeout))
    except socket.gaierror:
        raise
    except OSError:
        return None
    if reached.getsockname() == reached.getpeername():
        reached.close()  # where nobody listens, TCP can connect a port to itself
        return None
    return _Connection(reached, process=0)


def _listener(cluster: Cluster) -> socket.socket:
    """The coordinator's port; jax's service takes it over when all are there."""
    host = cluster.host if cluster.on_loopback else ""
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, cluster.port), family=family, backlog=1024, dualstack_ipv6=dual
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(
            f"process 0 cannot listen at port {cluster.port} ({reason}); give "
            "all processes another port with --coordinator HOST:PORT"
        ) from None


def _keep_alive(connection: socket.socket) -> None:
    """Notice within 40 seconds that a host has fallen silent."""
    connection.settimeout(10.0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # under other names, or not at all, on other systems
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _others(cluster: Cluster, there: Mapping[int, Any]) -> list[int]:
    return [process for process in range(1, cluster.num_processes) if process not in there]


def _absent(missing: list[int], cluster: Cluster, timeout: float) -> str:
    """Who did not come, in one line."""
    several = len(missing) > 1
    shown = ", ".join(map(str, missing[:8])) + (
        f" and {len(missing) - 8} more" if missing[8:] else ""
    )
    where = f" at {cluster.coordinator}" if missing == [0] else ""
    return (
        f"process{'es' if several else ''} {shown} of {cluster.num_processes} did not "
        f"{'answer' if where else 'come'}{where} within {timeout:g} seconds; look at what became "
        f"of {'them' if several else 'it'}, or wait longer with --peer-timeout"
    )


def _difference(ours: Mapping[str, str], theirs: Mapping[str, str], process: Any) -> str | None:
    """The first thing in which a process differs from process 0."""
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            return (
                f"process {process} has {name} = {theirs.get(name)}, process 0 has "
                f"{ours.get(name)}; start all processes with the same command"
            )
    return None
