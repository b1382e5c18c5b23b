"""What goes out to NATS for one event, without NATS."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from rose.domain.catalogue import EVENTS
from rose.subjects import JOB_CREATED, JOB_QUEUED, Message, message, oversize_subject, subject_of


def made(*, stream_id: str = "job/ftjob_x", without_data: bool = False) -> Message:
    return message(
        log_id="l",
        position=7,
        event_id="e",
        wire_name="job.queued",
        schema=1,
        project="default",
        stream_id=stream_id,
        version=2,
        recorded_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        data=b'{"reason":"resumed"}',
        without_data=without_data,
    )


def test_a_message_is_a_cloud_event_whose_headers_put_it_at_its_position() -> None:
    assert made().subject == "rose.v2.default.job.ftjob_x.queued"
    assert made().headers["Nats-Expected-Last-Sequence"] == "6"
    assert made().headers["Nats-Msg-Id"] == made().headers["ce-id"] == "e"
    assert made().headers["ce-type"] == "rose.v2.job.queued"
    assert msgspec.json.decode(made().body) == {
        "specversion": "1.0",
        "id": "e",
        "source": "/rose/logs/l",
        "type": "rose.v2.job.queued",
        "subject": "job/ftjob_x",
        "project": "default",
        "time": "2026-01-02T03:04:05Z",
        "datacontenttype": "application/json",
        "sequence": "00000000000000000007",
        "position": 7,
        "streamversion": 2,
        "schemaversion": 1,
        "data": {"reason": "resumed"},
    }


@pytest.mark.parametrize("bare", [made(without_data=True), made(stream_id="job/a.b"), made(stream_id="job/")])
def test_without_data_it_names_where_the_data_is(bare: Message) -> None:
    assert bare.subject == oversize_subject("default")
    body = msgspec.json.decode(bare.body)
    assert "data" not in body
    assert body["dataref"] == "/rose/logs/l/events/7"
    assert body["type"] == "rose.v2.job.queued"


@pytest.mark.parametrize("identifier", ["a.b", "a b", "*", ">", "ä", "", "a\r\nPUB x 0", "a/b"])
def test_an_id_that_is_no_token_makes_no_subject(identifier: str) -> None:
    assert subject_of("default", "job.queued", f"job/{identifier}") is None


def test_every_event_of_the_catalogue_has_a_subject() -> None:
    for name in EVENTS:
        entity, event = name.split(".")
        assert subject_of("proj_a", name, f"{entity}/id_1") == f"rose.v2.proj_a.{entity}.id_1.{event}"


def test_the_wake_up_subjects_are_those_of_events() -> None:
    assert str(subject_of("X", "job.queued", "job/X")).replace("X", "*") == JOB_QUEUED
    assert str(subject_of("X", "job.created", "job/X")).replace("X", "*") == JOB_CREATED
