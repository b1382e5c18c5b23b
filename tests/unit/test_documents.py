"""The committed documents are those that the code makes; the AsyncAPI one is valid, and so are real messages by it."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from rose import asyncapi
from rose.api import describe
from rose.domain.catalogue import EVENTS, encode
from rose.subjects import CONTENT_TYPE, message
from tests.unit.samples import SAMPLES

ROOT = Path(__file__).parents[2]
SPECIFICATION = Path(__file__).parent / "asyncapi_3_0_0.json.gz"
"""AsyncAPI's own JSON schema, from the npm package @asyncapi/specs 6.11.1 (Apache-2.0)."""
BEFORE_PROJECTS = Path(__file__).parent / "golden_events_before_projects.json"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return asyncapi.document()


@pytest.mark.parametrize(("name", "made"), [("openapi.json", describe.encoded), ("asyncapi.json", asyncapi.encoded)])
def test_the_committed_document_is_what_the_code_makes(name: str, made: Any) -> None:
    committed = (ROOT / "docs" / name).read_bytes()
    assert committed == made(), f"docs/{name} is not what the code makes: run `make docs` and commit it"


def test_the_documents_do_not_depend_on_the_order_of_a_set() -> None:
    code = "import sys; from rose import asyncapi; from rose.api import describe; sys.stdout.buffer.write(MADE)"
    for module in ("describe", "asyncapi"):
        made = {
            subprocess.run(
                [sys.executable, "-c", code.replace("MADE", f"{module}.encoded()")],
                env={"PYTHONHASHSEED": seed},
                cwd=ROOT,
                check=True,
                capture_output=True,
            ).stdout
            for seed in ("1", "2", "3", "4")
        }
        assert len(made) == 1, f"{module} makes another document each time"


def test_asyncapi_itself_accepts_the_document(document: dict[str, Any]) -> None:
    judge = jsonschema_rs.validator_for(msgspec.json.decode(gzip.decompress(SPECIFICATION.read_bytes())))
    assert [f"{'/'.join(map(str, one.instance_path))}: {one.message}" for one in judge.iter_errors(document)] == []
    assert not judge.is_valid({**document, "channels": {"x": {"address": 7}}})


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = 0
    for reference in _references(document):
        inside: Any = document
        for part in reference.removeprefix("#/").split("/"):
            inside = inside[part]
        found += 1
    assert found > 3 * len(EVENTS)


def test_every_event_has_its_channel(document: dict[str, Any]) -> None:
    assert set(document["channels"]) == {*EVENTS, asyncapi.OVERSIZE}
    addresses = [channel["address"] for channel in document["channels"].values()]
    assert len(set(addresses)) == len(addresses)
    for name in EVENTS:
        told = _message(name, EVENTS[name][0], b"{}", f"{name.partition('.')[0]}/x1")
        assert told.subject == asyncapi.address(name).format(project="default", id="x1")
        assert document["components"]["messages"][name]["summary"]


@pytest.mark.parametrize("event", SAMPLES, ids=lambda one: type(one).__name__)
def test_real_messages_are_as_described(document: dict[str, Any], event: Any) -> None:
    name, schema, data = encode(event)
    judge = _judge(document, name)
    body = msgspec.json.decode(_message(name, schema, data).body)
    judge.validate(body)
    assert not judge.is_valid({**body, "type": "rose.v2.job.exploded"})
    assert not judge.is_valid({**body, "schemaversion": 99})
    assert not judge.is_valid({**body, "data": {}}), "what the event is about is required"
    bare = _message(name, schema, data, without_data=True)
    _judge(document, asyncapi.OVERSIZE).validate(msgspec.json.decode(bare.body))
    assert bare.subject == asyncapi.address(asyncapi.OVERSIZE).format(project="default")


def test_what_an_earlier_version_wrote_is_described_too(document: dict[str, Any]) -> None:
    older = msgspec.json.decode(BEFORE_PROJECTS.read_bytes())
    changed = [name for name, stored in older.items() if stored["schema"] != EVENTS[name][0]]
    assert changed
    for name in changed:
        told = _message(name, older[name]["schema"], msgspec.json.encode(older[name]["data"]))
        _judge(document, name).validate(msgspec.json.decode(told.body))


def test_a_field_has_the_sentence_of_the_source(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["CloudEvent"]["properties"]["streamversion"]["description"] == "1, 2, 3, … within the subject."
    assert schemas["StepMetrics"]["properties"]["gradient_norm"]["description"] == "Before clipping."


def _message(name: str, schema: int, data: bytes, stream_id: str = "x/x1", *, without_data: bool = False) -> Any:
    told = message(
        log_id="6d35c1a9-d13c-4794-b348-e36ffd1a6884",
        position=42,
        event_id="5f0c9d5e-6f2c-4b57-9f6e-0a3a1a6f3c11",
        wire_name=name,
        schema=schema,
        project="default",
        stream_id=stream_id,
        version=1,
        recorded_at=datetime(2026, 11, 24, tzinfo=UTC),
        data=data,
        without_data=without_data,
    )
    assert told.headers["Content-Type"] == CONTENT_TYPE
    return told


def _judge(document: dict[str, Any], name: str) -> Any:
    payload = document["components"]["messages"][name]["payload"]
    return jsonschema_rs.validator_for({**payload, "components": document["components"]})


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [one for inside in value.values() for one in _references(inside)]
    return [one for inside in value for one in _references(inside)] if isinstance(value, list) else []


def test_the_list_of_documents_is_whole_and_leads_somewhere() -> None:
    docs = ROOT / "docs"
    linked = re.findall(r"\]\(([^)#]+)\)", (docs / "README.md").read_text())
    assert linked[0] == "moving-from-openai.md"
    assert [path for path in linked if not (docs / path).exists()] == []
    there = {path.name for path in docs.iterdir() if path.suffix in (".md", ".json")} - {"README.md"}
    assert there <= set(linked), f"docs/README.md does not list {', '.join(sorted(there - set(linked)))}"


def test_every_link_between_the_documents_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
        if not _leads(page, *link.partition("#")[::2])
    ]
    assert broken == []


def _leads(page: Path, path: str, heading: str) -> bool:
    target = page.parent / path if path else page
    if not heading or not target.exists():
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
    return heading in {re.sub(r"[^\w\- ]", "", one).lower().replace(" ", "-") for one in headings}
