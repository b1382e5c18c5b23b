"""Connections to Postgres: the pool, and reading through it with bounded retries.

Everything that talks to Postgres goes through here, so that an absent database becomes one sentence.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Callable, Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
import stamina
import stamina.instrumentation
from stamina.instrumentation import RetryDetails

from rose.errors import InvalidRequest, Unavailable
from rose.settings import Settings

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]
    AnyConnection = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
else:
    Pool = asyncpg.Pool
    AnyConnection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy

Record = asyncpg.Record

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
ACQUIRE_SECONDS = 10.0
COMMAND_SECONDS = 10.0
"""Longest wait of the client for one answer; above the server's statement_timeout, so only a dead server meets it."""
SERVER_SETTINGS = {
    "application_name": "rose",
    "lock_timeout": "2s",
    "statement_timeout": "5s",
    "idle_in_transaction_session_timeout": "30s",
    "default_transaction_isolation": "read committed",
    "timezone": "UTC",
    "jit": "off",
}
RETRY_ATTEMPTS = 6
RETRY_SECONDS = 15.0
RETRY_WAIT_SECONDS = 0.05
RETRY_LONGEST_WAIT_SECONDS = 2.0

UNANSWERED = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
)
"""The server did not answer, or refused for the moment: whether a statement took effect may be unknown."""


async def open_pool(source: Settings | str, *, min_size: int = 1, max_size: int = 8) -> Pool:
    """Return an open pool of connections to the database of `source` (settings or a URL); close it with `close()`.

    Raises: InvalidRequest when the settings name no database; Unavailable when it does not answer.
    """
    url = source if isinstance(source, str) else source.database_url
    if not url:
        raise InvalidRequest(
            "No database is named.",
            code="invalid_setting",
            param="database_url",
            hint="Set ROSE_DATABASE_URL, or start everything on this machine with `rose up`.",
        )
    with unavailable():
        return await asyncpg.create_pool(
            url,
            min_size=min_size,
            max_size=max_size,
            timeout=CONNECT_SECONDS,
            command_timeout=COMMAND_SECONDS,
            server_settings=SERVER_SETTINGS,
        )


REFUSED = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)
"""The server answers and will not let us in: trying again does not help."""
UNMIGRATED = (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError)


@contextmanager
def unavailable() -> Generator[None]:
    """Turn the errors of an absent, closed, full, overloaded or unmigrated database into a sentence.

    Raises: Unavailable; InvalidRequest when the database's address is no address.
    """
    try:
        yield
    except asyncpg.ClientConfigurationError as error:
        raise InvalidRequest(
            f"The database's address is not valid: {error}.",
            code="invalid_setting",
            param="database_url",
            hint="Set ROSE_DATABASE_URL to postgresql://USER:PASSWORD@HOST:PORT/DATABASE.",
        ) from error
    except asyncpg.DiskFullError as error:
        raise Unavailable(
            f"The disk of the database is full ({error.args[0]}).",
            code="database_full",
            hint="Free some space there; ROSE then goes on by itself, and nothing that was accepted is lost.",
        ) from error
    except UNANSWERED as error:
        raise Unavailable(
            f"Postgres does not answer ({type(error).__name__}: {error}).",
            code="database_unavailable",
            hint="Look at it with `rose status`; nothing that was accepted is lost.",
        ) from error
    except REFUSED as error:
        raise Unavailable(
            f"Postgres refuses: {error}.",
            code="database_refused",
            hint="Look at the user, password and database in ROSE_DATABASE_URL, and at the user's rights.",
        ) from error
    except UNMIGRATED as error:
        raise Unavailable(
            f"The database does not have ROSE's tables ({error}).",
            code="database_not_migrated",
            hint="Run `rose db migrate`.",
        ) from error


def attempts() -> AsyncIterable[stamina.Attempt]:
    """Return the attempts that one database call gets, for `async for attempt in attempts(): with attempt: …`."""
    return stamina.retry_context(
        on=_is_unanswered,
        attempts=RETRY_ATTEMPTS,
        timeout=RETRY_SECONDS,
        wait_initial=RETRY_WAIT_SECONDS,
        wait_max=RETRY_LONGEST_WAIT_SECONDS,
        wait_jitter=RETRY_WAIT_SECONDS,
    )


def _is_unanswered(error: Exception) -> bool:
    return isinstance(error, UNANSWERED) and not isinstance(error, ValueError)


async def fetch(pool: Pool, query: str, *arguments: object) -> list[Record]:
    """Return the rows of a query that may be asked again without harm. Raises: Unavailable."""
    with unavailable():
        async for attempt in attempts():
            with attempt:
                async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                    return await connection.fetch(query, *arguments)
    raise AssertionError("stamina either returns or raises")


async def fetch_row(pool: Pool, query: str, *arguments: object) -> Record | None:
    """Return the first row of a query that may be asked again without harm, or None. Raises: Unavailable."""
    rows = await fetch(pool, query, *arguments)
    return rows[0] if rows else None


async def unlisten(connection: AnyConnection, channel: str, callback: Callable[..., None]) -> None:
    """Stop hearing `channel` before a connection goes back to its pool; a broken connection is cut instead.

    asyncpg keeps the listeners of a connection that broke without its notice, and complains when it is given back.
    """
    try:
        if not connection.is_closed():
            await connection.remove_listener(channel, callback)
            return
    except UNANSWERED as error:
        logger.debug("cutting a broken connection: %s", error)
    with suppress(asyncpg.InterfaceError):  # it is back in the pool already
        connection.terminate()


def _log_retry(details: RetryDetails) -> None:
    error = details.caused_by
    logger.warning("Postgres: trying again in %.2f s (%s: %s)", details.wait_for, type(error).__name__, error)


stamina.instrumentation.set_on_retry_hooks([_log_retry])  # its own hook names neither the error nor what was tried
