"""The inference process: HTTP in OpenAI's protocol around an engine, and its entry in the table `workers`.

For the API only, not for people: it listens on loopback, or elsewhere with a token that both know.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import os
import platform
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import msgspec
import torch
import uvicorn
from anyio.abc import ObjectReceiveStream

from rose import leases
from rose.blobs import Blobs
from rose.errors import InvalidRequest, MethodNotSupported, NotAuthorised, NotFound, RoseError, TooLarge, Unavailable
from rose.http_server import KEEP_ALIVE_SECONDS, Server
from rose.ids import new_id
from rose.inference.engine import TorchEngine
from rose.inference.generation import (
    Done,
    Engine,
    EngineStatus,
    Failed,
    Finished,
    Piece,
    Scored,
    ScoringAnswer,
    ScoringRequest,
    Text,
)
from rose.inference.loading import Loader
from rose.inference.preview import Previews
from rose.inference.request import GenerationRequest, Target, parse_request
from rose.inference.wire import ADAPTER_HEADER, NO_ADAPTER, Answer, Chunks, Header, error_body
from rose.log.pool import Pool, open_pool
from rose.settings import Settings, is_inside

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 32 << 20
"""Far above any context; a limit only against mistakes."""
SILENCE_SECONDS = 600.0
"""Longest wait for the engine's next piece; a device that hangs must not hold a connection for ever."""
THREAD_CHECK_SECONDS = 1.0
"""How soon a process whose engine has died ends too, so that its supervisor starts another."""
STOP_SECONDS = 10.0
"""How long the engine's thread may take for its last step."""


async def serve(settings: Settings, stop: anyio.Event) -> None:
    """Run an inference engine until `stop` is set; then every stream ends at once.

    Raises: InvalidRequest when a setting is wrong; Unavailable when the database or the port cannot be had.
    """
    _refuse_open_door(settings)
    torch.set_num_threads(settings.inference_threads or max(1, (os.cpu_count() or 2) - 1))
    loader = Loader(
        Blobs(settings.blobs),
        models_dir=settings.models,
        offline=settings.hub_offline,
        device=settings.device,
        weights=settings.inference_weights,
        cache_bytes=settings.inference_cache_bytes,
    )
    listener = _listen(settings.inference_host, settings.inference_port)
    try:
        pool = await open_pool(settings, min_size=1, max_size=2)
        try:
            await _run(settings, loader, listener, pool, stop)
        finally:
            with anyio.move_on_after(5, shield=True):
                await pool.close()
    finally:
        listener.close()


async def _run(settings: Settings, loader: Loader, listener: socket.socket, pool: Pool, stop: anyio.Event) -> None:
    engine = TorchEngine(loader, idle_seconds=settings.inference_idle_seconds)
    try:
        url = _public_url(settings.inference_host, listener.getsockname()[1])
        logger.info("the inference engine answers at %s on %s", url, loader.device)
        app = EngineApp(engine, settings.inference_token, Previews(loader))
        async with _announced(pool, engine, url), http_server(app, listener):
            while not stop.is_set() and not engine.join(0):
                with anyio.move_on_after(THREAD_CHECK_SECONDS):
                    await stop.wait()
            engine.stop()
        if not stop.is_set():
            raise RoseError("The engine's thread has ended by itself; its log says why.", code="engine_error")
    finally:
        engine.stop()
        with anyio.CancelScope(shield=True):
            if not await anyio.to_thread.run_sync(engine.join, STOP_SECONDS):
                logger.warning("the engine's thread is still in a step; the process ends without it")


def _refuse_open_door(settings: Settings) -> None:
    """Refuse to listen to other machines without a token. Raises: InvalidRequest."""
    if not is_inside(settings.inference_host) and not settings.inference_token:
        raise InvalidRequest(
            f"The inference engine would listen on {settings.inference_host}, open to other machines, without a token.",
            code="no_inference_token",
            param="inference_token",
            hint="Set ROSE_INFERENCE_TOKEN, the same for the API and the engines, or listen on 127.0.0.1.",
        )


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises: Unavailable when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise Unavailable(
            f"The inference engine cannot listen on {host}:{port}: {error.strerror or error}.",
            code="port_taken",
            hint="Change ROSE_INFERENCE_HOST or ROSE_INFERENCE_PORT; port 0 takes a free one.",
        ) from None


