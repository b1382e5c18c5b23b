"""The API as users meet it: a real uvicorn server on a real database, asked by the official client."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx2
import pytest
import uvicorn
from openai import AsyncOpenAI

from projections import runner
from rose.api.app import create_app
from rose.api.limits import Limits
from rose.api.line import Line
from rose.api.services import Services
from rose.blobs import Blobs
from rose.commands import Commands
from rose.http_server import Server
from rose.inference.client import EngineClient
from rose.log.pool import Pool, open_pool
from rose.log.tail import RING, Tailer
from rose.settings import Settings, load
from rose.usage import Meter
from tests.api.running import SEED, Running, free_port
from tests.api.teams import House
from tests.conftest import _execute, _with_database
from tests.services import private_folder

START_SECONDS = 120.0


@asynccontextmanager
async def serving(settings: Settings, pool: Pool, *, ring: int = RING) -> AsyncGenerator[Running]:
    """Serve the API with these parts until the block ends."""
    async with (
        Tailer(pool, ring=ring) as tailer,
        EngineClient(token=settings.inference_token) as engines,
        Meter(pool) as meter,
    ):
        services = Services(
            settings=settings,
            pool=pool,
            tailer=tailer,
            blobs=Blobs(settings.blobs),
            commands=Commands(pool),
            engines=engines,
            line=Line(engines),
            limits=Limits(settings),
            meter=meter,
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
        server = Server(config)
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runner.run, pool, stop)
            tasks.start_soon(server.serve)
            with anyio.fail_after(START_SECONDS):
                await server.listening.wait()
            async with (
                httpx2.AsyncClient(base_url=settings.url, timeout=60) as http,
                AsyncOpenAI(base_url=f"{settings.url}/v1", api_key="any", timeout=60, max_retries=0) as openai,
            ):
                yield Running(services=services, http=http, openai=openai)
            stop.set()
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
async def house(api: Running) -> AsyncIterator[House]:
    """A running API, to be shared by several teams."""
    made = House(api)
    yield made
    await made.close()


@pytest.fixture(scope="module")
async def shared_api(anyio_backend: str, postgres_dsn: str, template_database: str) -> AsyncIterator[Running]:
    """One running API for those tests of a module that change nothing."""
    name = f"rose_shared_{secrets.token_hex(6)}"
    await _execute(postgres_dsn, f"create database {name} template {template_database} strategy wal_log")
    with private_folder() as folder:
        settings = load(
            {"ROSE_CONFIG": "/nonexistent"}, data_dir=str(folder), port=free_port(), engine_wait_seconds=0.0
        )
        pool = await open_pool(_with_database(postgres_dsn, name))
        async with serving(settings, pool) as running:
            yield running
        await pool.close()
    await _execute(postgres_dsn, f"drop database {name} with (force)")


@pytest.fixture(scope="module")
async def shared_file(shared_api: Running) -> str:
    """Id of a training file in `shared_api`."""
    made = await shared_api.openai.files.create(file=("a.jsonl", SEED), purpose="fine-tune")
    return made.id


@pytest.fixture
def seed_file(tmp_path: Path) -> Path:
    """docs/workflow.md's two examples as a file."""
    path = tmp_path / "training_data.jsonl"
    path.write_bytes(SEED)
    return path
