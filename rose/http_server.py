"""What the API and the inference engine share as HTTP servers: uvicorn under our own signals."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from socket import socket
from typing import Any, Literal

import anyio
import uvicorn

from rose.errors import Unavailable

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: well above the 5 s between two polls of the SDKs, or some find it closed."""

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
    """uvicorn without its signal handlers, since whoever runs the process has them; tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = anyio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the process's signals as they are."""
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.listening.set()


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
