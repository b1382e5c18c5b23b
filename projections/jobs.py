"""The job view: one row per job, written by the append itself, and the queries that read it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import msgspec

from projections.damage import DAMAGED_ROW, DamagedRow, whole
from projections.paging import Page
from rose.domain.job_values import JobError, PauseReason
from rose.domain.jobs import JobState, initial
from rose.log.append import EntityRow
from rose.log.pool import Pool, Record, fetch, fetch_row

VIEW = "jobs"

# Newest first. $1: project. $2: id to start behind; an unknown one gives no row. $4: metadata that a job must have.
LIST = """
select id, doc from rose.jobs
where project = $1
  and created_position < case when $2::text is null then 9223372036854775807
                         else (select created_position from rose.jobs where id = $2 and project = $1) end
  {chosen}
order by created_position desc
limit $3
"""
LIST_ALL = LIST.format(chosen="")
LIST_WITH_METADATA = LIST.format(chosen="and metadata @> $4::jsonb")
LIST_WITHOUT_METADATA = LIST.format(chosen="and metadata is null")
UNFINISHED = """
select id, doc from rose.jobs
where status in ('validating_files', 'queued', 'running', 'paused')
order by created_position
"""
UNFINISHED_OF = """
select id from rose.jobs
where project = $1 and status in ('validating_files', 'queued', 'running', 'paused') order by created_position
"""
TOTALS = """
select status, count(*) as jobs, sum(coalesce(
           (doc ->> 'trained_tokens')::bigint, (doc -> 'last_metrics' ->> 'trained_tokens')::bigint, 0
       ))::bigint as trained_tokens
from rose.jobs where project = $1 group by status
"""
FIND = "select id, doc from rose.jobs where id = $1"
GET = "select id, doc from rose.jobs where id = $1 and project = $2"
BY_MODEL_NAME = "select id, doc from rose.jobs where model_name = $1 and project = $2"

PAUSED = """
select id, doc from rose.jobs
where status = 'paused' and doc ->> 'paused_because' = $1
order by created_position
"""


def row(state: JobState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="jobs", id=state.id, doc=msgspec.json.encode(state))


async def find(pool: Pool, job_id: str) -> JobState | None:
    """Return the job, whosever it is: for the house itself, never for a caller. Raises: DamagedRow."""
    return _state(await fetch_row(pool, FIND, job_id))


async def get(pool: Pool, project: str, job_id: str) -> JobState | None:
    """Return the project's job, or None when it has none of that id; a damaged row as in `newest_first`."""
    found = await fetch_row(pool, GET, job_id, project)
    return None if found is None else _shown(found, project)


async def by_model_name(pool: Pool, project: str, name: str) -> JobState | None:
    """Return the project's job that reserved `name` for its model, whether or not the model exists by now.

    Raises: DamagedRow.
    """
    return _state(await fetch_row(pool, BY_MODEL_NAME, name, project))


async def unfinished(pool: Pool) -> list[JobState]:
    """Return every job that has not ended, oldest first. Raises: DamagedRow."""
    return [whole(VIEW, found["id"], found["doc"], initial) for found in await fetch(pool, UNFINISHED)]


async def unfinished_of(pool: Pool, project: str) -> list[str]:
    """Return the ids of the project's jobs that have not ended, oldest first."""
    return [found["id"] for found in await fetch(pool, UNFINISHED_OF, project)]


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """A project's jobs, added up."""

    jobs: dict[str, int]
    """How many by status; a status that no job has is left out."""
    trained_tokens: int
    """Of the attempts that count, also of jobs that are running or did not succeed."""


async def totals(pool: Pool, project: str) -> Totals:
    """Add up the project's jobs. Raises: Unavailable."""
    rows = await fetch(pool, TOTALS, project)
    return Totals(
        jobs={row["status"]: row["jobs"] for row in rows}, trained_tokens=sum(row["trained_tokens"] for row in rows)
    )


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

    `metadata`: every pair must be there, exactly. `without_metadata`: only jobs that have none. A job whose row is
    damaged is there as one that failed for that reason, with what can be read of it.
    """
    if metadata and without_metadata:
        return Page(entries=[], has_more=False)
    if metadata:
        wanted = msgspec.json.encode(metadata).decode()
        rows = await fetch(pool, LIST_WITH_METADATA, project, after, limit + 1, wanted)
    else:
        query = LIST_WITHOUT_METADATA if without_metadata else LIST_ALL
        rows = await fetch(pool, query, project, after, limit + 1)
    return Page.cut([_shown(found, project) for found in rows], limit)


async def paused(pool: Pool, because: PauseReason) -> list[JobState]:
    """Return the jobs that are paused because of that, oldest first, without those whose row is damaged."""
    states: list[JobState] = []
    for found in await fetch(pool, PAUSED, because):
        with suppress(DamagedRow):  # it is in the log
            states.append(whole(VIEW, found["id"], found["doc"], initial))
    return states


def _state(found: Record | None) -> JobState | None:
    return None if found is None else whole(VIEW, found["id"], found["doc"], initial)


def _shown(found: Record, project: str) -> JobState:
    """Return the job; when its row is damaged, one that failed for that reason: to be shown, never to be stored."""
    try:
        return whole(VIEW, found["id"], found["doc"], initial)
    except DamagedRow as error:
        return msgspec.structs.replace(
            error.remains,
            id=found["id"],
            project=project,
            status="failed",
            run=None,
            error=JobError(code=DAMAGED_ROW, message=str(error)),
        )
