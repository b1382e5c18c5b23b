"""The permission view: one row per checkpoint permission, written by the append itself."""

from __future__ import annotations

import msgspec

from projections.paging import Page
from rose.domain.permissions import PermissionState
from rose.log.append import EntityRow
from rose.log.pool import Pool, fetch, fetch_row

# $1: owner, $2: model, $3: grantee (null: all), $4: id to start behind; an unknown one gives no row.
LIST = """
select doc from rose.permissions
where project = $1 and model = $2 and not withdrawn and ($3::text is null or grantee = $3)
  and ($4::text is null or created_position {beyond} (
      select created_position from rose.permissions where id = $4 and project = $1 and model = $2
  ))
order by created_position {order} limit $5
"""
NEWEST_FIRST = LIST.format(beyond="<", order="desc")
OLDEST_FIRST = LIST.format(beyond=">", order="asc")
GET = "select doc from rose.permissions where project = $1 and model = $2 and id = $3 and not withdrawn"
OF_GRANTEE = """
select doc from rose.permissions
where grantee = $1 and ($2::text is null or model = $2) and not withdrawn order by created_position
"""


def row(state: PermissionState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="permissions", id=state.id, doc=msgspec.json.encode(state))


async def page(
    pool: Pool, project: str, model: str, *, limit: int, after: str | None, grantee: str | None, newest_first: bool
) -> Page[PermissionState]:
    """Return up to `limit` permissions for a project's model behind the permission `after`. Raises: Unavailable."""
    query = NEWEST_FIRST if newest_first else OLDEST_FIRST
    rows = await fetch(pool, query, project, model, grantee, after, limit + 1)
    return Page.cut([msgspec.json.decode(found["doc"], type=PermissionState) for found in rows], limit)


async def get(pool: Pool, project: str, model: str, permission_id: str) -> PermissionState | None:
    """Return a permission for a project's model that was not withdrawn, or None. Raises: Unavailable."""
    found = await fetch_row(pool, GET, project, model, permission_id)
    return None if found is None else msgspec.json.decode(found["doc"], type=PermissionState)


async def of_grantee(pool: Pool, grantee: str, model: str | None = None) -> list[PermissionState]:
    """Return what a project may use of others (under the name `model`), oldest first. Raises: Unavailable."""
    rows = await fetch(pool, OF_GRANTEE, grantee, model)
    return [msgspec.json.decode(found["doc"], type=PermissionState) for found in rows]
