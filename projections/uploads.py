"""The upload view: one row per upload in parts, written by the append itself."""

from __future__ import annotations

import msgspec

from rose.domain.uploads import UploadState
from rose.log.append import EntityRow
from rose.log.pool import Pool, fetch_row

FIND = "select doc from rose.uploads where id = $1"


def row(state: UploadState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="uploads", id=state.id, doc=msgspec.json.encode(state))


async def find(pool: Pool, upload_id: str) -> UploadState | None:
    """Return the upload, whosever it is: for the house, never for a caller. Raises: Unavailable."""
    found = await fetch_row(pool, FIND, upload_id)
    return None if found is None else msgspec.json.decode(found["doc"], type=UploadState)


async def get(pool: Pool, project: str, upload_id: str) -> UploadState | None:
    """Return the project's upload, or None when it has none of that id. Raises: Unavailable."""
    state = await find(pool, upload_id)
    return state if state is not None and state.project == project else None
