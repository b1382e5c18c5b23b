"""Postgres goes away and comes back: the API says so in OpenAI's shape and goes on without being restarted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from rose.local.postgres import Postgres
from rose.log.migrate import migrate
from rose.log.pool import open_pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, Trainer, free_port
from tests.api.test_events import logged, watching
from tests.eventually import eventually
from tests.services import Server, private_folder

pytestmark = pytest.mark.anyio


@pytest.fixture
def postgres() -> Iterator[Server]:
    with private_folder() as folder:
        server = Server(Postgres(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
async def alone(settings: Callable[..., Settings], postgres: Server) -> AsyncIterator[Running]:
    """An API on a Postgres of its own."""
    assert isinstance(postgres.service, Postgres)
    dsn = postgres.service.dsn("postgres")
    await migrate(dsn)
    pool = await open_pool(dsn)
    async with serving(settings(port=free_port()), pool) as running:
        yield running
    await pool.close()


@pytest.mark.timeout(240)
async def test_an_outage_is_told_and_overcome(alone: Running, postgres: Server, seed_file: Path) -> None:
    job = await alone.job(seed_file)
    trainer = Trainer(alone.services, job.id)
    async with watching(alone.http, job.id) as transcript:
        first = await transcript.frame()
        assert first is not None
        await anyio.to_thread.run_sync(postgres.kill)
        assert (await alone.http.get("/health")).status_code == 200
        ready = await alone.http.get("/ready")
        assert (ready.status_code, ready.json()["postgres"]) == (503, "away")
        refused = await alone.http.get(f"/v1/fine_tuning/jobs/{job.id}")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "database_unavailable"
        assert refused.headers["retry-after"]
        await anyio.to_thread.run_sync(postgres.start)
        await eventually(lambda: _ready(alone))
        await trainer.validate()
        await trainer.start()
        await alone.openai.fine_tuning.jobs.cancel(job.id)
        frames = [first, *await transcript.rest()]
    assert [number for number, _ in frames[:-1]] == await logged(alone.services.pool, job.id)
    assert frames[-1] == (None, "[DONE]")


async def _ready(running: Running) -> bool:
    return (await running.http.get("/ready")).status_code == 200
