"""Clients that read slowly or not at all: they hold up nobody, and what waits for them has a bound."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import msgspec
import pytest

from rose import http_server
from rose.inference import server
from rose.inference.client import EngineClient
from rose.inference.engine import TorchEngine
from rose.inference.generation import Accepted, Done, Finished, Piece, Text
from rose.inference.request import GenerationRequest
from rose.inference.server import EngineApp
from tests.eventually import eventually
from tests.inference.asking import QUESTION, World

pytestmark = pytest.mark.anyio

SMALL_BUFFER = 4096


class Fast:
    """Makes all pieces of an answer at once, `tokens` of them."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.cancelled = 0

    def submit(self, request: GenerationRequest, sink: Callable[[Piece], None]) -> Callable[[], None]:
        sink(Accepted(prompt_tokens=1))
        for number in range(self.tokens):
            sink(Text(index=0, text=f"{number} "))
        sink(Finished(index=0, reason="stop"))
        sink(Done(prompt_tokens=1, completion_tokens=self.tokens))

        def cancel() -> None:
            self.cancelled += 1

        return cancel


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Any], Any]]:
    """Factory: serve an engine with small buffers, and return the port."""
    async with AsyncExitStack() as stack:

        async def start(engine: Any) -> int:
            listener = socket.create_server(("127.0.0.1", 0))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)  # connections inherit it
            stack.callback(listener.close)
            await stack.enter_async_context(http_server.http_server(EngineApp(engine), listener))
            return listener.getsockname()[1]

        yield start


@pytest.fixture
def ask(world: World) -> Iterator[Callable[..., socket.socket]]:
    """Factory: ask for a stream, and return the connection without reading anything."""
    opened: list[socket.socket] = []

    def connect(port: int, **more: Any) -> socket.socket:
        asked = {"messages": QUESTION, "stream": True, "temperature": 0, "rose": msgspec.to_builtins(world.target())}
        body = json.dumps({**asked, **more}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.close()


def read_all(connection: socket.socket) -> bytes:
    """Read to the end of the answer, or of the connection."""
    told = bytearray()
    while not told.endswith(b"0\r\n\r\n"):
        piece = connection.recv(1 << 16)
        if not piece:
            break
        told += piece
    return bytes(told)


async def test_who_does_not_read_holds_up_nobody_and_its_row_is_freed(
    serve: Callable[..., Any], ask: Callable[..., socket.socket], start_engine: Callable[..., TorchEngine], world: World
) -> None:
    engine = start_engine()
    port = await serve(engine)
    silent = [ask(port, max_tokens=150, n=4, logprobs=True, top_logprobs=5) for _ in range(3)]
    await eventually(lambda: engine.status().active_requests == 3)
    asked = {"messages": QUESTION, "max_tokens": 5, "rose": msgspec.to_builtins(world.target())}
    async with EngineClient() as client:
        async with client.stream(f"http://127.0.0.1:{port}", {**asked, "stream": True}) as lines:
            heard = [line async for line in lines]
        assert heard[-1] == "[DONE]"
        await eventually(lambda: engine.status().active_requests == 0)
        assert (await client.complete(f"http://127.0.0.1:{port}", asked))["usage"]["completion_tokens"] <= 5
    for connection in silent:  # late, and still whole
        told = await anyio.to_thread.run_sync(read_all, connection)
        assert told.count(b'"finish_reason":"length"') == 4
        assert b"data: [DONE]" in told


async def test_what_waits_for_a_reader_has_a_bound(
    serve: Callable[..., Any], ask: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_BEHIND", 2000)
    engine = Fast(tokens=50_000)
    connection = ask(await serve(engine))
    await eventually(lambda: engine.cancelled > 0)
    told = await anyio.to_thread.run_sync(read_all, connection)
    assert b'"code":"reader_too_slow"' in told
    assert b"[DONE]" not in told
    assert told.count(b'"content":"') <= 2001 + SMALL_BUFFER


async def test_a_connection_on_which_nothing_is_read_is_cut(
    serve: Callable[..., Any], ask: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "STUCK_SECONDS", 1.0)
    monkeypatch.setattr(http_server, "LOOK_TICKS", 1)
    engine = Fast(tokens=10_000)
    connection = ask(await serve(engine))
    await eventually(lambda: engine.cancelled > 0)

    def read_to_the_end() -> bytes:
        try:
            return read_all(connection)
        except ConnectionResetError:
            return b""

    assert b"[DONE]" not in await anyio.to_thread.run_sync(read_to_the_end)


async def test_a_slow_reader_is_not_cut(
    serve: Callable[..., Any], ask: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "STUCK_SECONDS", 5.0)
    monkeypatch.setattr(http_server, "LOOK_TICKS", 1)
    connection = ask(await serve(Fast(tokens=10_000)))
    for _ in range(12):
        await anyio.sleep(0.5)
        assert await anyio.to_thread.run_sync(connection.recv, 1 << 16)
    assert b"data: [DONE]" in await anyio.to_thread.run_sync(read_all, connection)
