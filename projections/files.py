"""The file view: one row per file, written by the append itself, and the queries that read it."""

from __future__ import annotations

from typing import Literal

import msgspec

from projections.damage import DamagedRow, whole
from projections.paging import Page
from rose.domain.files import FileState, initial
from rose.log.append import EntityRow
from rose.log.pool import Pool, Record, fetch, fetch_row

VIEW = "files"
Order = Literal["asc", "desc"]

# $1: project. $2: id to start behind, also of a deleted file; an unknown one gives no row. $3: now, Unix seconds.
# $5: purpose.
LIST = """
with page as (
    select created_position from rose.files
    where project = $1 and not deleted and coalesce(expires_at > $3, true)
      and created_position {beyond} case when $2::text is null then {start}
                                    else (select created_position from rose.files where id = $2 and project = $1) end
      {chosen}
    order by created_position {direction}
    limit $4
)
select id, doc from page join rose.files using (created_position)
where project = $1 and not deleted order by created_position {direction}
"""
ORDERS: dict[Order, dict[str, str]] = {
    "desc": {"beyond": "<", "start": "9223372036854775807", "direction": "desc"},
    "asc": {"beyond": ">", "start": "0", "direction": "asc"},
}
LIST_ALL = {order: LIST.format(chosen="", **words) for order, words in ORDERS.items()}
LIST_OF_PURPOSE = {order: LIST.format(chosen="and purpose = $5", **words) for order, words in ORDERS.items()}
FIND = "select id, doc from rose.files where id = $1"


class DamagedFile(FileState, frozen=True, kw_only=True):
    """What can be read of a file whose row is damaged. For showing alone, never to be stored."""

    damage: str
    """What happened and what helps."""


def row(state: FileState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="files", id=state.id, doc=msgspec.json.encode(state))


async def find(pool: Pool, file_id: str) -> FileState | None:
    """Return the file, whosever it is, also when it was deleted or has expired: for the house, never for a caller.

    Raises: DamagedRow.
    """
    found = await fetch_row(pool, FIND, file_id)
    return None if found is None else whole(VIEW, found["id"], found["doc"], initial)


async def get(pool: Pool, project: str, file_id: str, *, now: int) -> FileState | None:
    """Return the project's file, or None when it has none of that id that can be used at `now` (Unix seconds).

    Raises: DamagedRow; its `remains` are a DamagedFile.
    """
    found = await fetch_row(pool, FIND, file_id)
    state = None if found is None else _shown(found)
    if state is None or state.project != project:
        return None
    if state.deleted_at is not None or (state.expires_at is not None and state.expires_at <= now):
        return None
    if isinstance(state, DamagedFile):
        raise DamagedRow(VIEW, file_id, state)
    return state


async def page(
    pool: Pool,
    project: str,
    *,
    limit: int,
    now: int,
    after: str | None = None,
    purpose: str | None = None,
    order: Order = "desc",
) -> Page[FileState]:
    """Return up to `limit` usable files of the project behind the file `after` in `order` of their making.

    One whose row is damaged is there as a DamagedFile.
    """
    if purpose is None:
        rows = await fetch(pool, LIST_ALL[order], project, after, now, limit + 1)
    else:
        rows = await fetch(pool, LIST_OF_PURPOSE[order], project, after, now, limit + 1, purpose)
    return Page.cut([_shown(found) for found in rows], limit)


def _shown(found: Record) -> FileState:
    try:
        return whole(VIEW, found["id"], found["doc"], initial)
    except DamagedRow as error:
        left = {**msgspec.structs.asdict(error.remains), "id": found["id"]}
        return DamagedFile(**left, damage=str(error))
