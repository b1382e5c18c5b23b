"""Every NATS subject of ROSE, and what a message looks like. Pure: nothing here talks to NATS.

An event of the log goes out as a structured CloudEvents 1.0 JSON body on `rose.v2.<project>.<entity>.<id>.<event>`:
a reader is confined to its project by the subject alone. One that NATS would refuse for its content goes out on
`rose.v2.<project>.event.oversize`, without data and with a `dataref`.
"""

from __future__ import annotations

import re
from datetime import datetime

import msgspec

STREAM = "ROSE_EVENTS"
"""JetStream stream whose sequence numbers are the log's positions."""
ALL_EVENTS = "rose.v2.>"
OLDER_SUBJECTS = (("rose.v1.>",),)
"""Subjects of streams that earlier versions made."""
JOB_CREATED = "rose.v2.*.job.*.created"
"""Core subscription that wakes validation slots; losing one is harmless, every waiter also polls."""
JOB_QUEUED = "rose.v2.*.job.*.queued"
"""Core subscription that wakes training slots."""
JOB_CHANGES = ("rose.v2.*.job.*.cancelled", "rose.v2.*.job.*.paused")
"""Core subscriptions by which a trainer hears that its job shall end."""
CONTENT_TYPE = "application/cloudevents+json"

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of a message. `project`, `sequence`, `position`, `streamversion` and
    `schemaversion` are extension attributes."""

    specversion: str
    id: str
    """The event's id, also the message id: who has seen it can drop it."""
    source: str
    """The log: `/rose/logs/<log id>`; it changes when the log is another one."""
    type: str
    """`rose.v2.<entity>.<event>`, for example `rose.v2.job.succeeded`."""
    subject: str
    """Stream id, for example `job/ftjob_…`."""
    project: str
    """Whose it is."""
    time: str
    """When Postgres recorded it, RFC 3339. For people: order comes from the position."""
    datacontenttype: str
    sequence: str
    """The position as 20 digits, so that text order is log order."""
    position: int
    """Global position in the log, 1, 2, 3, … without a gap; equals the JetStream sequence."""
    streamversion: int
    """1, 2, 3, … within the subject."""
    schemaversion: int
    """Number of the data's schema."""
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    dataref: str = ""
    """Where the data can be read when it is not here."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What goes out to NATS for one event."""

    subject: str
    body: bytes
    headers: dict[str, str]


def subject_of(project: str, wire_name: str, stream_id: str) -> str | None:
    """Return `rose.v2.<project>.<entity>.<id>.<event>`, or None when a part cannot be a token of a subject."""
    entity, _, name = wire_name.partition(".")
    _, _, identifier = stream_id.partition("/")
    tokens = (project, entity, identifier, name)
    return ".".join(("rose.v2", *tokens)) if all(map(_TOKEN.fullmatch, tokens)) else None


def project_events(project: str) -> str:
    """Return the subjects of all events of a project."""
    return f"rose.v2.{project}.>"


def oversize_subject(project: str) -> str:
    """Return the subject of an event that goes out without its data."""
    return f"rose.v2.{project}.event.oversize"


def message(
    *,
    log_id: str,
    position: int,
    event_id: str,
    wire_name: str,
    schema: int,
    project: str,
    stream_id: str,
    version: int,
    recorded_at: datetime,
    data: bytes,
    without_data: bool = False,
) -> Message:
    """Return the message of one event. It has no data when asked so, or when the event makes no valid subject."""
    subject = None if without_data else subject_of(project, wire_name, stream_id)
    event = CloudEvent(
        specversion="1.0",
        id=event_id,
        source=f"/rose/logs/{log_id}",
        type=f"rose.v2.{wire_name}",
        subject=stream_id,
        project=project,
        time=recorded_at.isoformat().replace("+00:00", "Z"),
        datacontenttype="application/json",
        sequence=f"{position:020d}",
        position=position,
        streamversion=version,
        schemaversion=schema,
        data=msgspec.Raw(data) if subject else msgspec.UNSET,
        dataref="" if subject else f"/rose/logs/{log_id}/events/{position}",
    )
    headers = {
        "Nats-Expected-Last-Sequence": str(position - 1),
        "Nats-Msg-Id": event_id,
        "Content-Type": CONTENT_TYPE,
        "ce-id": event_id,
        "ce-type": event.type,
    }
    return Message(subject=subject or oversize_subject(project), body=msgspec.json.encode(event), headers=headers)
