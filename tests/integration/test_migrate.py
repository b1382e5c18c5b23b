"""Migrations on a real Postgres: once each, in order, safe at once, and an edited file is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio
import asyncpg
import msgspec
import pytest

from rose.domain.job_commands import PauseJob, ReleaseRun
from rose.domain.jobs import JobState
from rose.errors import Unavailable
from rose.log.migrate import SchemaMismatch, folder, migrate, status
from rose.log.pool import Pool, open_pool
from tests.unit.samples import CREATE, NOW, VALIDATE, given, start, validated

pytestmark = pytest.mark.anyio

RUNNING = given(CREATE, VALIDATE, validated(), start(2))
ALL = [*sorted(path.name for path in folder().glob("0*.sql")), "append.sql"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the migrations that the test may edit."""
    return Path(shutil.copytree(folder(), tmp_path / "migrations"))


async def states(dsn: str, source: Path) -> dict[str, str]:
    return {migration.name: migration.state for migration in await status(dsn, source=source)}


async def test_a_fresh_database_gets_everything_once(empty_database_dsn: str) -> None:
    assert [one.state for one in await status(empty_database_dsn)] == ["pending"] * len(ALL)
    assert await migrate(empty_database_dsn) == ALL
    assert await migrate(empty_database_dsn) == []
    after = await status(empty_database_dsn)
    assert [(one.name, one.state) for one in after] == [(name, "applied") for name in ALL]
    assert all(one.applied_at is not None for one in after)


async def test_a_pool_can_be_migrated_through(empty_database_dsn: str) -> None:
    pool = await open_pool(empty_database_dsn)
    assert await migrate(pool) == ALL
    assert await pool.fetchval("show statement_timeout") == "5s"
    await pool.close()


async def test_two_migrates_at_once_apply_each_file_once(empty_database_dsn: str) -> None:
    done: list[list[str]] = []

    async def run() -> None:
        done.append(await migrate(empty_database_dsn))

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(run)
    assert sorted(done) == [[], [], [], ALL]


async def test_an_edited_migration_is_refused(empty_database_dsn: str, source: Path) -> None:
    await migrate(empty_database_dsn, source=source)
    first = source / "0001_event_log.sql"
    first.write_text(first.read_text() + "\n-- a small edit\n")
    assert (await states(empty_database_dsn, source))[first.name] == "changed"
    with pytest.raises(SchemaMismatch, match=r"0001_event_log\.sql was edited"):
        await migrate(empty_database_dsn, source=source)


async def test_changed_functions_are_applied_again(empty_database_dsn: str, source: Path) -> None:
    await migrate(empty_database_dsn, source=source)
    functions = source / "append.sql"
    functions.write_text(functions.read_text() + "\ncreate function rose.added() returns int language sql return 7;\n")
    assert await migrate(empty_database_dsn, source=source) == ["append.sql"]
    connection = await asyncpg.connect(empty_database_dsn, timeout=30)
    assert await connection.fetchval("select rose.added()") == 7
    await connection.close()


async def test_a_new_migration_is_applied_after_the_old(empty_database_dsn: str, source: Path) -> None:
    await migrate(empty_database_dsn, source=source)
    (source / "0099_more.sql").write_text("create table rose.more (id int);")
    assert await migrate(empty_database_dsn, source=source) == ["0099_more.sql"]


async def test_a_migration_that_fails_leaves_nothing(empty_database_dsn: str, source: Path) -> None:
    await migrate(empty_database_dsn, source=source)
    (source / "0099_bad.sql").write_text("create table rose.more (id int); select 1 / 0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(empty_database_dsn, source=source)
    assert (await states(empty_database_dsn, source))["0099_bad.sql"] == "pending"
    (source / "0099_bad.sql").write_text("create table rose.more (id int);")
    assert await migrate(empty_database_dsn, source=source) == ["0099_bad.sql"]


async def test_a_database_of_a_newer_rose_is_refused(empty_database_dsn: str, source: Path) -> None:
    newer = source / "0099_from_the_future.sql"
    newer.write_text("create table rose.future (id int);")
    await migrate(empty_database_dsn, source=source)
    newer.unlink()
    assert (await states(empty_database_dsn, source))[newer.name] == "unknown"
    with pytest.raises(SchemaMismatch, match=r"0099_from_the_future\.sql") as caught:
        await migrate(empty_database_dsn, source=source)
    assert "update this one" in (caught.value.hint or "")


async def test_each_log_has_an_identity_of_its_own(empty_database_dsn: str, pool: Pool) -> None:
    await migrate(empty_database_dsn)
    connection = await asyncpg.connect(empty_database_dsn, timeout=30)
    own = await connection.fetchval("select log_id from rose.log_head")
    await connection.close()
    assert own != await pool.fetchval("select log_id from rose.log_head")


async def test_an_absent_database_is_said(private_folder: Path) -> None:
    with pytest.raises(Unavailable):
        await migrate(f"postgresql://rose@/rose?host={private_folder}")


async def test_a_job_paused_by_an_older_rose_keeps_its_reason(empty_database_dsn: str, source: Path) -> None:
    """The row that is migrated equals the one that the log makes, so that the job is resumed by itself as before."""
    later = [path for path in source.glob("0*.sql") if path.name >= "0008"]
    kept = {path: path.read_text() for path in later}
    for path in later:
        path.unlink()
    await migrate(empty_database_dsn, source=source)
    released = ReleaseRun(epoch=2, at=NOW, reason="no_space", detail="3 MiB are free.")
    states = {
        "requested": given(PauseJob(at=NOW), state=RUNNING),
        "no_space: 3 MiB are free.": given(released, state=RUNNING),
    }
    connection = await asyncpg.connect(empty_database_dsn, timeout=30)
    for number, (was, state) in enumerate(states.items()):
        doc = msgspec.to_builtins(state)
        del doc["pause_detail"]
        doc |= {"id": f"ftjob_{number}", "model_name": f"m{number}", "paused_because": was}
        await connection.execute(
            "insert into rose.jobs (id, doc, version) values ($1, $2, 1)", doc["id"], msgspec.json.encode(doc).decode()
        )
    for path, text in kept.items():
        path.write_text(text)
    await migrate(empty_database_dsn, source=source)
    rows = await connection.fetch("select doc from rose.jobs order by id")
    await connection.close()
    found = [msgspec.json.decode(row["doc"], type=JobState) for row in rows]
    assert [(one.paused_because, one.pause_detail) for one in found] == [
        ("requested", ""),
        ("no_space", "3 MiB are free."),
    ]
