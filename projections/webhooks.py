"""The webhook view: one row per endpoint, written by the append itself, and the secrets that lie beside the log."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from projections.paging import Page
from rose.domain.webhooks import WebhookState
from rose.log.append import EntityRow
from rose.log.pool import Pool, fetch, fetch_row

# Of a project, newest first. $2: id to start behind; an unknown one gives no row.
LIST = """
select doc from rose.webhooks
where project = $1 and not deleted
  and ($2::text is null or created_position
       < (select created_position from rose.webhooks where id = $2 and project = $1 and not deleted))
order by created_position desc limit $3
"""
GET = "select doc from rose.webhooks where project = $1 and id = $2 and not deleted"
FIND = "select doc, version from rose.webhooks where id = $1"
COUNT = "select count(*) as count from rose.webhooks where project = $1 and not deleted"
KEEP_SECRET = "insert into rose.webhook_secrets (id, secret) values ($1, $2) on conflict do nothing"
SECRETS = "select id, secret from rose.webhook_secrets where id = any($1::text[])"
# A day is time enough for the event that names a fresh secret.
FORGET_SECRETS = """
delete from rose.webhook_secrets where created_at < clock_timestamp() - interval '1 day' and id not in (
    select named.value ->> 'id' from rose.webhooks, jsonb_array_elements(doc -> 'secrets') as named
    where not deleted and coalesce((named.value ->> 'until')::bigint > $1, true)
)
"""


def row(state: WebhookState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="webhooks", id=state.id, doc=msgspec.json.encode(state))


async def find(pool: Pool, webhook_id: str) -> tuple[WebhookState, int] | None:
    """Return an endpoint, whosever it is and also a deleted one, with its version. Raises: Unavailable."""
    found = await fetch_row(pool, FIND, webhook_id)
    return None if found is None else (msgspec.json.decode(found["doc"], type=WebhookState), found["version"])


async def get(pool: Pool, project: str, webhook_id: str) -> WebhookState | None:
    """Return the project's endpoint, or None when it has none of that id. Raises: Unavailable."""
    found = await fetch_row(pool, GET, project, webhook_id)
    return None if found is None else msgspec.json.decode(found["doc"], type=WebhookState)


async def newest_first(pool: Pool, project: str, *, limit: int, after: str | None = None) -> Page[WebhookState]:
    """Return up to `limit` endpoints of the project behind the endpoint `after`. Raises: Unavailable."""
    rows = await fetch(pool, LIST, project, after, limit + 1)
    return Page.cut([msgspec.json.decode(found["doc"], type=WebhookState) for found in rows], limit)


async def count(pool: Pool, project: str) -> int:
    """Return how many endpoints the project has. Raises: Unavailable."""
    found = await fetch_row(pool, COUNT, project)
    assert found is not None
    return found["count"]


async def keep_secret(pool: Pool, secret_id: str, secret: str) -> None:
    """Keep a secret that the log is about to name. Raises: Unavailable."""
    await fetch(pool, KEEP_SECRET, secret_id, secret)


async def secrets(pool: Pool, ids: Sequence[str]) -> list[str]:
    """Return the secrets of these ids, in their order; those that are gone are left out. Raises: Unavailable."""
    found: dict[str, str] = {kept["id"]: kept["secret"] for kept in await fetch(pool, SECRETS, list(ids))}
    return [found[one] for one in ids if one in found]


async def forget_secrets(pool: Pool, at: int) -> None:
    """Remove the secrets that sign nothing any more at `at` (Unix seconds). Raises: Unavailable."""
    await fetch(pool, FORGET_SECRETS, at)
