"""Lets the holders of NATS keys read their project, and nobody else any more: users of nats-server and their consumers.

nats-server learns of users from its configuration. A file that it includes is written here from the key view, whenever
that moved and at every start, and the server is told to read it again: nothing is kept there alone. One process works
at a time; the others stand by.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import anyio

from projections import keys as keys_view
from projections.keys import Reader
from rose.bus import Bus, BusRefused, BusUnavailable, accounts
from rose.errors import Unavailable
from rose.log.feed import Feed, open_feed
from rose.log.pool import Pool
from rose.private_files import write_private
from rose.settings import Settings
from rose.subjects import STREAM, project_subjects

log = logging.getLogger(__name__)

LOCK = 4
"""Advisory lock of the one process that works; the relay has 1, rebuilds 2, webhooks 3."""
POLL_SECONDS = 0.25
"""Longest time that a change waits when its notification is lost, and that an expired key reads on."""
PAUSE_SECONDS = 0.05
"""Least time between two looks at the keys, however many events there are."""
CONSUMERS_SECONDS = 5.0
"""How often the consumers are compared when nothing changed: a stream that was made anew has lost them."""
STANDBY_SECONDS = 1.0
RETRY_SECONDS = 0.5


async def run(pool: Pool, bus: Bus, settings: Settings, stop: anyio.Event) -> None:
    """Keep nats-server's users and consumers those of the keys until `stop` is set.

    Lasts through the absence of Postgres and NATS. Does nothing without the settings that it needs.
    """
    if settings.nats_readers_file is None or settings.nats_system_url is None:
        return
    async with anyio.create_task_group() as group:
        group.start_soon(Readers(pool, bus, settings.nats_readers_file, settings.nats_system_url).follow)
        await stop.wait()
        group.cancel_scope.cancel()


class Readers:
    """The follower of the keys."""

    def __init__(self, pool: Pool, bus: Bus, file: Path, system_url: str) -> None:
        self._pool = pool
        self._bus = bus
        self._file = file
        self._system_url = system_url
        self._loaded: tuple[str, int] | None = None  # what the server has read, on which connection
        self._compared_at = float("-inf")
        self._told = ""

    async def follow(self) -> None:
        """Follow for ever. Never raises for what services and disks do."""
        while True:
            try:
                async with open_feed(self._pool) as feed:
                    await self._stand_by(feed)
                    await self._work(feed)
            except Unavailable as error:
                log.warning("The keys for NATS wait for Postgres: %s", error.message)
                await anyio.sleep(RETRY_SECONDS)

    async def _stand_by(self, feed: Feed) -> None:
        """Return once this is the process that works. Raises: Unavailable."""
        while True:
            if await feed.lock(LOCK):
                return
            await anyio.sleep(STANDBY_SECONDS)

    async def _work(self, feed: Feed) -> None:
        """Follow while this feed lives. Raises: Unavailable when Postgres is away."""
        self._loaded = None  # another process may have written since
        while True:
            try:
                await self._bring_up_to_date(await keys_view.readers(self._pool, int(time.time())))
                self._told = ""
            except (BusUnavailable, BusRefused, OSError) as error:
                self._tell(error.message if not isinstance(error, OSError) else f"{self._file}: {error}")
                await anyio.sleep(RETRY_SECONDS)
            await feed.wait(POLL_SECONDS)
            await anyio.sleep(PAUSE_SECONDS)

    async def _bring_up_to_date(self, readers: tuple[Reader, ...]) -> None:
        """Write the file, let the server read it, make and delete consumers.

        Raises: BusUnavailable, BusRefused, OSError.
        """
        text = accounts.HEAD + "".join(accounts.reader(one.key_id, one.project, one.bcrypt) for one in readers)
        wanted = (text, self._bus.generation)
        if self._loaded == wanted and anyio.current_time() < self._compared_at + CONSUMERS_SECONDS:
            return
        await anyio.to_thread.run_sync(_write, self._file, text)
        if self._loaded != wanted:
            await accounts.reload(self._system_url)
        await self._compare_consumers(readers)
        if self._loaded != wanted:
            await keys_view.note_taken(self._pool, [one.key_id for one in readers])
            log.info("NATS lets %d keys read.", len(readers))
        self._loaded, self._compared_at = wanted, anyio.current_time()

    async def _compare_consumers(self, readers: tuple[Reader, ...]) -> None:
        present = await self._bus.readers(STREAM)
        for one in readers:
            if one.key_id not in present:
                await self._bus.create_reader(STREAM, one.key_id, project_subjects(one.project))
        for name in present - {one.key_id for one in readers}:
            await self._bus.delete_consumer(STREAM, name)

    def _tell(self, why: str) -> None:
        """Log what is in the way, once."""
        log.log(logging.DEBUG if why == self._told else logging.WARNING, "The keys for NATS wait: %s", why)
        self._told = why


def _write(path: Path, text: str) -> None:
    """Replace the file when it differs. nats-server may run as another user; the file has hashes of random secrets."""
    if not path.exists() or path.read_text() != text:
        write_private(path, text, mode=0o644)
