"""Follows the log for the asynchronous views, and rebuilds them.

Each step locks the view's row, reads after its position, writes, and stores the new position in the same transaction.
A failing event stops its view and raises the alarm; nothing is ever skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import anyio
import asyncpg
import msgspec

from projections import checkpoints, metrics, runs
from projections.views import View
from rose.errors import InvalidRequest, InvalidState, RoseError, Unavailable
from rose.log.feed import open_feed
from rose.log.pool import ACQUIRE_SECONDS, UNANSWERED, AnyConnection, Pool, Record, unavailable
from rose.log.read import recorded

log = logging.getLogger(__name__)

VIEWS: tuple[View, ...] = (metrics.VIEW, checkpoints.VIEW, runs.VIEW)
"""THE list of asynchronous views."""
WINDOW = 512
"""Positions of the log that one transaction reads."""
POLL_SECONDS = 0.25
"""How often the log is read when no notification came."""
RETRY_SECONDS = 0.5
REBUILD_LOCK = 2
DELETED_AT_ONCE = 10_000
SWITCH_SECONDS = 60.0
"""Longest wait of a rebuild for the moment in which it takes the old version's place."""

OUTAGES = (*UNANSWERED, asyncpg.TransactionRollbackError)
"""Not the event's fault: trying again may help."""

LOCK_ACTIVE = """
select version, position, status from rose.projections where name = $1 and status <> 'building' for update skip locked
"""
READ = """
select position, stream_id, version, event_id, type, schema, data::text, epoch, metadata::text, recorded_at
from rose.events where position > $1 and position <= $2 and type = any($3) order by position
"""
ADVANCE = "update rose.projections set position = $3, updated_at = clock_timestamp() where name = $1 and version = $2"
MOVE = """
update rose.projections set position = $3, status = $4, error = $5, updated_at = clock_timestamp()
where name = $1 and version = $2
"""


class ViewStopped(RoseError):
    """An event cannot be applied to a view."""

    default_code = "projection_stopped"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a view could not take."""

    position: int
    text: str


async def run(pool: Pool, stop: anyio.Event, *, views: Sequence[View] = VIEWS) -> None:
    """Keep the views up to date until `stop` is set. Lasts through the absence of Postgres.

    Any number of processes may run this: a view that one of them works on is passed over by the others.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(_follow, pool, views)
        await stop.wait()
        group.cancel_scope.cancel()


async def advance(pool: Pool, view: View) -> bool:
    """Take one step with a view; return whether there is more to do. Raises: what Postgres does when it is away."""
    async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection, connection.transaction():
        row = await connection.fetchrow(LOCK_ACTIVE, view.name)
        if row is None:
            await connection.execute(
                "insert into rose.projections (name, version) select $1, 1 "
                "where not exists (select from rose.projections where name = $1 and status <> 'building') "
                "on conflict do nothing",
                view.name,
            )
            return False  # new, or another process works on it
        if row["status"] == "stopped":
            return False
        position, head = await _step(connection, view, row["version"], row["position"])
        return position < head


async def rebuild(pool: Pool, name: str, *, views: Sequence[View] = VIEWS) -> int:
    """Build a view anew beside the one that is read, switch, drop the old one; return the position it shows.

    Readers see the old version, then the new one, never less. A stopped view runs again afterwards.

    Raises: InvalidRequest for an unknown name; InvalidState when another rebuild runs; ViewStopped when an event cannot
    be applied (the old version stays); Unavailable.
    """
    view = find(name, views)
    async with open_feed(pool) as feed:
        if not await feed.lock(REBUILD_LOCK):
            raise InvalidState("Another rebuild is running.", code="rebuild_running", hint="Wait for it to end.")
        with unavailable():
            async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                return await _rebuild(connection, view)


def find(name: str, views: Sequence[View] = VIEWS, *, besides: Sequence[str] = ()) -> View:
    """Return the asynchronous view of that name; `besides` are others that the caller knows. Raises: InvalidRequest."""
    for view in views:
        if view.name == name:
            return view
    names = (*besides, *(view.name for view in views))
    raise InvalidRequest(
        f"There is no view {name!r} here.",
        code="unknown_projection",
        param="name",
        hint=f"One of: {', '.join(names)}. The NATS stream is made anew by: rose events rebuild-stream",
    )


