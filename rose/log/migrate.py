"""Brings a database to this version's schema: numbered files once each, append.sql whenever it changed.

An applied file is never edited: its checksum is kept and a difference is refused.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import asyncpg
import msgspec

from rose.errors import RoseError
from rose.log.pool import ACQUIRE_SECONDS, CONNECT_SECONDS, AnyConnection, Pool, Record, unavailable

logger = logging.getLogger(__name__)

LOCK = 0x524F5345
"""Key of the advisory lock under which one process migrates (`ROSE` in ASCII)."""
LOCK_SECONDS = 60
OLDEST_POSTGRES = 15
"""Oldest major version that ROSE was tried with."""
FUNCTIONS = "append.sql"
_NUMBERED = re.compile(r"^\d{4}_\w+\.sql$")
_BOOK = """
create schema if not exists rose;
create table if not exists rose.migrations (
    name       text        primary key,
    checksum   text        not null,
    applied_at timestamptz not null default clock_timestamp()
);
"""


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """One file and whether the database has it."""

    name: str
    state: str
    """applied, pending, changed (the file differs from what was applied) or unknown (a newer ROSE applied it)."""
    applied_at: datetime | None = None


class SchemaMismatch(RoseError):
    """The database's schema is not one that this version of ROSE can bring up to date."""

    default_code = "schema_mismatch"


def folder() -> Path:
    """Return the folder of the migrations: inside the package when installed, else beside it in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


async def migrate(target: Pool | str, *, source: Path | None = None) -> list[str]:
    """Apply what is pending and return its names; two at a time are safe, the second finds nothing to do.

    Raises: SchemaMismatch when an applied file was edited or a newer ROSE was here; Unavailable.
    """
    files = _read(source or folder())
    with unavailable():
        async with _connection(target) as connection:
            await _refuse_old_server(connection)
            await connection.execute(f"set statement_timeout = 0; set lock_timeout = '{LOCK_SECONDS}s'")
            await connection.execute("select pg_advisory_lock($1)", LOCK)
            try:
                return await _apply_pending(connection, files)
            finally:
                await connection.execute("select pg_advisory_unlock($1)", LOCK)


async def status(target: Pool | str, *, source: Path | None = None) -> list[Migration]:
    """Return every migration, applied or not, in order. Changes nothing. Raises: Unavailable."""
    files = _read(source or folder())
    with unavailable():
        async with _connection(target) as connection:
            return _compare(files, await _applied(connection))


@asynccontextmanager
async def _connection(target: Pool | str) -> AsyncGenerator[AnyConnection]:
    if not isinstance(target, str):
        async with target.acquire(timeout=ACQUIRE_SECONDS) as connection:
            yield connection
        return
    own = await asyncpg.connect(target, timeout=CONNECT_SECONDS, server_settings={"application_name": "rose migrate"})
    try:
        yield own
    finally:
        await own.close(timeout=CONNECT_SECONDS)


async def _refuse_old_server(connection: AnyConnection) -> None:
    major = connection.get_server_version().major
    if major < OLDEST_POSTGRES:
        raise SchemaMismatch(
            f"This Postgres is version {major}; ROSE needs {OLDEST_POSTGRES} or newer.",
            hint="Upgrade it, or leave ROSE_DATABASE_URL unset and let `rose up` run its own.",
        )


async def _apply_pending(connection: AnyConnection, files: dict[str, str]) -> list[str]:
    await connection.execute(_BOOK)
    done: list[str] = []
    for migration in _compare(files, await _applied(connection)):
        if migration.state == "applied":
            continue
        if migration.state == "unknown":
            raise SchemaMismatch(
                f"The database has the migration {migration.name}, which this version of ROSE does not know.",
                hint="A newer ROSE was here: update this one.",
            )
        if migration.state == "changed" and migration.name != FUNCTIONS:
            raise SchemaMismatch(
                f"The migration {migration.name} was edited after it had been applied.",
                hint="Put the file back as it was and write the change as a new migration.",
            )
        await _apply(connection, migration.name, files[migration.name])
        done.append(migration.name)
    return done


async def _apply(connection: AnyConnection, name: str, text: str) -> None:
    async with connection.transaction():
        await connection.execute(text)
        await connection.execute(
            "insert into rose.migrations (name, checksum) values ($1, $2) on conflict (name) do update set "
            "checksum = excluded.checksum, applied_at = clock_timestamp()",
            name,
            _checksum(text),
        )
    logger.info("applied migration %s", name)


async def _applied(connection: AnyConnection) -> dict[str, Record]:
    if not await connection.fetchval("select to_regclass('rose.migrations') is not null"):
        return {}
    rows = await connection.fetch("select name, checksum, applied_at from rose.migrations")
    return {row["name"]: row for row in rows}


def _read(source: Path) -> dict[str, str]:
    """Return name -> text in the order of application: numbered files, then the functions."""
    names = sorted(path.name for path in source.iterdir() if _NUMBERED.match(path.name))
    return {name: (source / name).read_text("utf-8") for name in (*names, FUNCTIONS)}


def _compare(files: dict[str, str], applied: dict[str, Record]) -> list[Migration]:
    known = [_state(name, text, applied.get(name)) for name, text in files.items()]
    foreign = [
        Migration(name=name, state="unknown", applied_at=row["applied_at"])
        for name, row in sorted(applied.items())
        if name not in files
    ]
    return foreign + known


def _state(name: str, text: str, row: Record | None) -> Migration:
    if row is None:
        return Migration(name=name, state="pending")
    state = "applied" if row["checksum"] == _checksum(text) else "changed"
    return Migration(name=name, state=state, applied_at=row["applied_at"])


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
