"""One relay as a process, for tests that kill it: `python -m tests.integration.relaying DSN NATS TOKEN LOCK`."""

from __future__ import annotations

import sys

import anyio

from rose.bus import Bus
from rose.log.pool import open_pool
from rose.relay import Relay, stream_settings
from rose.settings import Settings


async def main(dsn: str, nats_url: str, lock: int) -> None:
    """Relay until killed. A lock of its own lets this relay race with others."""
    pool = await open_pool(dsn)
    async with Bus(nats_url, name=f"relay {lock}") as bus:
        await Relay(pool, bus, stream_settings(Settings()), lock=lock).relay()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]))