async def _follow(pool: Pool, views: Sequence[View]) -> None:
    while True:
        try:
            async with open_feed(pool) as feed:
                while True:
                    more = [await advance(pool, view) for view in views]
                    if not any(more):
                        await feed.wait(POLL_SECONDS)
        except (*OUTAGES, Unavailable) as error:
            log.warning("The projections wait for Postgres: %s", str(error) or type(error).__name__)
            await anyio.sleep(RETRY_SECONDS)


async def _step(connection: AnyConnection, view: View, version: int, after: int) -> tuple[int, int]:
    """Apply the next window and store the position, in the caller's transaction; return it and the log's head."""
    head = await connection.fetchval("select position from rose.log_head")
    position = min(head, after + WINDOW)
    if position <= after:
        return head, head
    failure = await _apply(connection, view, version, await connection.fetch(READ, after, position, list(view.takes)))
    if failure is None:
        await connection.execute(ADVANCE, view.name, version, position)
        return position, head
    log.error("ALARM: the projection %s stops: %s", view.name, failure.text)
    await connection.execute(MOVE, view.name, version, failure.position - 1, "stopped", failure.text)
    return head, head


async def _apply(connection: AnyConnection, view: View, version: int, rows: Sequence[Record]) -> Failure | None:
    """Apply all rows, or those before the failing one and return that."""
    try:
        async with connection.transaction():
            await view.apply(connection, version, [recorded(row) for row in rows])
        return None
    except Exception as error:  # whatever a view raises stops it, visibly; only outages are tried again
        if isinstance(error, OUTAGES) and not isinstance(error, ValueError):
            raise
        if len(rows) == 1:
            event = f"event {rows[0]['position']} ({rows[0]['type']} of {rows[0]['stream_id']})"
            return Failure(position=rows[0]["position"], text=f"{event}: {type(error).__name__}: {error}")
    for row in rows:
        failure = await _apply(connection, view, version, [row])
        if failure is not None:
            return failure
    return None


async def _rebuild(connection: AnyConnection, view: View) -> int:
    await _clear_leftovers(connection, view)
    try:
        return await _build_and_switch(connection, view)
    finally:
        with anyio.CancelScope(shield=True), suppress(*OUTAGES):  # the next rebuild does it otherwise
            await _clear_leftovers(connection, view)


async def _build_and_switch(connection: AnyConnection, view: View) -> int:
    version = await connection.fetchval(
        "insert into rose.projections (name, version, status) "
        "select $1, coalesce(max(version), 0) + 1, 'building' from rose.projections where name = $1 returning version",
        view.name,
    )
    position, head = 0, 1
    while position < head:
        async with connection.transaction():
            position, head = await _build_step(connection, view, version, position)
    with anyio.fail_after(SWITCH_SECONDS):
        while True:
            async with connection.transaction():
                position, switched = await _switch(connection, view, version, position)
            if switched:
                return position
            await anyio.sleep(POLL_SECONDS)


async def _build_step(connection: AnyConnection, view: View, version: int, after: int) -> tuple[int, int]:
    position, head = await _step(connection, view, version, after)
    status, error = await connection.fetchrow(
        "select status, error from rose.projections where name = $1 and version = $2", view.name, version
    ) or ("", None)
    if status == "stopped":
        raise ViewStopped(
            f"The view {view.name} cannot be rebuilt: {error}.", hint="The version that is read stays as it was."
        )
    return position, head


async def _switch(connection: AnyConnection, view: View, version: int, position: int) -> tuple[int, bool]:
    """Take the place of the version that is read, once this one shows no less; False when that one is in use."""
    exists = await connection.fetchval(
        "select count(*) from rose.projections where name = $1 and status <> 'building'", view.name
    )
    old = await connection.fetchrow(LOCK_ACTIVE, view.name)
    if exists and old is None:
        return position, False
    while old is not None and position < old["position"]:
        position, _ = await _build_step(connection, view, version, position)
    await connection.execute("delete from rose.projections where name = $1 and version <> $2", view.name, version)
    await connection.execute(MOVE, view.name, version, position, "running", None)
    return position, True


async def _clear_leftovers(connection: AnyConnection, view: View) -> None:
    """Remove versions that nobody reads: the former one, or what a killed rebuild has left."""
    await connection.execute("delete from rose.projections where name = $1 and status = 'building'", view.name)
    while True:
        done = await connection.execute(
            f"delete from {view.table} where ctid = any(array("
            f"select ctid from {view.table} where version not in "
            f"(select version from rose.projections where name = $1) limit {DELETED_AT_ONCE}))",
            view.name,
        )
        if done == "DELETE 0":
            return
