"""What API processes have counted of answers (the table rose.usage), added up. Not a view: the log does not have it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from rose.log.pool import Pool, fetch, fetch_row

SUMS = """
coalesce(sum(requests), 0)::bigint as requests, coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
coalesce(sum(completion_tokens), 0)::bigint as completion_tokens
"""
TOTAL = f"select {SUMS} from rose.usage where project = $1"
# $1, $2: from, until. $3: width of a bucket. $4, $5: by project, by model. $6, $7: only of these projects, models.
BUCKETS = f"""
select hour - hour % $3::bigint as start, case when $4 then project end as project,
       case when $5 then model end as model, {SUMS}
from rose.usage
where hour >= $1 and hour < $2 and ($6::text[] is null or project = any($6)) and ($7::text[] is null or model = any($7))
group by 1, 2, 3 order by 1, 2, 3
"""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """Answers and their tokens."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class Bucket(Answers, frozen=True, kw_only=True):
    """Those of a time, and where it was asked for of a project or model."""

    start: int
    """Unix seconds."""
    project: str | None
    model: str | None


async def total(pool: Pool, project: str) -> Answers:
    """Return all that was counted for a project. Raises: Unavailable."""
    row = await fetch_row(pool, TOTAL, project)
    assert row is not None, "an aggregate always has a row"
    return Answers(**dict(row))


async def buckets(
    pool: Pool,
    start: int,
    end: int,
    width: int,
    *,
    by_project: bool,
    by_model: bool,
    projects: Sequence[str] | None,
    models: Sequence[str] | None,
) -> list[Bucket]:
    """Return what was counted from `start` until `end`, which are multiples of `width`, all in Unix seconds.

    Oldest first; where nothing was counted, there is no bucket. Raises: Unavailable.
    """
    rows = await fetch(pool, BUCKETS, start, end, width, by_project, by_model, projects, models)
    return [Bucket(**dict(row)) for row in rows]
