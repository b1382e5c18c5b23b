"""Inference engines that play their part down to the byte: what a test wants answered, refused or broken off."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import SocketAttribute, SocketStream

from rose import leases
from tests.api.running import Running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Is anybody there?"}]}
ROLE = {"role": "assistant", "content": "", "refusal": None}
Play = Callable[[SocketStream], Awaitable[None]]


@asynccontextmanager
async def engine(api: Running, play: Play, name: str = "inference_a", **capabilities: Any) -> AsyncGenerator[None]:
    """Announce an engine that plays `play` on each connection, once it has heard the request."""

    async def serve(connection: SocketStream) -> None:
        async with connection:
            while b'"messages"' not in await connection.receive():
                pass
            await play(connection)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        worker = leases.Worker(id=name, kind="inference", host="here", url=url, capabilities=capabilities, pid=1)
        await leases.announce(api.services.pool, worker)
        yield
        tasks.cancel_scope.cancel()


def answer(status: str, body: dict[str, Any], *headers: str) -> Play:
    content = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(content)}", *headers]
    return lambda connection: connection.send("\r\n".join([*lines, "", ""]).encode() + content)


def stream(*deltas: dict[str, Any], end: str = "") -> Play:
    """Stream deltas, then `end`; without one the connection breaks off."""

    async def play(connection: SocketStream) -> None:
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for delta in deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
            await connection.send(framed(f"data: {json.dumps(chunk)}\n\n"))
        if end:
            await connection.send(framed(end) + b"0\r\n\r\n")

    return play


def framed(text: str) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text.encode()), text.encode())


async def die(connection: SocketStream) -> None:
    """Close without an answer."""


WELL = answer("200 OK", {"choices": []})
SPEAK = stream(ROLE, {"content": "Yes."}, end="data: [DONE]\n\n")
