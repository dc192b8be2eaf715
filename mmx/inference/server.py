"""The service over HTTP, as OpenAI's clients speak it: routes, keys, streams, an orderly end."""

import asyncio
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any, Literal

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mmx.convert.bounded import printable
from mmx.inference.engine import Engine
from mmx.inference.http_limits import Limits, error_response, protocol, unless_gone
from mmx.inference.openai_answers import Answer, sse
from mmx.inference.openai_json import ApiError
from mmx.inference.openai_prompts import Served
from mmx.inference.openai_requests import Asked, parse_request
from mmx.inference.service import Answers, Busy, EngineError, Service, Stopping
from mmx.inference.service_metrics import metrics_page
from mmx.inference.text import Spelling

_RETRY = 1  # seconds: a row is free again soon, or the queue is
_PARSERS = 2  # requests that are parsed and encoded at once, of each kind


class Api:
    """The routes over one service.

    Args:
      service, served: what answers, and what it is.
      key: that every route but /health asks for; None asks for none.
      log: called with one line where something fails that should not.
    """

    def __init__(
        self,
        service: Service,
        served: Served,
        *,
        key: str | None = None,
        limits: Limits,
        log: Callable[[str], None] = print,
    ):
        self.service, self.served, self.limits = service, served, limits
        self._key = None if key is None else key.encode()
        self._log = log
        self._spelling = Spelling(served.tokenizer)
        self._held = 0  # bytes of bodies
        self._entering = 0  # requests that are parsed or wait for that
        self._work: set[Future[Asked]] = set()  # what the threads have begun or will
        # A template takes its time: conversations do not stand before what needs none.
        self._threads = {
            kind: ThreadPoolExecutor(_PARSERS, thread_name_prefix=f"mmx {kind}")
            for kind in ("completion", "chat")
        }
        self._routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/v1/models": ("GET", self._models),
            f"/v1/models/{served.name}": ("GET", self._model),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Whatever goes wrong is told in OpenAI's form, and nothing of the inside."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except ClientDisconnect:
            return
        except ApiError as error:
            response = error_response(error)
        except Exception as error:
            self._log_failure(scope, error)
            response = error_response(ApiError(500, "the server failed"))
        try:
            await response(scope, receive, watched)
        except ClientDisconnect:
            return
        except Exception as error:
            self._log_failure(scope, error)
            if not started:
                await error_response(ApiError(500, "the server failed"))(scope, receive, send)
            # Else uvicorn closes the connection: half an answer does not look like a whole one.

    async def _respond(self, request: Request) -> Response:
        """The key first, whether or not there is such a route."""
        path = request.scope["path"]
        if path != "/health" and not self._may_pass(request.scope):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        if path not in self._routes:
            status = "model_not_found" if path.startswith("/v1/models/") else None
            raise ApiError(404, f"there is no {printable(path)}", code=status)
        method, handler = self._routes[path]
        if request.method != method:
            raise ApiError(405, f"{path} takes {method}")
        return await handler(request)

    def _log_failure(self, scope: Scope, error: Exception) -> None:
        self._log(
            f"{printable(scope['path'])}: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        )

    def _may_pass(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer"

    # ------------------------------------------------------------ plain pages

    async def _health(self, request: Request) -> Response:
        broken, stopping = self.service.broken, self.service.stopping
        state = "failed" if broken else "stopping" if stopping else "ok"
        return _json({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        page = metrics_page(self.service.counters, self.service.gauges)
        return Response(page, media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        return _json(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.served.created,
            "owned_by": "mmx",
            "max_model_len": self.served.max_seq_len,
        }

    # ------------------------------------------------------------ answers

    async def _completions(self, request: Request) -> Response:
        return await self._answer("completion", request)

    async def _chat(self, request: Request) -> Response:
        return await self._answer("chat", request)

    async def _answer(self, kind: Literal["completion", "chat"], request: Request) -> Response:
        """Read, parse, let in, and answer in one piece or as a stream."""
        outcomes = self.service.counters.outcomes
        try:
            body = await self._read(request)
            try:
                asked = await self._parse(kind, body, request)
            finally:
                self._held -= len(body)
            answers = self.service.submit(*asked.each())
        except (Busy, Stopping, EngineError) as error:
            outcomes["busy" if isinstance(error, Busy) else "refused"] += 1
            raise _api_error(error) from None
        except ApiError as error:
            outcomes["busy" if error.status in (429, 503) else "refused"] += 1
            raise
        answer = Answer(asked, self.served.name, self._spelling)
        if asked.stream:
            return _Stream(_stream(answer, answers), answers)
        with answers:
            whole = await unless_gone(request.receive, _whole(answer, answers))
        return _json(whole)

    async def _read(self, request: Request) -> bytearray:
        """The body of a request, whose bytes are held from now on."""
        self.service.check(self._entering)
        given = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if given != "application/json":
            # Also what keeps pages of other sites from asking: they may not send this unasked.
            raise ApiError(415, "content-type must be application/json")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.limits.body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for piece in request.stream():
                    self._hold(body, piece)
        except BaseException as error:
            self._held -= len(body)
            if isinstance(error, TimeoutError):
                late = "the body of the request did not come in time"
                raise ApiError(408, late) from None
            raise
        return body

    async def _parse(
        self, kind: Literal["completion", "chat"], body: bytearray, request: Request
    ) -> Asked:
        """The request, parsed in a thread: a long prompt takes seconds to encode.

        It has a place in the queue meanwhile, and loses it when its client goes.
        """
        self.service.check(self._entering)
        self._entering += 1
        try:
            work = self._threads[kind].submit(parse_request, kind, bytes(body), self.served)
            self._work.add(work)
            work.add_done_callback(self._work.discard)
            return await unless_gone(request.receive, _result(work))
        finally:
            self._entering -= 1

    @property
    def parsing(self) -> bool:
        """Whether the threads still work."""
        return bool(self._work)

    def _hold(self, body: bytearray, piece: bytes) -> None:
        """What has come is counted: a length that was announced may be a lie."""
        if len(body) + len(piece) > self.limits.body:
            raise self._too_large()
        if self._held + len(piece) > self.limits.bodies:
            raise ApiError(503, "too many large requests; try again later", retry_after=_RETRY)
        body += piece
        self._held += len(piece)

    def _too_large(self) -> ApiError:
        most = f"{self.limits.body:,}"
        return ApiError(413, f"the body must have at most {most} bytes", code="body_too_large")

    def close(self) -> None:
        """Give up the threads."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)


async def _result[Result](work: Future[Result]) -> Result:
    """Of work in a thread, which is not begun any more once nobody waits for it."""
    return await asyncio.wrap_future(work)


async def _whole(answer: Answer, answers: Answers) -> dict[str, Any]:
    got: dict[int, list[Any]] = {}
    try:
        async for events in answers:
            for index, event in events:
                got.setdefault(index, []).append(event)
    except (EngineError, Stopping, ValueError) as error:
        raise _api_error(error) from None
    return answer.whole(got)


async def _stream(answer: Answer, answers: Answers) -> AsyncIterator[bytes]:
    """Pieces of a stream, each of what one step of the engine gave."""
    yield answer.opening()
    try:
        async for events in answers:
            yield b"".join(answer.chunk(index, event) for index, event in events)
    except (EngineError, Stopping, ValueError) as error:
        yield sse(_api_error(error).body)
        return
    except ApiError as error:
        yield sse(error.body)
        return
    yield answer.closing()


class _Stream(Response):
    """Server-sent events until all has been said or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], answers: Answers):
        super().__init__(None, 200, {"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._pieces, self._answers = pieces, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for piece in self._pieces:
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with self._answers:
            await unless_gone(receive, write())


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", retry_after=_RETRY)
    if isinstance(error, Stopping):
        return ApiError(503, str(error), code="stopping", retry_after=_RETRY)
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(400, str(error))


# ---------------------------------------------------------------- running


class _Uvicorn(uvicorn.Server):
    """Told to stop by a signal it first lets the service drain, then ends as if nothing were."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]):
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop()


async def serve(
    engine: Engine,
    served: Served,
    listener: socket.socket,
    *,
    queue: int,
    key: str | None,
    limits: Limits,
    grace: float,
    ready: Callable[[Service], None],
    log: Callable[[str], None],
    stop: asyncio.Event | None = None,
) -> bool:
    """Answer requests until SIGINT, SIGTERM or `stop`, then drain for `grace` seconds.

    A second signal ends the grace.

    Args:
      engine, served: see `Service` and `Api`.
      listener: bound; closed at the end.
      ready: called with the service once requests are taken.

    Returns:
      Whether all threads have ended; else a step of the engine or of a tokenizer still runs.
    """
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        loop.call_soon_threadsafe(stop.set if signals == 1 else hurry.set)

    hurry = asyncio.Event()
    service = Service(engine, queue=queue, log=log)
    api = Api(service, served, key=key, limits=limits, log=log)
    config = uvicorn.Config(
        api, http=protocol(limits), ws="none", lifespan="off", loop="asyncio",  # pyright: ignore[reportArgumentType]
        h11_max_incomplete_event_size=limits.head, proxy_headers=False, server_header=False,
        log_config=None, log_level="critical", access_log=False, timeout_graceful_shutdown=5,
        timeout_keep_alive=max(1, int(limits.idle_seconds)),
    )  # fmt: skip
    server = _Uvicorn(config, on_signal)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or running.done()):
        await asyncio.sleep(0.005)
    if not running.done():
        ready(service)
        await stop.wait()
        closing = asyncio.create_task(service.close(grace=grace))
        await asyncio.wait(
            [closing, asyncio.create_task(hurry.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        if not closing.done():
            closing.cancel()
            await service.close(grace=0)
        server.should_exit = True
    await running
    api.close()
    return not (service.running or api.parsing)
