"""The embedded servers start, stop, come back and leave nothing behind."""

from __future__ import annotations

import asyncpg
import pytest

from tests import services

pytestmark = pytest.mark.anyio


async def test_each_test_has_an_empty_database_of_its_own(empty_database_dsn: str) -> None:
    connection = await asyncpg.connect(empty_database_dsn)
    try:
        await connection.execute("create table seen (n int)")
        assert await connection.fetchval("select count(*) from seen") == 0
        assert await connection.fetchval("show fsync") == "on"
        assert (
            await connection.fetchval("select datlocale from pg_database where datname = current_database()")
            == "C.UTF-8"
        )
    finally:
        await connection.close()


def test_nats_keeps_its_port_over_a_crash(nats_server) -> None:
    server: services.NatsServer = nats_server()
    url = server.url
    server.kill()
    assert not server.service.answers()
    server.start()
    assert server.url == url
    assert server.service.answers()
