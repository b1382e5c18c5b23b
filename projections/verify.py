"""Compares every view with a fold of the log, and mends what differs.

Job, file and model rows are corrected one by one under their stream's lock; asynchronous views are rebuilt.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec

from projections import files as files_view
from projections import jobs as jobs_view
from projections import keys as keys_view
from projections import models as models_view
from projections import permissions as permissions_view
from projections import projects as projects_view
from projections import uploads as uploads_view
from projections import webhooks as webhooks_view
from projections.runner import READ, VIEWS, WINDOW, find, rebuild
from projections.views import View
from rose.domain import files, jobs, keys, models, permissions, projects, uploads, webhooks
from rose.log.append import EntityRow
from rose.log.pool import ACQUIRE_SECONDS, UNANSWERED, AnyConnection, Pool, unavailable
from rose.log.read import Recorded, recorded

BATCH = 100
"""Streams that one look at the database compares."""
MOST_DIFFERENCES = 100
"""Of a view, no more are named."""
SHOWN_KEYS = 5
COMPARE_SECONDS = 600.0
"""Longest comparison of one asynchronous view."""

STREAMS = """
select stream_id from rose.streams
where starts_with(stream_id, $1) and stream_id > $2 and version > 0 order by stream_id limit $3
"""
EVENTS = """
select position, stream_id, version, event_id, type, schema, data::text, epoch, metadata::text, recorded_at
from rose.events where stream_id = $1 order by position
"""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is not what the log says."""

    view: str
    id: str
    text: str
    """What is different, for people."""


class Entity(msgspec.Struct, frozen=True, kw_only=True):
    """An entity row: how it is made from its stream."""

    view: str
    prefix: str
    initial: Any
    evolve: Callable[[Any, Any], Any]
    row: Callable[[Any], EntityRow]


