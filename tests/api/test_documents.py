"""`/docs` and the documents behind it: complete, open to everybody, and nothing of them comes from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import msgspec
import pytest

from rose import asyncapi
from rose.api import describe
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, free_port

pytestmark = pytest.mark.anyio

DIRECTIVE = re.compile(r"(?:default|script|style|img|font|connect)-src .*")


class Parts(HTMLParser):
    """Everything that a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [value for name, value in attrs if name in ("src", "href") and value]
        self.inline += tag == "script" and "src" not in given
        self.inline += any(name.startswith("on") for name in given)


async def test_the_page_and_all_its_parts_come_from_here(shared_api: Running) -> None:
    page = await shared_api.http.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    parts = Parts(page.text)
    assert parts.inline == 0, "the policy would not run it"
    assert {"openapi.json", "asyncapi.json", "docs/swagger-ui-bundle.js"} <= set(parts.found)
    for path in parts.found:
        assert re.fullmatch(r"[\w./-]+", path), f"{path} lies elsewhere"
        answer = await shared_api.http.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.content
        expected = {"js": "text/javascript", "css": "text/css", "png": "image/png", "json": "application/"}
        assert answer.headers["content-type"].startswith(expected[path.rpartition(".")[2]])
    start = (await shared_api.http.get("/docs/start.js")).text
    assert 'url: "openapi.json"' in start
    assert "validatorUrl: null" in start, "Swagger UI would send the document to its validator"
    assert "//" not in start


async def test_the_policy_lets_nothing_load_from_elsewhere(shared_api: Running) -> None:
    policy = (await shared_api.http.get("/docs")).headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    sources = {source for one in policy if DIRECTIVE.fullmatch(one) for source in one.split()[1:]}
    assert sources <= {"'none'", "'self'", "'unsafe-inline'", "data:"}
    assert not any("unsafe" in one for one in policy if one.startswith("script"))


async def test_the_style_sheet_fetches_nothing(shared_api: Running) -> None:
    style = (await shared_api.http.get("/docs/swagger-ui.css")).text
    fetched = re.findall(r"url\(\s*['\"]?([^)]{0,60})", style)
    assert all(one.startswith("data:") for one in fetched)


async def test_the_documents_are_those_of_the_code(shared_api: Running) -> None:
    assert (await shared_api.http.get("/openapi.json")).json() == msgspec.json.decode(describe.encoded())
    assert (await shared_api.http.get("/asyncapi.json")).json() == msgspec.json.decode(asyncapi.encoded())


@pytest.mark.parametrize("path", ["/docs/index.html", "/docs/..%2f__init__.py", "/docs/swagger-ui.css/x"])
async def test_other_paths_are_unknown(shared_api: Running, path: str) -> None:
    answer = await shared_api.http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


async def test_where_keys_are_needed_the_documents_are_open(settings: Callable[..., Settings], pool: Pool) -> None:
    async with serving(settings(port=free_port(), api_keys=["sk-secret"]), pool) as running:
        assert (await running.http.get("/v1/models")).status_code == 401
        for path in ("/docs", "/docs/start.js", "/openapi.json", "/asyncapi.json"):
            assert (await running.http.get(path)).status_code == 200, path


@pytest.mark.parametrize("path", ["/openapi.json/x", "/openapi.json/x.json", "/openapi.json/openapi.json"])
async def test_below_the_document_there_is_nothing(shared_api: Running, path: str) -> None:
    answer = await shared_api.http.get(path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "unknown_url")
    assert path in error["message"]


async def test_a_slash_behind_the_document_changes_nothing(shared_api: Running) -> None:
    assert (await shared_api.http.get("/openapi.json/")).json()["openapi"]
