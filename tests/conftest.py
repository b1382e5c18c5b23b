"""Fixtures for all tests: real services, a database per test, settings with a folder of their own."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import hypothesis
import pytest

from rose.settings import Settings, load
from tests import services
from tests.in_own_loop import in_own_loop

# Before anything imports torch: several threads beside a busy neighbour are many times slower than one.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ROSE_TORCH_THREADS", "ROSE_INFERENCE_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ROSE_CONFIG"] = "/nonexistent"  # a developer's rose.toml must not change a test
# Whoever starts the tests in the background of a script leaves Ctrl-C ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile(
    "rose",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("rose")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """Address of a Postgres in which tests may make databases."""
    given = os.environ.get("ROSE_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with services.running_postgres() as server:
        yield server.dsn("postgres")


def _with_database(dsn: str, name: str) -> str:
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}")).replace(f"postgresql:/{name}", f"postgresql:///{name}")


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        await connection.execute(statement, timeout=60)
    finally:
        await connection.close(timeout=10)


@pytest.fixture(scope="session")
async def template_database(anyio_backend: str, postgres_dsn: str) -> AsyncIterator[str]:
    """Name of a migrated database that nobody connects to."""
    from rose.log.migrate import migrate

    name = f"rose_template_{secrets.token_hex(4)}"
    await _execute(postgres_dsn, f"create database {name}")
    await migrate(_with_database(postgres_dsn, name))
    yield name
    await _execute(postgres_dsn, f"drop database {name} with (force)")


@pytest.fixture
async def empty_database_dsn(anyio_backend: str, postgres_dsn: str) -> AsyncIterator[str]:
    """Address of a fresh database without any table."""
    name = f"rose_test_{secrets.token_hex(6)}"
    await _execute(postgres_dsn, f"create database {name}")
    yield _with_database(postgres_dsn, name)
    await _execute(postgres_dsn, f"drop database {name} with (force)")


@pytest.fixture
async def database_dsn(anyio_backend: str, postgres_dsn: str, template_database: str) -> AsyncIterator[str]:
    """Address of a fresh, migrated database."""
    name = f"rose_test_{secrets.token_hex(6)}"
    await _execute(postgres_dsn, f"create database {name} template {template_database} strategy wal_log")
    yield _with_database(postgres_dsn, name)
    await _execute(postgres_dsn, f"drop database {name} with (force)")


@pytest.fixture
def database_dsn_for_processes(postgres_dsn: str) -> Iterator[str]:
    """Address of a fresh database for a test that is not async itself; whoever opens it first migrates it."""
    name = f"rose_test_{secrets.token_hex(6)}"
    in_own_loop(_execute(postgres_dsn, f"create database {name}"))
    yield _with_database(postgres_dsn, name)
    in_own_loop(_execute(postgres_dsn, f"drop database {name} with (force)"))


@pytest.fixture
async def pool(anyio_backend: str, database_dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """Pool on the test's database, as every process of ROSE opens it."""
    from rose.log.pool import open_pool

    opened = await open_pool(database_dsn, min_size=1, max_size=8)
    yield opened
    await opened.close()


@pytest.fixture(scope="session")
def shared_nats() -> Iterator[tuple[str, str | None]]:
    """Address and token of one NATS for the whole session."""
    given = os.environ.get("ROSE_TEST_NATS_URL")
    if given:
        yield given, os.environ.get("ROSE_TEST_NATS_TOKEN")
        return
    with services.running_nats() as server:
        yield server.url, None


@pytest.fixture(scope="session")
def nats_url(shared_nats: tuple[str, str | None]) -> str:
    return shared_nats[0]


@pytest.fixture(scope="session")
def nats_token(shared_nats: tuple[str, str | None]) -> str | None:
    return shared_nats[1]


@pytest.fixture
def nats_server() -> Iterator[Callable[[], services.NatsServer]]:
    """Factory of nats-servers of the test's own, which it may kill and start again."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(services.running_nats())


@pytest.fixture
def private_folder() -> Iterator[Path]:
    """A fresh folder with mode 700 and a short path."""
    with services.private_folder() as folder:
        yield folder


@pytest.fixture
def settings(private_folder: Path) -> Callable[..., Settings]:
    """Factory of settings whose data folder is this test's own; nothing else of the environment is read.

    Nobody waits for an engine that no test has started.
    """

    def make(**overrides: Any) -> Settings:
        given = {"data_dir": str(private_folder), "engine_wait_seconds": 0.0, **overrides}
        return load({"ROSE_CONFIG": "/nonexistent"}, **given)

    return make


@pytest.fixture(scope="session")
def fixture_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small randomly initialised base model."""
    from rose.language_models.tiny import build_fixture

    folder = tmp_path_factory.mktemp("models") / "fixture"
    build_fixture(folder)
    return folder
