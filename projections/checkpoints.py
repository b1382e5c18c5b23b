"""The checkpoint view: one row per usable model that a job left on its way."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from projections.views import View, active, caught_up
from rose.domain.artifacts import Artifact
from rose.domain.job_events import CheckpointSaved, RunResumed
from rose.domain.job_values import Checkpoint
from rose.log.pool import AnyConnection, Pool, fetch
from rose.log.read import Recorded

NAME = "checkpoints"
WRITE = """
insert into rose.checkpoints (version, id, job_id, step, doc, position) values ($1, $2, $3, $4, $5::text::jsonb, $6)
on conflict (version, id) do update set
    job_id = excluded.job_id, step = excluded.step, doc = excluded.doc, position = excluded.position
"""
FORGET = "delete from rose.checkpoints where version = $1 and job_id = $2 and position < $3"
# $2: checkpoint to start behind; an unknown one gives no row.
LIST = f"""
select job_id, doc::text from rose.checkpoints
where version = {active(NAME)} and job_id = $1
  and ($2::text is null or position < (
      select position from rose.checkpoints where version = {active(NAME)} and job_id = $1 and id = $2))
order by position desc limit $3
"""


class CheckpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint and the job that made it."""

    id: str
    job_id: str
    step: int
    epoch_number: int
    model_name: str
    artifact: Artifact
    metrics: dict[str, float]
    created_at: int


async def apply(connection: AnyConnection, version: int, events: Sequence[Recorded]) -> None:
    """Write one row for each checkpoint; a run that began anew makes those before it void."""
    rows = [
        (
            version,
            recorded.event.checkpoint.id,
            recorded.stream_id.removeprefix("job/"),
            recorded.event.checkpoint.step,
            msgspec.json.encode(recorded.event.checkpoint).decode(),
            recorded.position,
        )
        for recorded in events
        if isinstance(recorded.event, CheckpointSaved)
    ]
    if rows:
        await connection.executemany(WRITE, rows)
    for recorded in events:
        if isinstance(recorded.event, RunResumed) and recorded.event.anew:
            job_id = recorded.stream_id.removeprefix("job/")
            await connection.execute(FORGET, version, job_id, recorded.position)


VIEW = View(name=NAME, takes=frozenset({"job.checkpoint_saved", "job.run_resumed"}), key=("id",), apply=apply)


async def newest_first(pool: Pool, job_id: str, *, limit: int, after: str | None = None) -> list[CheckpointRow]:
    """Return up to `limit` checkpoints of a job behind the one `after`, newest first; none when `after` is unknown.

    Waits up to a second when the view is behind the job. Raises: Unavailable.
    """
    await caught_up(pool, NAME, f"job/{job_id}")
    rows = await fetch(pool, LIST, job_id, after, limit)
    return [_row(row["job_id"], msgspec.json.decode(row["doc"], type=Checkpoint)) for row in rows]


def _row(job_id: str, checkpoint: Checkpoint) -> CheckpointRow:
    return CheckpointRow(
        id=checkpoint.id,
        job_id=job_id,
        step=checkpoint.step,
        epoch_number=checkpoint.epoch_number,
        model_name=checkpoint.model_name,
        artifact=checkpoint.artifact,
        metrics=checkpoint.metrics,
        created_at=checkpoint.created_at,
    )
