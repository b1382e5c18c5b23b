"""What the API and the inference engine share as HTTP servers: uvicorn under our own signals."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from socket import socket
from typing import Any, Literal

import anyio
import uvicorn

from rose.errors import Unavailable

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: well above the 5 s between two polls of the SDKs, or some find it closed."""

STUCK_SECONDS = 120.0
"""A connection whose client has read nothing of what waits for it for so long is cut."""
LOOK_TICKS = 50
"""How often that is looked at, in ticks of uvicorn's main loop (0.1 s)."""

FULL_COLLECTION_AFTER = 100
"""Collections of Python's middle generation between two of everything; 10 is its own choice."""


def spare_full_collections() -> None:
    """Make full garbage collections rare and short; call it once everything is imported and made.

    Each stops the process for as long as it has objects: half a second with 2,000 event streams, several times a
    minute by Python's own choice. What most requests leave is collected with the youngest objects as before.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTION_AFTER)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers, since whoever runs the process has them; tells when it listens.

    Cuts clients that do not read: uvicorn itself would keep their connection, and what is behind it, for ever.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = anyio.Event()
        self._unread: dict[Any, tuple[int, float]] = {}
        """By connection: bytes that its client has not taken, and since when they are as many (monotonic seconds)."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the process's signals as they are."""
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.listening.set()

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second; now and then look for clients that do not read."""
        if counter % LOOK_TICKS == 0:
            self._cut_the_stuck(time.monotonic())
        return await super().on_tick(counter)

    def _cut_the_stuck(self, now: float) -> None:
        before, self._unread = self._unread, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            if connection.transport is None:
                continue
            size = connection.transport.get_write_buffer_size()
            if not size:
                continue
            known_size, since = before.get(connection, (None, now))
            if size != known_size:
                since = now
            if now - since < STUCK_SECONDS:
                self._unread[connection] = (size, since)
                continue
            logger.warning("a client has not read for %.0f s; its connection is cut", now - since)
            connection.transport.abort()


@asynccontextmanager
async def http_server(
    app: Any, listener: socket, *, lifespan: Literal["on", "off"] = "off", graceful_seconds: int = 3
) -> AsyncGenerator[None]:
    """Serve the ASGI application `app` on `listener` as long as the context lasts.

    Leaving it gives requests in progress `graceful_seconds` to end. A server that ends by itself ends the context.

    Raises: Unavailable when the application does not start.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan=lifespan,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=graceful_seconds,
    )
    server = Server(config)
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await server.serve([listener])
            tasks.cancel_scope.cancel()

        tasks.start_soon(run)
        try:
            await server.listening.wait()
            yield
        finally:
            server.should_exit = True
    if not server.listening.is_set():
        raise Unavailable("The HTTP server does not start; the log says why.", code="not_started")
