"""HTTP of strangers: a connection that does not come to the point is closed, in time and in words.

uvicorn waits forever for the rest of a request's head, and for a reader that does not read; it
closes on whoever is still sending, who then may not see why. These are bounded here.
"""

import asyncio
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import h11
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mmx.inference.openai_json import ApiError


@dataclass(frozen=True)
class Limits:
    """What one caller may cost.

    Attributes:
      body: bytes of a request as received.
      bodies: bytes of all requests that are being received or parsed.
      head: bytes of request line and headers.
      head_seconds, body_seconds: from the first byte to the last.
      idle_seconds: between two requests of a connection.
      unread_seconds: for which a reader may take nothing of what is written.
      linger_seconds: for which one who was refused may go on sending, so that it reads why.
      connections: at once; those above are told 503, those above twice as many nothing.
    """

    body: int = 16 << 20
    bodies: int = 128 << 20
    head: int = 16 << 10
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 30.0
    unread_seconds: float = 30.0
    linger_seconds: float = 2.0
    connections: int = 512


def error_response(error: ApiError) -> Response:
    """An error as OpenAI's clients read it."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = json.dumps(error.body)
    return Response(body, error.status, headers, media_type="application/json")


async def unless_gone[Result](receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client goes.

    Raises:
      ClientDisconnect: it has gone.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def protocol(limits: Limits) -> Callable[..., asyncio.Protocol]:
    """What uvicorn makes for each connection."""
    return functools.partial(_Bounded, limits)


class _Connection(h11.Connection):
    """One that bounds a head however it comes: h11 alone bounds what it waits for the rest of."""

    def __init__(self, head: int):
        super().__init__(h11.SERVER, max_incomplete_event_size=head)
        self._head = head

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is not h11.IDLE:
            return super().next_event()
        before = len(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request) and before - len(self.trailing_data[0]) > self._head:
            raise h11.RemoteProtocolError(
                f"its head has more than {self._head:,} bytes", error_status_hint=431
            )
        return event


class _Bounded(H11Protocol):
    """A connection with a clock for what its client owes: a head, the rest, reading."""

    def __init__(self, limits: Limits, **options: Any):
        super().__init__(**options)
        self.conn = _Connection(limits.head)
        self._limits = limits
        self._owes: str | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.connections:
            transport.abort()
            return
        if len(self.connections) > self._limits.connections:
            self.app = _too_many
        self._watch(fresh=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # what comes now is thrown away
        super().data_received(data)
        if (
            self.conn.their_state is h11.DONE
            and len(self.conn.trailing_data[0]) < self._limits.head
        ):
            # The next request came early. uvicorn reads no more then, and would not see that the
            # client has gone.
            self.flow.resume_reading()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_clock = self.loop.call_later(self._limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Called where uvicorn cannot read a request."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        status = status if 400 <= status < 500 else 400  # it is the client's fault
        self._refuse(ApiError(status, f"this is no HTTP request ({error or msg})"))

    def _watch(self, *, fresh: bool = False) -> None:
        """Set the clock anew where the client owes another thing than before."""
        state = self.conn.their_state
        owes = None
        if self._refused:
            owes = "silence"
        elif state is h11.IDLE:
            # uvicorn's clock for idle connections stops at the rest of a body nobody waited for.
            owes = "head" if fresh or self.conn.trailing_data[0] else "request"
        elif state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            owes = "silence"  # it has its answer and is still sending
        if owes == self._owes:
            return
        self._stop_clock()
        self._owes = owes
        if owes == "head":
            self._clock = self.loop.call_later(self._limits.head_seconds, self._head_late)
        elif owes == "request":
            self._clock = self.loop.call_later(self._limits.idle_seconds, self.transport.close)
        elif owes == "silence":
            self._clock = self.loop.call_later(self._limits.linger_seconds, self.transport.abort)

    def _head_late(self) -> None:
        self._refuse(ApiError(408, "the head of the request did not come in time"))

    def _refuse(self, error: ApiError) -> None:
        """Answer what was no request, and close when the client has read that."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()  # nothing can be said in the middle of an answer
            return
        body = json.dumps(error.body).encode()
        head = (
            f"HTTP/1.1 {error.status} {STATUS_PHRASES.get(error.status, b'').decode()}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        with contextlib.suppress(OSError):  # it has gone already
            self.transport.write_eof()
        self._watch()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(ApiError(503, "too many connections; try again later", retry_after=1))
    response.headers["connection"] = "close"  # the next one may find room
    await response(scope, receive, send)
