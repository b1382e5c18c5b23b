"""Makes a large log out of one that was really written: copies of its streams, rows and views, with ids of their own.

The copies are as true as the original: `rose projections verify` finds nothing. A million events take about a minute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import asyncpg
import msgspec

from rose.log.pool import AnyConnection

MARK = "\0"
"""Stands behind every text that each copy has for itself; Postgres has no such character."""
AT_ONCE = 200
"""Copies of one COPY."""
SECONDS = 900.0
"""Longest statement."""
TABLES = {
    "jobs": ("job/", "id, doc, version, created_position"),
    "files": ("file/", "id, doc, version, created_position"),
    "models": ("model/", "id, doc, version, created_position"),
}
VIEWS = {
    "metrics": "version, job_id, step, doc, position",
    "checkpoints": "version, id, job_id, step, doc, position",
}
LEASES = "job_id, kind, epoch, owner, lease_until, not_before, attempts"
EVENTS = "stream_id, version, type, schema, data, metadata, epoch, recorded_at"
PLACES = ("position", "created_position")
ADVANCE = "update rose.log_head set position = $1"
STREAMS = """
insert into rose.streams (stream_id, version, project_id)
select stream_id, max(version), 'default' from rose.events group by 1 on conflict (stream_id) do nothing
"""
FOLLOWED = "update rose.projections set position = (select position from rose.log_head)"


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """Streams that were written one after the other, undisturbed."""

    rows: dict[str, list[dict[str, Any]]]
    """By table. Text holds MARK where a copy's number goes; places are counted from the first event."""

    @property
    def length(self) -> int:
        """How many events it has."""
        return len(self.rows["events"])


async def template(connection: AnyConnection, first: int, last: int, own: Iterable[str]) -> Template:
    """Read what the events at `first` to `last` made; `own` are the ids and names that each copy needs for itself."""
    texts = re.compile("|".join(re.escape(text) for text in sorted(own, key=len, reverse=True)))

    def marked(row: asyncpg.Record) -> dict[str, Any]:
        found = dict(row)
        for name, value in found.items():
            if isinstance(value, str):
                found[name] = texts.sub(lambda match: match[0] + MARK, value)
            elif name in PLACES:
                found[name] = value - first
        return found

    async def read(query: str, *arguments: object) -> list[dict[str, Any]]:
        return [marked(row) for row in await connection.fetch(query, *arguments)]

    between = "where position between $1 and $2 order by position"
    rows = {"events": await read(f"select position, {EVENTS} from rose.events {between}", first, last)}
    for table, (prefix, columns) in TABLES.items():
        streams = "select substr(stream_id, $3) from rose.events where position between $1 and $2"
        query = f"select {columns} from rose.{table} where id in ({streams} and starts_with(stream_id, $4))"
        rows[table] = await read(query, first, last, len(prefix) + 1, prefix)
    leased = (
        "select substr(stream_id, 5) from rose.events where position between $1 and $2 and starts_with(stream_id, $3)"
    )
    rows["leases"] = await read(f"select {LEASES} from rose.leases where job_id in ({leased})", first, last, "job/")
    for table, columns in VIEWS.items():
        rows[table] = await read(f"select {columns} from rose.{table} {between}", first, last)
    return Template(rows=rows)


def _copies(template: Template, table: str, places: Sequence[tuple[int, int]]) -> Iterator[tuple[Any, ...]]:
    """Yield the table's rows of copies; `places` are number and first position of each."""
    for number, first in places:
        suffix = f"{number:06d}"
        for row in template.rows[table]:
            yield tuple(
                value.replace(MARK, suffix) if isinstance(value, str) else value + first if name in PLACES else value
                for name, value in row.items()
            )


async def multiply(connection: AnyConnection, template: Template, count: int) -> int:
    """Append `count` copies and return the position of the last event."""
    head = await connection.fetchval("select position from rose.log_head")
    for begin in range(0, count, AT_ONCE):
        numbers = range(begin, min(count, begin + AT_ONCE))
        places = [(number, head + 1 + number * template.length) for number in numbers]
        for table, rows in template.rows.items():
            if rows:
                copies = _copies(template, table, places)
                await connection.copy_records_to_table(
                    table, schema_name="rose", columns=list(rows[0]), records=copies, timeout=SECONDS
                )
    head += count * template.length
    await connection.execute(ADVANCE, head)
    await connection.execute(STREAMS, timeout=SECONDS)
    await connection.execute(FOLLOWED)
    await connection.execute("vacuum analyze", timeout=SECONDS)
    return head
