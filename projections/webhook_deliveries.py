"""What is to be sent to which webhook endpoint, and how it went: the table rose.webhook_deliveries.

Not a view: a delivery that was made is not made again when views are rebuilt. Its times are the database's.
"""

from __future__ import annotations

import logging

import msgspec

from rose.domain.webhooks import WebhookState
from rose.log.pool import ACQUIRE_SECONDS, Pool, fetch, fetch_row, unavailable

logger = logging.getLogger(__name__)

NAME = "webhooks"
"""Row of rose.projections that says up to where deliveries are planned."""
WINDOW = 10_000
"""Positions of the log that one statement plans."""

LOCK_CURSOR = "select position from rose.projections where name = $1 and version = 1 for update"
NEW_CURSOR = "insert into rose.projections (name, version) values ($1, 1) on conflict do nothing"
MOVE_CURSOR = """
update rose.projections set position = $2, updated_at = clock_timestamp() where name = $1 and version = 1
"""
# An endpoint gets what happens after its creation, while it is on.
PLAN = """
insert into rose.webhook_deliveries (webhook_id, position, project, type, subject_id, happened_at)
select webhooks.id, events.position, webhooks.project, 'fine_tuning.' || events.type,
       split_part(events.stream_id, '/', 2),
       coalesce((events.data ->> 'at')::bigint, extract(epoch from events.recorded_at)::bigint)
from rose.events join rose.streams using (stream_id)
     join rose.webhooks on webhooks.project = streams.project_id
where events.position > $1 and events.position <= $2
  and events.type in ('job.succeeded', 'job.failed', 'job.cancelled')
  and webhooks.enabled and not webhooks.deleted and webhooks.created_position < events.position
  and webhooks.doc -> 'event_types' ? ('fine_tuning.' || events.type)
on conflict do nothing
"""
DUE = """
select due.position, due.type, due.subject_id, due.happened_at, due.attempts, webhooks.id, webhooks.doc
from rose.webhooks cross join lateral (
    select * from rose.webhook_deliveries
    where webhook_id = webhooks.id and next_at <= clock_timestamp() order by next_at, position limit $1
) as due
where webhooks.enabled and not webhooks.deleted
order by due.next_at, due.position
"""
# Asked again it changes nothing: the number of attempts is another one then. $5: seconds until the next, null for none.
NOTE = """
update rose.webhook_deliveries set
    state = $4, attempts = attempts + 1, last_status = $6, last_error = $7,
    first_attempt_at = coalesce(first_attempt_at, clock_timestamp() - make_interval(secs => $8)),
    next_at = clock_timestamp() + make_interval(secs => $5::float8),
    finished_at = case when $5::float8 is null then clock_timestamp() end
where webhook_id = $1 and position = $2 and attempts = $3 and next_at is not null
"""
DELIVERED_SINCE = """
select exists (
    select from rose.webhook_deliveries as other
    where other.webhook_id = this.webhook_id and other.state = 'delivered' and other.finished_at > this.first_attempt_at
) as found
from rose.webhook_deliveries as this where webhook_id = $1 and position = $2
"""
GIVE_UP = """
update rose.webhook_deliveries set state = 'given_up', next_at = null, finished_at = clock_timestamp()
where next_at is not null
  and not exists (select from rose.webhooks where id = webhook_id and enabled and not deleted)
"""
FORGET = "delete from rose.webhook_deliveries where finished_at < clock_timestamp() - make_interval(secs => $1)"


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An event that is to be sent to an endpoint now."""

    webhook: WebhookState
    position: int
    """Of the event in the log; with the endpoint's id it names the delivery."""
    type: str
    subject_id: str
    """Id of what the event is about."""
    happened_at: int
    attempts: int
    """How often it was tried in vain."""


async def plan(pool: Pool, head: int) -> int:
    """Note what the next events of the log, up to `head`, are to be sent to; return up to where it is planned.

    Any number of processes may do so at once. Raises: Unavailable.
    """
    with unavailable():
        async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection, connection.transaction():
            await connection.execute(NEW_CURSOR, NAME)
            position = await connection.fetchval(LOCK_CURSOR, NAME)
            until = min(head, position + WINDOW)
            if until > position:
                await connection.execute(PLAN, position, until)
                await connection.execute(MOVE_CURSOR, NAME, until)
            return max(position, until)


async def due(pool: Pool, *, each: int) -> list[Delivery]:
    """Return what can be sent now, the longest due first, for each endpoint at most `each`. Raises: Unavailable."""
    found: list[Delivery] = []
    for row in await fetch(pool, DUE, each):
        try:
            webhook = msgspec.json.decode(row["doc"], type=WebhookState)
        except msgspec.ValidationError as error:
            logger.error("the row of webhook %s is damaged (`rose projections verify`): %s", row["id"], error)
            continue
        found.append(
            Delivery(
                webhook=webhook,
                position=row["position"],
                type=row["type"],
                subject_id=row["subject_id"],
                happened_at=row["happened_at"],
                attempts=row["attempts"],
            )
        )
    return found


async def delivered(pool: Pool, delivery: Delivery, *, status: int, took_seconds: float) -> None:
    """Note that the receiver has the event. Raises: Unavailable."""
    await _note(pool, delivery, "delivered", None, status, None, took_seconds)


async def postpone(
    pool: Pool, delivery: Delivery, seconds: float, *, status: int | None, error: str, took_seconds: float
) -> None:
    """Note an attempt in vain, and when the next one is. Raises: Unavailable."""
    await _note(pool, delivery, "pending", seconds, status, error, took_seconds)


async def fail(pool: Pool, delivery: Delivery, *, status: int | None, error: str, took_seconds: float) -> None:
    """Note that the event will not arrive. Raises: Unavailable."""
    await _note(pool, delivery, "failed", None, status, error, took_seconds)


async def something_arrived(pool: Pool, delivery: Delivery) -> bool:
    """Tell whether the endpoint took another event since the first attempt of this one. Raises: Unavailable."""
    row = await fetch_row(pool, DELIVERED_SINCE, delivery.webhook.id, delivery.position)
    return row is not None and row["found"]


async def give_up(pool: Pool) -> None:
    """Drop what waits for endpoints that are off or deleted. Raises: Unavailable."""
    await fetch(pool, GIVE_UP)


async def forget(pool: Pool, older_than_seconds: float) -> None:
    """Remove deliveries that were finished so long ago. Raises: Unavailable."""
    await fetch(pool, FORGET, older_than_seconds)


async def _note(
    pool: Pool,
    delivery: Delivery,
    state: str,
    next_seconds: float | None,
    status: int | None,
    error: str | None,
    took_seconds: float,
) -> None:
    key = (delivery.webhook.id, delivery.position, delivery.attempts)
    await fetch(pool, NOTE, *key, state, next_seconds, status, error, took_seconds)
