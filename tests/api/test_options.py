"""OPTIONS names every method of a path, and never fails."""

from __future__ import annotations

import re

import pytest

from rose.api import describe
from tests.api.running import Running

pytestmark = pytest.mark.anyio


async def test_allow_names_every_method_of_each_path(shared_api: Running) -> None:
    described = {path: {name.upper() for name in methods} for path, methods in describe.openapi()["paths"].items()}
    assert described["/v1/files/{file_id}"] >= {"GET", "DELETE"}
    for path, methods in described.items():
        answer = await shared_api.http.request("OPTIONS", re.sub(r"\{\w+\}", "any", path))
        assert answer.status_code == 204, path
        assert set(answer.headers["allow"].split(", ")) >= methods | {"OPTIONS"}, path
