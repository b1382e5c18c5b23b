"""The runs view: one row for each training run, from its start to the last that was heard of it."""

from __future__ import annotations

from collections.abc import Sequence

from projections.positions import wait_until
from projections.views import View, active
from rose.domain.job_events import RunStarted
from rose.log import read
from rose.log.pool import AnyConnection, Pool, fetch_row
from rose.log.read import Recorded

NAME = "runs"
START = """
insert into rose.runs (version, job_id, epoch, started_at, last_at) values ($1, $2, $3, $4, $4)
on conflict (version, job_id, epoch) do nothing
"""
GO_ON = """
update rose.runs set last_at = greatest(last_at, $4) where version = $1 and job_id = $2 and epoch = $3
"""
SECONDS = f"""
select coalesce(sum(extract(epoch from last_at - started_at)), 0)::float8 as seconds
from rose.jobs join rose.runs on runs.job_id = jobs.id
where jobs.project = $1 and runs.version = {active(NAME)}
"""


async def apply(connection: AnyConnection, version: int, events: Sequence[Recorded]) -> None:
    """Begin a row for each run, and note when it last wrote something; a validation has no row."""
    started = [
        (version, _job_id(recorded), recorded.event.epoch, recorded.recorded_at)
        for recorded in events
        if isinstance(recorded.event, RunStarted)
    ]
    if started:
        await connection.executemany(START, started)
    last = {
        (_job_id(recorded), recorded.epoch): recorded.recorded_at for recorded in events if recorded.epoch is not None
    }
    if last:
        await connection.executemany(GO_ON, [(version, job_id, epoch, at) for (job_id, epoch), at in last.items()])


def _job_id(recorded: Recorded) -> str:
    return recorded.stream_id.removeprefix("job/")


VIEW = View(
    name=NAME,
    takes=frozenset(
        {
            "job.started",
            "job.phase_entered",
            "job.steps_reported",
            "job.recovery_point_saved",
            "job.checkpoint_saved",
            "job.run_released",
            "job.succeeded",
            "job.failed",
        }
    ),
    key=("job_id", "epoch"),
    apply=apply,
)
"""What ends a run from outside (a cancellation, a lease that expired) does not say when it stopped: its own last event
counts."""


async def training_seconds(pool: Pool, project: str) -> float:
    """Return how long the project's jobs have trained, all runs of all jobs together.

    Waits up to a second when the view is behind the log. Raises: Unavailable.
    """
    await wait_until(pool, NAME, await read.head(pool))
    row = await fetch_row(pool, SECONDS, project)
    assert row is not None, "an aggregate always has a row"
    return row["seconds"]
