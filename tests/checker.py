"""Reads a database and names every broken promise of docs/architecture.md, "What always holds", that the log can prove:
positions, versions, commands, epochs, endings and views. Knows the domain's evolve and nothing of the code that writes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from rose.domain import catalogue, files, job_events, jobs, models
from rose.log.read import Recorded

ENTITIES: Mapping[str, tuple[str, Any]] = {"job": ("jobs", jobs), "file": ("files", files), "model": ("models", models)}
REMEMBERED = timedelta(hours=24)
"""How long a command is kept; the setting `idempotency_seconds`."""
CLAIMS = ("job.validation_started", "job.started")
TERMINAL = ("job.succeeded", "job.failed", "job.cancelled")
LEGAL = {
    ("validating_files", "queued"),
    ("validating_files", "failed"),
    ("validating_files", "cancelled"),
    ("queued", "running"),
    ("queued", "paused"),
    ("queued", "failed"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "paused"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("paused", "queued"),
    ("paused", "failed"),
    ("paused", "cancelled"),
}

Rows = Sequence[Mapping[str, Any]]


class Dump(NamedTuple):
    """Everything the checker looks at, of one moment."""

    now: datetime
    head: int
    events: Rows
    """In the order of positions."""
    streams: Mapping[str, int]
    commands: Mapping[str, int]
    rows: Mapping[str, Rows]
    """Entity rows by table."""
    leases: Rows
    projections: Rows
    views: Mapping[str, Rows]
    """Rows of the asynchronous views."""


async def check_log(dsn: str) -> list[str]:
    """Return every violation found in the database, each naming its place; empty when all promises hold."""
    return check(await read_dump(dsn))


async def read_dump(dsn: str) -> Dump:
    """Read the database as of one moment."""
    connection = await asyncpg.connect(dsn, timeout=30, command_timeout=60)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return Dump(
                now=await connection.fetchval("select clock_timestamp()"),
                head=await connection.fetchval("select position from rose.log_head"),
                events=[_event(row) for row in await connection.fetch("select * from rose.events order by position")],
                streams=await _pairs(connection, "select stream_id, version from rose.streams"),
                commands=await _pairs(connection, "select command_id, position from rose.commands"),
                rows={
                    table: [dict(row) for row in await connection.fetch(f"select * from rose.{table} order by id")]
                    for table, _ in ENTITIES.values()
                },
                leases=[
                    dict(row)
                    for row in await connection.fetch(
                        "select *, coalesce(lease_until > clock_timestamp(), false) as alive from rose.leases"
                    )
                ],
                projections=[dict(row) for row in await connection.fetch("select * from rose.projections")],
                views={
                    view: [dict(row) for row in await connection.fetch(f"select * from rose.{view}")]
                    for view in ("metrics", "checkpoints")
                },
            )
    finally:
        await connection.close(timeout=10)


def check(dump: Dump) -> list[str]:
    """Return every violation in `dump`."""
    streams = _by_stream(dump)
    return [
        *_positions(dump),
        *_versions(dump, streams),
        *_commands(dump),
        *(violation for stream_id, events in streams.items() for violation in _epochs(stream_id, events)),
        *(violation for stream_id, events in streams.items() for violation in _life(stream_id, events)),
        *_leases(dump, streams),
        *_entity_rows(dump, streams),
        *_views(dump),
    ]


def changed(earlier: Dump, later: Dump) -> list[str]:
    """Return what of `earlier` is no longer in `later` as it was: the log only ever grows."""
    return [
        f"position {before['position']}: the event changed or is gone"
        for before, after in zip(earlier.events, [*later.events, *([None] * len(earlier.events))], strict=False)
        if before != after
    ]


async def _pairs(connection: Any, query: str) -> dict[str, int]:
    return {row[0]: row[1] for row in await connection.fetch(query)}


def unlike(seen: Sequence[Recorded], dump: Dump) -> list[str]:
    """Return where a reader that followed the log from its start differs from what the log holds in the end."""
    read = [(event.position, event.event_id) for event in seen]
    held = [(event["position"], UUID(str(event["event_id"]))) for event in dump.events]
    return [
        *(f"position {position}: never seen by the reader" for position, _ in sorted(set(held) - set(read))),
        *(f"position {position}: seen, and not in the log" for position, _ in sorted(set(read) - set(held))),
        *(f"position {later[0]}: seen after {earlier[0]}" for earlier, later in pairwise(read) if earlier >= later),
    ]


def _event(row: Any) -> dict[str, Any]:
    return {**row, "data": msgspec.json.decode(row["data"]), "metadata": msgspec.json.decode(row["metadata"])}


def _by_stream(dump: Dump) -> dict[str, list[Mapping[str, Any]]]:
    streams: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in dump.events:
        streams[event["stream_id"]].append(event)
    return streams


def _positions(dump: Dump) -> Iterator[str]:
    seen = [event["position"] for event in dump.events]
    for missing in sorted(set(range(1, dump.head + 1)) - set(seen)):
        yield f"position {missing}: missing, the head is {dump.head}"
    for beyond in (position for position in seen if not 1 <= position <= dump.head):
        yield f"position {beyond}: outside 1..{dump.head}"
    for what, values in (("position", seen), ("event id", [event["event_id"] for event in dump.events])):
        for value, count in Counter(values).items():
            if count > 1:
                yield f"{what} {value}: there {count} times"


def _versions(dump: Dump, streams: Mapping[str, Rows]) -> Iterator[str]:
    for stream_id in dump.streams.keys() | streams.keys():
        versions = [event["version"] for event in streams.get(stream_id, ())]
        if versions != list(range(1, len(versions) + 1)):
            yield f"{stream_id}: versions are {versions}, not 1..{len(versions)}"
        if dump.streams.get(stream_id) != len(versions):
            yield f"{stream_id}: is at version {dump.streams.get(stream_id)} and has {len(versions)} events"


def _commands(dump: Dump) -> Iterator[str]:
    positions: dict[str, list[int]] = defaultdict(list)
    recorded: dict[str, datetime] = {}
    for event in dump.events:
        command_id = event["metadata"].get("command_id", "")
        positions[command_id].append(event["position"])
        recorded[command_id] = event["recorded_at"]
    for command_id, found in positions.items():
        if command_id not in dump.commands:
            if recorded[command_id] < dump.now - REMEMBERED:
                continue  # forgotten (rose/sweeper.py)
            yield f"position {found[0]}: its command {command_id!r} was never accepted"
        elif dump.commands[command_id] != found[-1]:
            yield f"command {command_id}: ends at {dump.commands[command_id]}, its last event is at {found[-1]}"
        if found != list(range(found[0], found[0] + len(found))):
            yield f"command {command_id}: its events lie apart, at {found}"


def _epochs(stream_id: str, events: Rows) -> Iterator[str]:
    newest = 0
    for event in events:
        place, epoch = f"position {event['position']} ({stream_id})", event["epoch"]
        if event["type"] in CLAIMS:
            if event["data"]["epoch"] != epoch:
                yield f"{place}: claims epoch {event['data']['epoch']} and carries {epoch}"
            if event["data"]["epoch"] <= newest:
                yield f"{place}: claims epoch {event['data']['epoch']} after {newest}"
            newest = max(newest, event["data"]["epoch"])
        elif event["type"] != "job.lease_expired" and epoch is not None and epoch != newest:
            yield f"{place}: {event['type']} of epoch {epoch} while {newest} is the newest claimed"


def _life(stream_id: str, events: Rows) -> Iterator[str]:
    if not stream_id.startswith("job/"):
        return
    ends = [event for event in events if event["type"] in TERMINAL]
    if len(ends) > 1:
        yield f"{stream_id}: ended {len(ends)} times, at positions {[event['position'] for event in ends]}"
    if ends and events[-1] is not ends[0]:
        yield f"{stream_id}: position {events[-1]['position']} comes after its end at {ends[0]['position']}"
    steps = Counter(step["step"] for event in events for step in event["data"].get("steps", ()))
    for step, count in steps.items():
        if count > 1:
            yield f"{stream_id}: step {step} was reported {count} times"
    for before, after in pairwise(_states(stream_id, events)):
        if before.id and before.status != after.status and (before.status, after.status) not in LEGAL:
            yield f"{stream_id}: went from {before.status} to {after.status}"


def _states(stream_id: str, events: Rows) -> Iterator[Any]:
    _, entity = ENTITIES[stream_id.partition("/")[0]]
    state = entity.initial
    yield state
    for event in events:
        state = entity.evolve(state, catalogue.decode(event["type"], event["schema"], event["data"]))
        yield state


def _leases(dump: Dump, streams: Mapping[str, Rows]) -> Iterator[str]:
    for lease in dump.leases:
        stream_id = f"job/{lease['job_id']}"
        events = streams.get(stream_id, [])
        claimed = max((event["data"]["epoch"] for event in events if event["type"] in CLAIMS), default=0)
        if lease["epoch"] != claimed:
            yield f"{stream_id}: its lease has epoch {lease['epoch']}, the log claimed {claimed}"
        if lease["alive"] and any(event["type"] in TERMINAL for event in events):
            yield f"{stream_id}: has ended and its lease of epoch {lease['epoch']} lives"


def _entity_rows(dump: Dump, streams: Mapping[str, Rows]) -> Iterator[str]:
    for kind, (table, _) in ENTITIES.items():
        stored = {f"{kind}/{row['id']}": row for row in dump.rows[table]}
        for stream_id in stored.keys() - streams.keys():
            yield f"rose.{table}: {stream_id} has a row and no event"
        for stream_id, events in streams.items():
            if stream_id.startswith(f"{kind}/"):
                yield from _entity_row(table, stream_id, events, stored.get(stream_id))


def _entity_row(table: str, stream_id: str, events: Rows, row: Mapping[str, Any] | None) -> Iterator[str]:
    if row is None:
        yield f"rose.{table}: {stream_id} has events and no row"
        return
    *_, state = _states(stream_id, events)
    folded, stored = msgspec.to_builtins(state), msgspec.json.decode(row["doc"])
    for name in sorted(folded.keys() | stored.keys()):
        if _plain(folded.get(name)) != stored.get(name):
            yield f"rose.{table}: {stream_id} has {name} {stored.get(name)!r}, its events make {folded.get(name)!r}"
    if row["version"] != len(events):
        yield f"rose.{table}: {stream_id} is at version {row['version']} and has {len(events)} events"
    if row["created_position"] != events[0]["position"]:
        yield f"rose.{table}: {stream_id} stands at {row['created_position']}, was born at {events[0]['position']}"


def _views(dump: Dump) -> Iterator[str]:
    """Compare the asynchronous views up to the position that each has read."""
    for projection in dump.projections:
        view = projection["name"]
        if projection["position"] > dump.head:
            yield f"projection {view}: has read up to {projection['position']}, the log ends at {dump.head}"
        if view not in dump.views or projection["status"] != "running":
            continue
        expected = dict(_expected(view, [e for e in dump.events if e["position"] <= projection["position"]]))
        key = {"metrics": lambda row: (row["job_id"], row["step"]), "checkpoints": lambda row: row["id"]}[view]
        stored = {
            key(row): msgspec.json.decode(row["doc"])
            for row in dump.views[view]
            if row["version"] == projection["version"]
        }
        for name in sorted(expected.keys() | stored.keys(), key=str):
            if expected.get(name) != stored.get(name):
                yield f"rose.{view}: {name} is {stored.get(name)!r}, the log makes {expected.get(name)!r}"


def _expected(view: str, events: Rows) -> Iterator[tuple[Any, Any]]:
    for row in events:
        match catalogue.decode(row["type"], row["schema"], row["data"]):
            case job_events.StepsReported(steps=steps) if view == "metrics":
                for step in steps:
                    yield (row["stream_id"].partition("/")[2], step.step), _plain(msgspec.to_builtins(step))
            case job_events.CheckpointSaved(checkpoint=checkpoint) if view == "checkpoints":
                yield checkpoint.id, _plain(msgspec.to_builtins(checkpoint))
            case _:
                pass


def _plain(value: Any) -> Any:
    """Return the value as JSON gives it back."""
    return msgspec.json.decode(msgspec.json.encode(value))