def _public_url(host: str, port: int) -> str:
    """Return the address under which the API reaches this process."""
    name = platform.node() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def _announced(pool: Pool, engine: Engine, url: str) -> AbstractAsyncContextManager[None]:
    """Keep the engine in the table `workers`, with what it has loaded, as long as the context lasts."""
    worker_id = new_id("inference_")
    return leases.announced(
        pool,
        lambda: leases.Worker(
            id=worker_id,
            kind="inference",
            host=platform.node(),
            url=url,
            capabilities=msgspec.to_builtins(engine.status()),
            pid=os.getpid(),
        ),
    )


@asynccontextmanager
async def http_server(
    app: Callable[[Scope, Receive, Send], Awaitable[None]], listener: socket.socket
) -> AsyncGenerator[None]:
    """Serve `app` on `listener` as long as the context lasts; leaving it ends open connections within seconds."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=3,
    )
    server = Server(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, [listener])
        try:
            yield
        finally:
            server.should_exit = True


class EngineApp:
    """The ASGI application: POST /v1/chat/completions, POST /score, POST /preview and GET /health."""

    def __init__(self, engine: Engine, token: str | None = None, previews: Previews | None = None) -> None:
        self._engine = engine
        self._token = token
        self._previews = previews

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        try:
            await self._route(scope, receive, send)
        except RoseError as error:
            await _send_error(send, error)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_token(scope)
        allowed = {"/v1/chat/completions": "POST", "/score": "POST", "/preview": "POST", "/health": "GET"}.get(
            scope["path"]
        )
        if allowed is None:
            raise NotFound(f"The inference engine has no address {scope['path']}.", code="unknown_url")
        if scope["method"] != allowed:
            raise MethodNotSupported(f"{scope['path']} takes {allowed}, not {scope['method']}.")
        if allowed == "GET":
            await _send_json(send, 200, {"status": "ok", **msgspec.to_builtins(self._engine.status())})
            return
        body = await _read_body(receive)
        if body is None:
            return
        if scope["path"] == "/preview" and self._previews is not None:
            await _send_json(send, 200, await anyio.to_thread.run_sync(self._previews.preview, body))
            return
        if scope["path"] == "/score":
            await self._score(_scoring_request(body), receive, send)
            return
        await self._answer(parse_request(body), receive, send)

    def _check_token(self, scope: Scope) -> None:
        if self._token is None:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise NotAuthorised("The inference engine needs its token.")

    async def _answer(self, request: GenerationRequest, receive: Receive, send: Send) -> None:
        """Answer as the engine makes the pieces; a closed connection cancels the request."""
        deliver, pieces = anyio.create_memory_object_stream[Piece](math.inf)  # bounded by max_tokens
        loop = asyncio.get_running_loop()

        def put(piece: Piece) -> None:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # nobody listens
                deliver.send_nowait(piece)

        def sink(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(put, piece)

        with deliver, pieces:
            cancel = self._engine.submit(request, sink)
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_watch_disconnect, receive, tasks.cancel_scope)
                    await (_stream if request.stream else _complete)(request, pieces, send)
                    tasks.cancel_scope.cancel()
            finally:
                cancel()

    async def _score(self, request: ScoringRequest, receive: Receive, send: Send) -> None:
        """Answer how likely given tokens are; a closed connection cancels the request."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Scored | Failed] = loop.create_future()

        def put(found: Scored | Failed) -> None:
            if not answered.done():  # nobody waits any more
                answered.set_result(found)

        def sink(found: Scored | Failed) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(put, found)

        cancel = self._engine.score(request, sink)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_watch_disconnect, receive, tasks.cancel_scope)
                found = await answered
                if isinstance(found, Failed):
                    await _send_error(send, found.error)
                else:
                    answer = _scoring_answer(request.target, found, self._engine.status())
                    await _send_json(send, 200, answer, _adapter_header(request.target))
                tasks.cancel_scope.cancel()
        finally:
            cancel()


