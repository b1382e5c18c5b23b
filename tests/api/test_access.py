"""The outside of every answer: keys, request ids, CORS, health, and what `/` says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import openai
import pytest
from openai import AsyncOpenAI

from rose.api.transport import request_envelope
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, free_port

pytestmark = pytest.mark.anyio


@pytest.fixture
async def locked(settings: Callable[..., Settings], pool: Pool) -> AsyncIterator[Running]:
    given = settings(port=free_port(), api_keys=["first-key", "second-key"], cors_origins=["https://roses.example"])
    async with serving(given, pool) as running:
        yield running


async def test_a_wrong_key_is_refused(locked: Running) -> None:
    url = f"{locked.services.settings.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="a-wrong-key-of-somebody", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.type == "invalid_request_error"
    assert "somebody" not in refused.value.message
    for key in ("first-key", "second-key"):
        async with AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
            assert (await client.models.list()).data


@pytest.mark.parametrize("header", ["", "Bearer", "Basic first-key", "first-key", "Bearer second-ke", "Bearer \xff"])
async def test_no_usable_key_is_refused(locked: Running, header: str) -> None:
    headers = {"authorization": header.encode("latin-1")} if header else {}
    answer = await locked.http.post("/v1/fine_tuning/jobs", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_health_needs_no_key(locked: Running) -> None:
    for path in ("/", "/health", "/ready"):
        assert (await locked.http.get(path)).status_code == 200


async def test_browsers_of_known_origins_may_call(locked: Running) -> None:
    asked = {"origin": "https://roses.example", "access-control-request-method": "POST"}
    allowed = await locked.http.options("/v1/fine_tuning/jobs", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://roses.example"
    other = await locked.http.options("/v1/fine_tuning/jobs", headers={**asked, "origin": "https://thorns.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_every_answer_carries_a_request_id(api: Running) -> None:
    for path in ("/v1/models", "/no/such/route", "/v1/files/file_x"):
        answer = await api.http.get(path)
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["openai-version"] == "2020-10-01"
        assert int(answer.headers["openai-processing-ms"]) >= 0
    own = await api.http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    strange = await api.http.get("/v1/models", headers={"x-request-id": "a b"})
    assert strange.headers["x-request-id"] != "a b"
    models = await api.openai.models.list()
    assert models._request_id is not None  # pyright: ignore[reportPrivateUsage]


async def test_who_waits_for_an_answer_when_the_server_ends_is_told_so() -> None:
    asked = anyio.Event()
    sent: list[Any] = []

    async def never_answer(*_: object) -> None:
        asked.set()
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": []}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(request_envelope(never_answer), scope, anyio.sleep_forever, send)  # type: ignore[arg-type]
        await asked.wait()
        tasks.cancel_scope.cancel()  # as uvicorn does, once the graceful time is over
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"2"
    assert json.loads(sent[1]["body"])["error"]["code"] == "server_stopping"


async def test_the_root_says_what_this_is(api: Running) -> None:
    answer = (await api.http.get("/")).json()
    assert answer["name"] == "ROSE"
    assert answer["base_url"] == f"{api.services.settings.url}/v1"
    document = (await api.http.get("/openapi.json")).json()
    assert "/v1/fine_tuning/jobs/{job_id}/cancel" in document["paths"]


async def test_ready_names_what_is_missing(api: Running) -> None:
    answer = await api.http.get("/ready")
    assert answer.status_code == 200
    report = answer.json()
    assert (report["status"], report["postgres"], report["migrations"]) == ("degraded", "connected", "applied")
    assert report["nats"] == "unknown"
    assert (report["trainers"], report["engines"]) == (0, 0)
    async with api.services.pool.acquire() as connection:
        await connection.execute("alter table rose.migrations rename to elsewhere")
    answer = await api.http.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["status"] == "not_ready"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8004"}, 200),
        ({"host": "[::1]:8004"}, 200),
        ({"host": "rebound.example:8004"}, 403),
        ({"host": "10.0.0.7"}, 403),
        ({"host": "]"}, 403),
        ({"host": "localhost:none"}, 200),
        ({"origin": "https://thorns.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:8004", "host": "localhost:8004"}, 200),
        ({"origin": "http://localhost:3000", "host": "localhost:8004"}, 403),
    ],
)
async def test_without_keys_foreign_pages_stay_outside(
    shared_api: Running, headers: dict[str, str], status: int
) -> None:
    answer = await shared_api.http.get("/v1/files", headers=headers)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert answer.json()["error"]["code"] == "foreign_page"


@pytest.mark.parametrize("host", ["localhost:99999", "localhost:none", "[::1]:x", "]", "a@b"])
async def test_a_broken_host_header_breaks_no_refusal(shared_api: Running, host: str) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("PUT", "/v1/files", 405)):
        answer = await shared_api.http.request(method, path, headers={"host": host})
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]


async def test_an_allowed_origin_and_the_public_name_may_call_without_keys(
    settings: Callable[..., Settings], pool: Pool
) -> None:
    given = settings(port=free_port(), cors_origins=["https://roses.example"])
    async with serving(given, pool) as api:
        answer = await api.http.get("/v1/files", headers={"origin": "https://roses.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://roses.example"
