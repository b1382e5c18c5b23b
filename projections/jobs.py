"""The job view: one row per job, written by the append itself, and the queries that read it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from projections.paging import Page
from rose.domain.jobs import JobState
from rose.log.append import EntityRow
from rose.log.pool import Pool, Record, fetch, fetch_row

# Newest first. $1: id to start behind; an unknown one gives no row. $2: metadata that a job must have.
# $3: only jobs without metadata. $5: project.
LIST = """
select doc from rose.jobs
where project = $5
  and ($1::text is null
       or created_position < (select created_position from rose.jobs where id = $1 and project = $5))
  and ($2::jsonb is null or doc -> 'metadata' @> $2::jsonb)
  and (not $3 or coalesce(doc -> 'metadata', 'null') = 'null')
order by created_position desc
limit $4
"""
UNFINISHED = """
select doc from rose.jobs where status in ('validating_files', 'queued', 'running', 'paused') order by created_position
"""
FIND = "select doc from rose.jobs where id = $1"
GET = "select doc from rose.jobs where id = $1 and project = $2"
BY_MODEL_NAME = "select doc from rose.jobs where model_name = $1 and project = $2"

PAUSED = """
select doc from rose.jobs
where status = 'paused' and starts_with(doc ->> 'paused_because', $1)
order by created_position
"""


def row(state: JobState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="jobs", id=state.id, doc=msgspec.json.encode(state))


async def find(pool: Pool, job_id: str) -> JobState | None:
    """Return the job, whosever it is: for the house itself, never for a caller."""
    return _state(await fetch_row(pool, FIND, job_id))


async def get(pool: Pool, project: str, job_id: str) -> JobState | None:
    """Return the project's job, or None when it has none of that id."""
    return _state(await fetch_row(pool, GET, job_id, project))


async def by_model_name(pool: Pool, project: str, name: str) -> JobState | None:
    """Return the project's job that reserved `name` for its model, whether or not the model exists by now."""
    return _state(await fetch_row(pool, BY_MODEL_NAME, name, project))


async def unfinished(pool: Pool) -> list[JobState]:
    """Return every job that has not ended, oldest first."""
    return [msgspec.json.decode(found["doc"], type=JobState) for found in await fetch(pool, UNFINISHED)]


async def newest_first(
    pool: Pool,
    project: str,
    *,
    limit: int,
    after: str | None = None,
    metadata: Mapping[str, str] | None = None,
    without_metadata: bool = False,
) -> Page[JobState]:
    """Return up to `limit` jobs of the project behind the job `after`, newest first; none when `after` is unknown.

    `metadata`: every pair must be there, exactly. `without_metadata`: only jobs that have none.
    """
    wanted = msgspec.json.encode(metadata).decode() if metadata else None
    rows = await fetch(pool, LIST, after, wanted, without_metadata, limit + 1, project)
    return Page.cut([msgspec.json.decode(found["doc"], type=JobState) for found in rows], limit)


async def paused(pool: Pool, because: str) -> list[JobState]:
    """Return the paused jobs whose reason begins with `because`, oldest first."""
    return [msgspec.json.decode(found["doc"], type=JobState) for found in await fetch(pool, PAUSED, because)]


def _state(found: Record | None) -> JobState | None:
    return None if found is None else msgspec.json.decode(found["doc"], type=JobState)
