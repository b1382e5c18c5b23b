"""The API as users meet it: a real uvicorn server on a real database, asked by the official client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from socket import socket

import anyio
import httpx2
import pytest
import uvicorn
from openai import AsyncOpenAI

from rose.api.app import create_app
from rose.api.services import Services
from rose.blobs import Blobs
from rose.commands import Commands
from rose.log.pool import Pool
from rose.log.tail import Tailer
from rose.settings import Settings
from tests.api.running import SEED, Running, free_port

START_SECONDS = 30.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with an event for the moment it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = anyio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@asynccontextmanager
async def serving(settings: Settings, pool: Pool) -> AsyncGenerator[Running]:
    """Serve the API with these parts until the block ends."""
    from typing import Any

    engines: Any = None
    async with Tailer(pool) as tailer:
        services = Services(
            settings=settings,
            pool=pool,
            tailer=tailer,
            blobs=Blobs(settings.blobs),
            commands=Commands(pool),
            engines=engines,
        )
        config = uvicorn.Config(
            create_app(services),
            host="127.0.0.1",
            port=settings.port,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=5,
        )
        server = _Server(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve)
            with anyio.fail_after(START_SECONDS):
                await server.listening.wait()
            async with (
                httpx2.AsyncClient(base_url=settings.url, timeout=60) as http,
                AsyncOpenAI(base_url=f"{settings.url}/v1", api_key="any", timeout=60, max_retries=0) as openai,
            ):
                yield Running(services=services, http=http, openai=openai)
            tailer.stop()
            server.should_exit = True


@pytest.fixture
def api_settings(settings: Callable[..., Settings]) -> Settings:
    return settings(port=free_port())


@pytest.fixture
async def api(api_settings: Settings, pool: Pool) -> AsyncIterator[Running]:
    """A running API."""
    async with serving(api_settings, pool) as running:
        yield running


@pytest.fixture
def seed_file(tmp_path: Path) -> Path:
    """SEED.md's two examples as a file."""
    path = tmp_path / "training_data.jsonl"
    path.write_bytes(SEED)
    return path
