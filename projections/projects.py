"""The project view: one row per project besides the default one, written by the append itself."""

from __future__ import annotations

import msgspec

from projections.paging import Page
from rose.domain.projects import DEFAULT_PROJECT, ProjectState, default
from rose.log.append import EntityRow
from rose.log.pool import Pool, fetch, fetch_row

# Newest first. $1: id to start behind; an unknown one gives no row. $2: archived ones, too.
LIST = """
select doc from rose.projects
where ($1::text is null or created_position < (select created_position from rose.projects where id = $1))
  and ($2 or not archived)
order by created_position desc limit $3
"""
GET = "select doc from rose.projects where id = $1"


def row(state: ProjectState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="projects", id=state.project, doc=msgspec.json.encode(state))


async def get(pool: Pool, project: str) -> ProjectState | None:
    """Return the project, archived or not; None when there is none of that id. Raises: Unavailable."""
    if project == DEFAULT_PROJECT:
        return default
    found = await fetch_row(pool, GET, project)
    return None if found is None else msgspec.json.decode(found["doc"], type=ProjectState)


async def newest_first(pool: Pool, *, limit: int, after: str | None, archived: bool) -> Page[ProjectState]:
    """Return up to `limit` projects behind the project `after`, newest first; the default one comes last.

    `archived`: archived ones, too. Raises: Unavailable.
    """
    if after == DEFAULT_PROJECT:
        return Page.cut([], limit)
    rows = await fetch(pool, LIST, after, archived, limit + 1)
    found = [msgspec.json.decode(one["doc"], type=ProjectState) for one in rows]
    known = after is None or await get(pool, after) is not None
    return Page.cut([*found, default] if known and len(found) <= limit else found, limit)
