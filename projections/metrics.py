"""The metrics view: one row per job and training step."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from projections.views import View, active, caught_up
from rose.domain.job_events import RunResumed, StepsReported
from rose.domain.job_values import StepMetrics
from rose.log.pool import AnyConnection, Pool, Record, fetch, fetch_row
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

MEASURED, VALID_MEASURED, VALID = "measured", "valid_measured", "valid_"
NAMES = tuple(
    name for name in StepMetrics.__struct_fields__ if name not in ("step", "total_steps", MEASURED, VALID_MEASURED)
)
"""The series that every job has: what a step reports beside its number."""
OWN_NAME = re.compile(r"[a-z][a-z0-9_]{0,60}")
OWN = f"""
select jsonb_object_keys(doc -> '{MEASURED}') as name from rose.metrics
where version = {active(NAME)} and job_id = $1 and step = (
    select min(step) from rose.metrics where version = {active(NAME)} and job_id = $1
)
"""
ROWS = f"rose.metrics where version = {active(NAME)} and job_id = $1"
PAGE = f"""
with page as materialized (select step, doc from {ROWS} and step > $2 order by step limit $3)
select {{columns}}, exists (select from {ROWS} and step > (select max(step) from page)) as more from page
"""
OUTLINE = f"""
with steps as materialized (
    select step, row_number() over (order by step) as place, ntile($3) over (order by step) as bucket, {{values}}
    from {ROWS} and step > $2
),
bounds as materialized (select bucket, {{bounds}} from steps group by bucket),
extremes as (select unnest(array[{{firsts}}]) as step from steps join bounds using (bucket) group by bucket),
shown as (select step from extremes union select min(step) from steps union select max(step) from steps),
room as (select (select count(*) from steps) as reported, $4 - (select count(*) from shown) as free),
kept as (
    select step from shown
    union select step from steps, room where reported <= $4 or (free > 0 and place % (1 + (reported - 1) / free) = 0)
)
select {{columns}}, (select count(*) from steps) as reported from {ROWS} and step in (select step from kept)
"""


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """Series of a job by columns, each a list in JSON as Postgres makes it: no step is decoded on the way."""

    steps: msgspec.Raw
    series: dict[str, msgspec.Raw]
    has_more: bool = False
    """There are later steps."""
    reported: int | None = None
    """How many steps there are; None when they were not counted."""


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


async def names_of(pool: Pool, job_id: str) -> tuple[str, ...]:
    """Return the series of a job: what all have, what its method measures, and the same on validation data.

    Waits up to a second when the view is behind the job. Raises: Unavailable.
    """
    await caught_up(pool, NAME, f"job/{job_id}")
    own = [name for row in await fetch(pool, OWN, job_id) if OWN_NAME.fullmatch(name := row["name"])]
    return (*NAMES, *own, *(VALID + name for name in own))


async def page(pool: Pool, job_id: str, names: Sequence[str], *, after_step: int, limit: int) -> Columns:
    """Return the series of up to `limit` steps after `after_step`.

    Waits up to a second when the view is behind the job. Raises: Unavailable.
    """
    await caught_up(pool, NAME, f"job/{job_id}")
    row = await fetch_row(pool, PAGE.format(columns=_columns(names)), job_id, after_step, limit)
    return _read(row, names, has_more=bool(row and row["more"]))


def fewest_points(series_count: int) -> int:
    """Return how many steps an outline has at least: the first, the last, and both extremes of each series."""
    return 2 + 2 * series_count


async def outline(pool: Pool, job_id: str, names: Sequence[str], *, after_step: int, points: int) -> Columns:
    """Return the series of at most `points` steps after `after_step`, which show what all of them show.

    The steps are cut into buckets of one size. Of each bucket, and for each series, the steps with the lowest and the
    highest value stay; the first and the last step always do. What room is left goes to steps at even distances. Where
    there are no more than `points`, all stay.

    Waits up to a second when the view is behind the job. Raises: Unavailable.
    """
    await caught_up(pool, NAME, f"job/{job_id}")
    count = range(len(names))
    query = OUTLINE.format(
        values=", ".join(f"({_value(name)})::text::float8 as v{i}" for i, name in enumerate(names)),
        bounds=", ".join(f"min(v{i}) as low{i}, max(v{i}) as high{i}" for i in count),
        firsts=", ".join(f"min(step) filter (where v{i} = {end}{i})" for i in count for end in ("low", "high")),
        columns=_columns(names),
    )
    buckets = max(1, (points - 2) // (2 * len(names)))
    row = await fetch_row(pool, query, job_id, after_step, buckets, points)
    return _read(row, names, reported=row["reported"] if row else 0)


def _columns(names: Sequence[str]) -> str:
    """Return the SQL of one JSON list for the steps and one for each series."""
    lists = [("step", "steps"), *((_value(name), name) for name in names)]
    return ", ".join(f"coalesce(json_agg({what} order by step), '[]')::text as {name}" for what, name in lists)


def _value(name: str) -> str:
    """Return the SQL of a series' value in a step's row."""
    assert OWN_NAME.fullmatch(name), "it becomes SQL"
    if name in NAMES:
        return f"nullif(doc -> '{name}', 'null')"
    if name.startswith(VALID):
        return f"doc -> '{VALID_MEASURED}' -> '{name.removeprefix(VALID)}'"
    return f"doc -> '{MEASURED}' -> '{name}'"


def _read(row: Record | None, names: Sequence[str], *, has_more: bool = False, reported: int | None = None) -> Columns:
    assert row is not None, "an aggregate always has a row"
    return Columns(
        steps=msgspec.Raw(row["steps"].encode()),
        series={name: msgspec.Raw(row[name].encode()) for name in names},
        has_more=has_more,
        reported=reported,
    )


def _job_id(recorded: Recorded) -> str:
    return recorded.stream_id.removeprefix("job/")
