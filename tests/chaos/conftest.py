"""Fixtures of the chaos tests: a house whose log the checker reads at the end of every test."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from rose.log.pool import Pool
from rose.settings import Settings
from tests.checker import check_log
from tests.trainers import QUICK, House


@pytest.fixture
async def house(
    anyio_backend: str, pool: Pool, database_dsn: str, settings: Callable[..., Settings], fixture_base: Path
) -> AsyncGenerator[House]:
    """A house with many recovery points; afterwards its log keeps every promise of docs/architecture.md."""
    built = House(pool, settings(**QUICK, recovery_steps=5, database_url=database_dsn, log_level="DEBUG"), fixture_base)
    yield built
    assert await check_log(database_dsn) == []
