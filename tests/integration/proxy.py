"""A relay between a client and Postgres that can lose the server's next answer, as a broken network does."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import anyio
from anyio.abc import ByteStream

PORT = 5432


class Proxy:
    """One relay; every connection through it goes to the same server."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.target = urlsplit(dsn)
        self.folder = folder
        self.lost = 0
        self._lose = False

    @property
    def dsn(self) -> str:
        """Address of the database through this relay."""
        query = urlencode({"host": str(self.folder), "port": PORT})
        return f"postgresql://{self.target.username or 'rose'}@{self.target.path}?{query}"

    def lose_next_answer(self) -> None:
        """Let the next thing that the server says vanish, and the connection with it."""
        self._lose = True

    async def serve(self, client: ByteStream) -> None:
        """Relay one connection until either side ends it."""
        async with client, await self._connect() as server, anyio.create_task_group() as tasks:
            tasks.start_soon(self._copy, client, server, tasks.cancel_scope, False)
            tasks.start_soon(self._copy, server, client, tasks.cancel_scope, True)

    async def _connect(self) -> ByteStream:
        query = parse_qs(self.target.query)
        if "host" in query:
            return await anyio.connect_unix(f"{query['host'][0]}/.s.PGSQL.{query.get('port', [str(PORT)])[0]}")
        return await anyio.connect_tcp(self.target.hostname or "localhost", self.target.port or PORT)

    async def _copy(self, source: ByteStream, sink: ByteStream, scope: anyio.CancelScope, answers: bool) -> None:
        try:
            async for data in source:
                if answers and self._lose:
                    self._lose = False
                    self.lost += 1
                    break
                await sink.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # one side is gone: so is the other
        scope.cancel()


@asynccontextmanager
async def answer_losing_proxy(dsn: str, folder: Path) -> AsyncGenerator[Proxy]:
    """Yield a running relay to the database at `dsn`, with its socket in `folder`."""
    proxy = Proxy(dsn, folder)
    listener = await anyio.create_unix_listener(folder / f".s.PGSQL.{PORT}")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, proxy.serve)
        try:
            yield proxy
        finally:
            tasks.cancel_scope.cancel()