ENTITIES: tuple[Entity, ...] = (
    Entity(view="jobs", prefix="job/", initial=jobs.initial, evolve=jobs.evolve, row=jobs_view.row),
    Entity(view="files", prefix="file/", initial=files.initial, evolve=files.evolve, row=files_view.row),
    Entity(view="models", prefix="model/", initial=models.initial, evolve=models.evolve, row=models_view.row),
    Entity(view="projects", prefix="project/", initial=projects.initial, evolve=projects.evolve, row=projects_view.row),
    Entity(
        view="permissions",
        prefix="permission/",
        initial=permissions.initial,
        evolve=permissions.evolve,
        row=permissions_view.row,
    ),
    Entity(view="keys", prefix="key/", initial=keys.initial, evolve=keys.evolve, row=keys_view.row),
    Entity(view="uploads", prefix="upload/", initial=uploads.initial, evolve=uploads.evolve, row=uploads_view.row),
    Entity(view="webhooks", prefix="webhook/", initial=webhooks.initial, evolve=webhooks.evolve, row=webhooks_view.row),
)


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What the log says about an entity."""

    row: EntityRow
    state: Any
    version: int
    created_position: int


async def verify(pool: Pool, name: str | None = None, *, views: Sequence[View] = VIEWS) -> list[Difference]:
    """Return every row that differs from the log; `name` is a view's, None means all. Changes nothing.

    Raises: InvalidRequest for an unknown name; UnknownEvent; Unavailable.
    """
    differences: list[Difference] = []
    for part in _named(name, views):
        if isinstance(part, Entity):
            differences += await _verify_entity(pool, part)
        else:
            differences += await _verify_view(pool, part)
    return differences


async def repair(pool: Pool, name: str | None = None, *, views: Sequence[View] = VIEWS) -> list[Difference]:
    """Mend a view, None means all, and return what was different. Appends and reads go on meanwhile.

    Raises: InvalidRequest for an unknown name; ViewStopped; UnknownEvent; Unavailable.
    """
    mended: list[Difference] = []
    for part in _named(name, views):
        if isinstance(part, Entity):
            found = await _verify_entity(pool, part)
            for difference in found:
                await _mend_row(pool, part, difference.id)
        else:
            found = await _verify_view(pool, part)
            if found or name is not None:
                await rebuild(pool, part.name, views=views)
        mended += found
    return mended


def _named(name: str | None, views: Sequence[View]) -> Sequence[Entity | View]:
    if name is None:
        return (*ENTITIES, *views)
    entity = next((entity for entity in ENTITIES if entity.view == name), None)
    return (entity or find(name, views, besides=tuple(entity.view for entity in ENTITIES)),)


# --- entity rows


async def _verify_entity(pool: Pool, entity: Entity) -> list[Difference]:
    differences: list[Difference] = []
    last = ""
    while True:
        async with _snapshot(pool) as connection:
            streams = await connection.fetch(STREAMS, entity.prefix, last, BATCH)
            for stream in streams:
                last = stream["stream_id"]
                difference = await _compare(connection, entity, last)
                if difference is not None:
                    differences.append(difference)
            if len(streams) < BATCH:
                return differences + await _unborn(connection, entity)


async def _compare(connection: AnyConnection, entity: Entity, stream_id: str) -> Difference | None:
    expected = await _fold(connection, entity, stream_id)
    row = await connection.fetchrow(
        f"select doc::text, version, created_position from rose.{entity.view} where id = $1", expected.row.id
    )
    if row is None:
        text = f"there is no row; the log has {expected.version} events"
    elif row["version"] != expected.version:
        text = f"version is {row['version']}, the log has {expected.version} events"
    elif row["created_position"] != expected.created_position:
        text = f"created_position is {row['created_position']}, in the log {expected.created_position}"
    else:
        text = _document_difference(row["doc"], expected)
    return Difference(view=entity.view, id=expected.row.id, text=text) if text else None


def _document_difference(stored: str, expected: Expected) -> str:
    """Say which fields differ. Fields that the row does not have yet, because ROSE was updated, count as defaults."""
    right: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(expected.state))
    raw: dict[str, Any] = msgspec.json.decode(stored)
    try:
        state = msgspec.json.decode(stored, type=type(expected.state))
    except msgspec.ValidationError as error:
        return f"the document is not valid: {error}"
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(state))
    found |= {key: raw[key] for key in raw.keys() - right.keys()}
    wrong = sorted(key for key in found.keys() | right.keys() if found.get(key) != right.get(key))
    return "; ".join(
        f"{key} is {_short(found.get(key))}, in the log {_short(right.get(key))}" for key in wrong[:SHOWN_KEYS]
    )


async def _unborn(connection: AnyConnection, entity: Entity) -> list[Difference]:
    """Return rows of which the log knows nothing."""
    rows = await connection.fetch(
        f"select id from rose.{entity.view} where not exists "
        "(select from rose.events where stream_id = $1::text || id) order by id",
        entity.prefix,
        timeout=COMPARE_SECONDS,
    )
    return [Difference(view=entity.view, id=row["id"], text="the log has no such stream") for row in rows]


async def _mend_row(pool: Pool, entity: Entity, id: str) -> None:
    stream_id = f"{entity.prefix}{id}"
    with unavailable():
        async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection, connection.transaction():
            stream = await connection.fetchrow(
                "select version from rose.streams where stream_id = $1 for update", stream_id
            )
            if stream is None or stream["version"] == 0:
                await connection.execute(f"delete from rose.{entity.view} where id = $1", id)
                return
            expected = await _fold(connection, entity, stream_id)
            document = {"kind": entity.view, "id": expected.row.id, "doc": msgspec.Raw(expected.row.doc)}
            text = msgspec.json.encode(document).decode()
            await connection.execute("select rose.store_row($1::text::jsonb, $2)", text, expected.version)
            await connection.execute("select rose.place_row($1::text::jsonb, $2)", text, stream_id)


async def _fold(connection: AnyConnection, entity: Entity, stream_id: str) -> Expected:
    events: list[Recorded] = [recorded(row) for row in await connection.fetch(EVENTS, stream_id)]
    state = entity.initial
    for event in events:
        state = entity.evolve(state, event.event)
    return Expected(
        row=entity.row(state), state=state, version=len(events), created_position=events[0].position if events else 0
    )


# --- asynchronous views


async def _verify_view(pool: Pool, view: View) -> list[Difference]:
    """Make the view anew up to the position that it shows, compare, and let all of that go again."""
    async with _snapshot(pool) as connection:
        active = await connection.fetchrow(
            "select version, position from rose.projections where name = $1 and status <> 'building'", view.name
        )
        if active is None:
            return []
        shadow = -1 - secrets.randbelow(2**31 - 1)  # several may verify at once
        after = 0
        while after < active["position"]:
            upto = min(after + WINDOW, active["position"])
            rows = await connection.fetch(READ, after, upto, list(view.takes))
            await view.apply(connection, shadow, [recorded(row) for row in rows])
            after = upto
        return await _view_differences(connection, view, active["version"], shadow)


async def _view_differences(connection: AnyConnection, view: View, shown: int, shadow: int) -> list[Difference]:
    keys = ", ".join(view.key)
    identity = " || '/' || ".join(f"{key}::text" for key in view.key)
    rows = await connection.fetch(
        f"select {identity} as id, (to_jsonb(shown) - 'version')::text as found, "
        "(to_jsonb(folded) - 'version')::text as right "
        f"from (select * from {view.table} where version = $1) as shown "
        f"full join (select * from {view.table} where version = $2) as folded using ({keys}) "
        "where to_jsonb(shown) - 'version' is distinct from to_jsonb(folded) - 'version' "
        f"order by {keys} limit {MOST_DIFFERENCES}",
        shown,
        shadow,
        timeout=COMPARE_SECONDS,
    )
    return [Difference(view=view.name, id=row["id"], text=_row_difference(row["found"], row["right"])) for row in rows]


def _row_difference(found: str | None, right: str | None) -> str:
    if found is None:
        return "the row is missing"
    if right is None:
        return "the log does not make this row"
    shown: dict[str, Any] = msgspec.json.decode(found)
    folded: dict[str, Any] = msgspec.json.decode(right)
    wrong = sorted(key for key in shown.keys() | folded.keys() if shown.get(key) != folded.get(key))
    return "; ".join(f"{key} is {_short(shown.get(key))}, from the log {_short(folded.get(key))}" for key in wrong)


@asynccontextmanager
async def _snapshot(pool: Pool) -> AsyncGenerator[AnyConnection, None]:
    """Give a connection that sees one moment of the database and forgets whatever is written."""
    with unavailable():
        async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
            transaction = connection.transaction(isolation="repeatable_read")
            await transaction.start()
            try:
                await connection.execute("set local statement_timeout = 0")
                yield connection
            finally:
                with suppress(*UNANSWERED):
                    await transaction.rollback()


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}…"
