"""The metrics view: one row per job and training step."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from projections.views import View, active, caught_up
from rose.domain.job_events import RunResumed, StepsReported
from rose.domain.job_values import StepMetrics
from rose.log.pool import AnyConnection, Pool, fetch
from rose.log.read import Recorded

NAME = "metrics"
WRITE = """
insert into rose.metrics (version, job_id, step, doc, position) values ($1, $2, $3, $4::text::jsonb, $5)
on conflict (version, job_id, step) do update set doc = excluded.doc, position = excluded.position
"""
FORGET = "delete from rose.metrics where version = $1 and job_id = $2 and position < $3"
SERIES = f"""
select doc::text from rose.metrics
where version = {active(NAME)} and job_id = $1 and step > $2
order by step limit $3
"""


async def apply(connection: AnyConnection, version: int, events: Sequence[Recorded]) -> None:
    """Write one row for each reported step; a run that began anew makes those before it void."""
    rows = [
        (version, _job_id(recorded), step.step, msgspec.json.encode(step).decode(), recorded.position)
        for recorded in events
        if isinstance(recorded.event, StepsReported)
        for step in recorded.event.steps
    ]
    if rows:
        await connection.executemany(WRITE, rows)
    for recorded in events:
        if isinstance(recorded.event, RunResumed) and recorded.event.anew:
            await connection.execute(FORGET, version, _job_id(recorded), recorded.position)


VIEW = View(name=NAME, takes=frozenset({"job.steps_reported", "job.run_resumed"}), key=("job_id", "step"), apply=apply)


async def series(pool: Pool, job_id: str, *, after_step: int = 0, limit: int | None = None) -> list[StepMetrics]:
    """Return the metrics of up to `limit` (None: all) steps after `after_step`, in order of steps.

    Waits up to a second when the view is behind the job. Raises: Unavailable.
    """
    await caught_up(pool, NAME, f"job/{job_id}")
    rows = await fetch(pool, SERIES, job_id, after_step, limit)
    return [msgspec.json.decode(row["doc"], type=StepMetrics) for row in rows]


def _job_id(recorded: Recorded) -> str:
    return recorded.stream_id.removeprefix("job/")
