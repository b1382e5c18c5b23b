"""Lets nats-server read its configuration again, and waits for its answer: what a signal to the process cannot do."""

from __future__ import annotations

import contextlib

import anyio
import msgspec
import nats.errors
from nats.aio.client import Client

from rose.bus.answers import BusRefused, translated
from rose.bus.connection import CLOSE_SECONDS, CONNECT_SECONDS, REQUEST_SECONDS

TIMES = 2
"""nats-server 2.15 brings the imports of an account that a reload adds to life only at the next reload."""


class _Error(msgspec.Struct, frozen=True):
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: _Error | None = None


async def reload(system_url: str) -> None:
    """Let the server reload; `system_url` has a user of its system account. Users that are gone are cut off.

    Raises: BusUnavailable; BusRefused when the configuration is wrong, and the server goes on with the former one.
    """
    client = Client()

    async def ignore(_: Exception) -> None:
        """What goes wrong is raised by the calls themselves."""

    try:
        with translated():
            await client.connect(
                system_url, name="rose keys", allow_reconnect=False, connect_timeout=CONNECT_SECONDS, error_cb=ignore
            )
            for _ in range(TIMES):
                await _reload(client)
    finally:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True), contextlib.suppress(nats.errors.Error, OSError):
            await client.close()


async def _reload(client: Client) -> None:
    subject = f"$SYS.REQ.SERVER.{client._server_info['server_id']}.RELOAD"  # pyright: ignore[reportPrivateUsage]
    response = await client.request(subject, b"", timeout=REQUEST_SECONDS)
    error = msgspec.json.decode(response.data, type=_Answer).error
    if error is not None:
        raise BusRefused(f"NATS refuses its configuration: {error.description}")
