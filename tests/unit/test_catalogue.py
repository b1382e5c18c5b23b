"""The catalogue: a golden JSON of every event, because the log is for ever."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from rose.domain import catalogue
from rose.domain.job_events import JobPaused
from rose.domain.job_values import PauseReason
from tests.unit.samples import SAMPLES

GOLDEN = Path(__file__).parent / "golden_events.json"
FIRST = Path(__file__).parent / "golden_events_of_0_1.json"
"""What the first version wrote, before fields with defaults were added."""
BEFORE_PROJECTS = Path(__file__).parent / "golden_events_before_projects.json"


def test_every_event_type_is_in_the_catalogue() -> None:
    declared = set(get_args(catalogue.Event))
    assert {kind for _, kind in catalogue.EVENTS.values()} == declared
    assert {type(sample) for sample in SAMPLES} == declared


def test_the_wire_form_of_every_event_is_as_it_was() -> None:
    """A change here breaks every log that exists: add fields with defaults, or a new schema number."""
    written = {
        name: {"schema": schema, "data": msgspec.json.decode(data)}
        for name, schema, data in map(catalogue.encode, SAMPLES)
    }
    assert written == msgspec.json.decode(GOLDEN.read_bytes())


@pytest.mark.parametrize("file", [GOLDEN, FIRST, BEFORE_PROJECTS])
def test_what_was_written_then_is_read_now(file: Path) -> None:
    golden = msgspec.json.decode(file.read_bytes())
    for sample in SAMPLES:
        stored = golden.get(catalogue.name_of(sample))
        if stored is None:
            assert file != GOLDEN
            continue  # an event that came later
        assert catalogue.decode(catalogue.name_of(sample), stored["schema"], stored["data"]) == sample


@pytest.mark.parametrize(
    ("was", "reason", "detail"),
    [
        ("requested", "requested", ""),
        ("no_space: The disk is full.", "no_space", "The disk is full."),
        ("no_space: no_space: /blobs: 3 MiB are free", "no_space", "no_space: /blobs: 3 MiB are free"),
        ("the disk is full", "no_space", "the disk is full"),
    ],
)
def test_a_pause_of_before_says_why_apart_from_what_happened(was: str, reason: PauseReason, detail: str) -> None:
    event = catalogue.decode("job.paused", 1, {"at": 7, "reason": was})
    assert event == JobPaused(at=7, reason=reason, detail=detail)
    assert catalogue.decode(*catalogue.encode(event)) == event


@pytest.mark.parametrize(("name", "schema"), [("job.exploded", 1), ("job.created", 99)])
def test_an_event_of_a_newer_version_is_named(name: str, schema: int) -> None:
    with pytest.raises(catalogue.UnknownEvent, match=name):
        catalogue.decode(name, schema, b"{}")
