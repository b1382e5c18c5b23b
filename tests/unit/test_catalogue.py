"""The catalogue: a golden JSON of every event, because the log is for ever."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from rose.domain import catalogue, keys
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


def test_a_key_from_before_there_were_kinds_opens_the_api() -> None:
    before = msgspec.json.decode(GOLDEN.read_bytes())["key.created"]["data"]
    del before["kind"]
    event = catalogue.decode("key.created", 1, msgspec.json.encode(before))
    assert isinstance(event, keys.KeyCreated)
    assert (event.kind, keys.evolve(keys.initial, event).kind) == ("api", "api")
    row = msgspec.json.decode(b'{"id": "key_a", "project": "default"}', type=keys.KeyState)
    assert row.kind == "api"


@pytest.mark.parametrize(("name", "schema"), [("job.exploded", 1), ("job.created", 99)])
def test_an_event_of_a_newer_version_is_named(name: str, schema: int) -> None:
    with pytest.raises(catalogue.UnknownEvent, match=name):
        catalogue.decode(name, schema, b"{}")