async def _read_body(receive: Receive) -> bytes | None:
    """Return the body, or None when the client left. Raises: TooLarge."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"A chat request may have {MAX_BODY_BYTES >> 20} MiB.")
        if not message.get("more_body"):
            return bytes(body)


async def _watch_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _next(pieces: ObjectReceiveStream[Piece]) -> Piece:
    """Return the engine's next piece; a failure when it is silent for too long."""
    with anyio.move_on_after(SILENCE_SECONDS):
        return await pieces.receive()
    return Failed(error=Unavailable("The inference engine is stuck in a step.", code="engine_stuck"))


async def _complete(request: GenerationRequest, pieces: ObjectReceiveStream[Piece], send: Send) -> None:
    answer = Answer(
        _header(request),
        choices=request.choices,
        logprobs=request.top_logprobs is not None,
        functions=request.functions,
    )
    while True:
        match await _next(pieces):
            case Text() | Finished() as piece:
                answer.add(piece)
            case Failed(error=error):
                await _send_error(send, error)
                return
            case Done() as done:
                await _send_json(send, 200, answer.body(done), _adapter_header(request.target))
                return
            case _:
                pass


async def _stream(request: GenerationRequest, pieces: ObjectReceiveStream[Piece], send: Send) -> None:
    piece = await _next(pieces)
    if isinstance(piece, Failed):  # nothing is sent yet: a status says it better
        await _send_error(send, piece.error)
        return
    chunks = Chunks(
        _header(request),
        choices=request.choices,
        include_usage=request.include_usage,
        logprobs=request.top_logprobs is not None,
        functions=request.functions,
    )
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        *_adapter_header(request.target),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while True:
        frames = chunks.frames(piece)
        ends = isinstance(piece, (Done, Failed))
        await send({"type": "http.response.body", "body": frames, "more_body": not ends})
        if ends:
            return
        piece = await _next(pieces)


def _header(request: GenerationRequest) -> Header:
    target = request.target
    weights = target.adapter.sha256 if target.adapter else target.base.fingerprint
    return Header(
        id=new_id("chatcmpl-"),
        created=int(time.time()),
        model=target.model,
        fingerprint=f"fp_{weights[:10]}" if weights else None,
    )


def _adapter_header(target: Target) -> list[tuple[bytes, bytes]]:
    """Return the header that names the weights: those by whose hash the engine chose what it computed with."""
    name = target.adapter.sha256 if target.adapter is not None else NO_ADAPTER
    return [(ADAPTER_HEADER.encode(), name.encode())]


def _scoring_request(body: bytes) -> ScoringRequest:
    """Raises: InvalidRequest."""
    try:
        return msgspec.json.decode(body, type=ScoringRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The scoring request is not valid: {error}.", code="invalid_json") from None


def _scoring_answer(target: Target, found: Scored, status: EngineStatus) -> ScoringAnswer:
    """Return the answer, with the form of the weights that gave it; empty if they have left memory since."""
    weights = target.adapter.sha256 if target.adapter is not None else None
    full = target.kind == "full" and weights is not None
    used = next(
        (
            base
            for base in status.bases
            if (base.source == target.model if full else weights is None or weights in base.adapters)
            and (full or base.fingerprint == target.base.fingerprint)
        ),
        None,
    )
    return ScoringAnswer(
        logprobs=[[number if math.isfinite(number) else None for number in row] for row in found.logprobs],
        adapter=weights,
        weights=used.weights if used else "",
        dtype=used.dtype if used else "",
    )


async def _send_error(send: Send, error: RoseError) -> None:
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", str(math.ceil(error.retry_after_seconds)).encode()))
    await _send_json(send, error.status, error_body(error), headers)


async def _send_json(send: Send, status: int, body: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    content = msgspec.json.encode(body)
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": content})
