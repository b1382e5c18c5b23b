"""`rose events asyncapi`: the document on stdout, without any server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import call

pytestmark = pytest.mark.anyio

COMMITTED = Path(__file__).parents[2] / "docs" / "asyncapi.json"


async def test_the_document_is_the_committed_one(tmp_path: Path) -> None:
    done = await call(
        "events", "asyncapi", environment={"ROSE_DATA_DIR": str(tmp_path), "ROSE_URL": "http://127.0.0.1:9"}
    )
    assert (done.status, done.err) == (0, "")
    assert done.out.encode() == COMMITTED.read_bytes()
    assert json.loads(done.out)["asyncapi"] == "3.0.0"
