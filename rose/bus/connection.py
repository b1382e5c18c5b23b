"""One connection to a NATS server, from its connect to its loss; it is never used again after that.

nats-py would reconnect by itself and send then what it had buffered before: each connection is a client of its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import cast

import anyio
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.client import JetStreamContext

from rose.bus.answers import text_of

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
"""Longest wait for JetStream's answer; `sync_interval: always` on a slow disk takes its time."""
RETRY_SECONDS = 0.5
"""Time between attempts to connect."""
CONNECT_SECONDS = 2
PING_SECONDS = 10
"""A server that leaves two pings unanswered counts as gone."""
CLOSE_SECONDS = 2.0

Callback = Callable[[str, bytes], None]
"""Takes the subject and the body of a message."""


class Connection:
    """A connected client; `lost` is set when it is no more."""

    def __init__(self, client: Client, generation: int, lost: anyio.Event) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=REQUEST_SECONDS)
        self.generation = generation
        self.lost = lost

    async def subscribe(self, subject: str, callback: Callback) -> None:
        """Call `callback` for each message on `subject` for as long as the connection lives."""

        async def deliver(message: Msg) -> None:
            callback(message.subject, message.data)

        with contextlib.suppress(nats.errors.ConnectionClosedError):
            await self.client.subscribe(subject, cb=deliver)


@contextlib.asynccontextmanager
async def connected(url: str, *, token: str | None, name: str, generation: int) -> AsyncGenerator[Connection, None]:
    """Give a connection, after whatever time it takes until the server is there; close it within a bound.

    Raises: nats.errors.Error, OSError, TimeoutError for what trying again may mend.
    """
    client = Client()
    lost = anyio.Event()
    told = False

    async def on_error(error: Exception) -> None:
        nonlocal told
        log.log(logging.DEBUG if told else logging.WARNING, "NATS at %s: %s", _without_password(url), text_of(error))
        told = True

    async def on_loss() -> None:
        lost.set()

    try:
        await client.connect(
            url,
            name=name,
            token=token,
            error_cb=on_error,
            disconnected_cb=on_loss,
            closed_cb=on_loss,
            max_reconnect_attempts=-1,
            reconnect_time_wait=cast("int", RETRY_SECONDS),
            connect_timeout=CONNECT_SECONDS,
            ping_interval=PING_SECONDS,
            pending_size=0,  # nothing is buffered for a connection that is not there
        )
        yield Connection(client, generation, lost)
    finally:
        lost.set()
        with anyio.move_on_after(CLOSE_SECONDS, shield=True), contextlib.suppress(nats.errors.Error, OSError):
            await client.close()


def _without_password(url: str) -> str:
    return url.rpartition("@")[2]
