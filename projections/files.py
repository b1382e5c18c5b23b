"""The file view: one row per file, written by the append itself, and the queries that read it."""

from __future__ import annotations

import msgspec

from rose.domain.files import FileState
from rose.log.append import EntityRow


def row(state: FileState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="files", id=state.id, doc=msgspec.json.encode(state))
