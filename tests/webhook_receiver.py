"""A real HTTP server that takes webhooks, on a port of its own."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import uvicorn
from openai import OpenAI

from rose.http_server import Server

Reply = tuple[int, dict[str, str]]


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def unwrap(self, secret: str) -> Any:
        """Return the event as the official client reads it. Raises: InvalidWebhookSignatureError."""
        with OpenAI(api_key="any", webhook_secret=secret) as client:
            return client.webhooks.unwrap(self.body, self.headers)


class Receiver:
    """What came, and what is answered: `replies` one after the other, then `reply` for ever."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.received: list[Received] = []
        self.reply: Reply = (200, {})
        self.replies: list[Reply] = []
        self.hold: Callable[[Received], anyio.Event | None] = lambda _: None
        """Gives an event for which the answer to a delivery waits."""
        self._changed = anyio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        one = Received(path=scope["path"], headers=headers, body=body)
        self.received.append(one)
        self._changed.set()
        held = self.hold(one)
        if held is not None:
            await held.wait()
        status, more = self.replies.pop(0) if self.replies else self.reply
        sent = [(name.encode(), value.encode()) for name, value in more.items()]
        await send({"type": "http.response.start", "status": status, "headers": sent})
        await send({"type": "http.response.body", "body": b""})

    async def wait(self, count: int, seconds: float = 60.0) -> list[Received]:
        """Return what came, once it is `count` or more. Raises: TimeoutError."""
        with anyio.fail_after(seconds):
            while len(self.received) < count:
                self._changed = anyio.Event()
                await self._changed.wait()
        return self.received

    @asynccontextmanager
    async def listening(self, **options: Any) -> AsyncGenerator[Receiver]:
        """Answer until the block ends; can be entered again."""
        config = uvicorn.Config(
            self,
            host="127.0.0.1",
            port=self.port,
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=1,
            **options,
        )
        server = Server(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve)
            with anyio.fail_after(30):
                await server.listening.wait()
            yield self
            server.should_exit = True


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
