"""The job view: one row per job, written by the append itself, and the queries that read it."""

from __future__ import annotations

import msgspec

from rose.domain.jobs import JobState
from rose.log.append import EntityRow


def row(state: JobState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="jobs", id=state.id, doc=msgspec.json.encode(state))
