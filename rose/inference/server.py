"""An engine over HTTP in OpenAI's protocol: the ASGI application of the inference process. Never imports torch.

For the API only, not for people: it listens on loopback, or elsewhere with a token that both know.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import anyio
import msgspec
from anyio.abc import ObjectReceiveStream

from rose.errors import InvalidRequest, MethodNotSupported, NotAuthorised, NotFound, RoseError, TooLarge, Unavailable
from rose.ids import new_id
from rose.inference.generation import (
    Accepted,
    Done,
    Engine,
    Failed,
    Finished,
    Piece,
    Scored,
    ScoringAnswer,
    ScoringRequest,
    Text,
)
from rose.inference.request import GenerationRequest, parse_request
from rose.inference.wire import ADAPTER_HEADER, NO_ADAPTER, Answer, Chunks, Header, error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 32 << 20
"""Far above any context; a limit only against mistakes."""
MAX_BEHIND = 16_384
"""Entries (tokens, and with log-probabilities their likeliest alternatives) that an answer may have ready that its
reader has not taken; then it is given up. Its row is free as soon as it is made, however slowly it is read."""
SILENCE_SECONDS = 600.0
"""Longest wait for the engine's next piece; a device that hangs must not hold a connection for ever."""


class EngineApp:
    """The ASGI application: POST /v1/chat/completions, POST /score, POST /preview and GET /health."""

    def __init__(
        self,
        engine: Engine,
        token: str | None = None,
        previews: Callable[[bytes], Any] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`previews` answers the body of POST /preview and may block; `facts` about the process go into /health."""
        self._facts = facts or {}
        self._engine = engine
        self._token = token
        self._previews = previews

    def status(self) -> dict[str, Any]:
        """Return what is loaded and done: what /health says and the process announces."""
        return {**msgspec.to_builtins(self._engine.status()), **self._facts}

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
            await _send_json(send, 200, {"status": "ok", **self.status()})
            return
        body = await _read_body(receive)
        if body is None:
            return
        if scope["path"] == "/preview" and self._previews is not None:
            await _send_json(send, 200, await anyio.to_thread.run_sync(self._previews, body))
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
        deliver, pieces = anyio.create_memory_object_stream[Piece](math.inf)  # see MAX_BEHIND
        loop = asyncio.get_running_loop()
        most_behind = MAX_BEHIND // (1 + (request.top_logprobs or 0))

        def put(piece: Piece) -> None:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # nobody listens
                if request.stream and deliver.statistics().current_buffer_used >= most_behind:
                    cancel()
                    deliver.send_nowait(Failed(error=_too_slow()))
                    deliver.close()
                    return
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
                    await _send_json(send, 200, _scoring_answer(found), _adapter_header(found.adapter))
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
    adapter: str | None = None
    while True:
        match await _next(pieces):
            case Accepted() as accepted:
                adapter = accepted.adapter
            case Text() | Finished() as piece:
                answer.add(piece)
            case Failed(error=error):
                await _send_error(send, error)
                return
            case Done() as done:
                await _send_json(send, 200, answer.body(done), _adapter_header(adapter))
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
        *_adapter_header(piece.adapter if isinstance(piece, Accepted) else None),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while True:
        frames = chunks.frames(piece)
        ends = isinstance(piece, (Done, Failed))
        await send({"type": "http.response.body", "body": frames, "more_body": not ends})
        if ends:
            return
        piece = await _next(pieces)


def _too_slow() -> RoseError:
    return RoseError(
        "The answer was given up: it was read so slowly that too much of it was waiting.", code="reader_too_slow"
    )


def _header(request: GenerationRequest) -> Header:
    target = request.target
    weights = target.adapter.sha256 if target.adapter else target.base.fingerprint
    return Header(
        id=new_id("chatcmpl-"),
        created=int(time.time()),
        model=target.model,
        fingerprint=f"fp_{weights[:10]}" if weights else None,
    )


def _adapter_header(adapter: str | None) -> list[tuple[bytes, bytes]]:
    """Return the header that names the weights which the engine computed with."""
    return [(ADAPTER_HEADER.encode(), (adapter or NO_ADAPTER).encode())]


def _scoring_request(body: bytes) -> ScoringRequest:
    """Raises: InvalidRequest."""
    try:
        return msgspec.json.decode(body, type=ScoringRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The scoring request is not valid: {error}.", code="invalid_json") from None


def _scoring_answer(found: Scored) -> ScoringAnswer:
    return ScoringAnswer(
        logprobs=[[number if math.isfinite(number) else None for number in row] for row in found.logprobs],
        adapter=found.adapter,
        weights=found.weights,
        dtype=found.dtype,
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
