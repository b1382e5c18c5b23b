"""A client that leaves in the middle of its request is no failure of the server; a failure is, whatever its words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from litestar import Litestar, Request, post
from litestar.exceptions import InternalServerException

from rose.api.errors import EXCEPTION_HANDLERS
from rose.api.transport import request_envelope

pytestmark = pytest.mark.anyio

BEGUN = {"type": "http.request", "body": b'{"model": ', "more_body": True}
LEFT = {"type": "http.disconnect"}


@post("/read")
async def read(request: Request[Any, Any, Any]) -> None:
    await request.body()


@post("/fail")
async def fail(request: Request[Any, Any, Any]) -> None:
    raise InternalServerException("the replica was disconnected")


async def status_of(path: str, *received: dict[str, Any]) -> int:
    """Return the status of a request whose client sends this and no more."""
    app = request_envelope(
        Litestar([read, fail], exception_handlers=EXCEPTION_HANDLERS, openapi_config=None, logging_config=None)
    )
    arriving, sent = list(received), list[Any]()
    scope: Any = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": None,
        "root_path": "",
    }

    async def receive() -> Any:
        return arriving.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"]


async def test_a_client_that_leaves_is_noted_and_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rose.api.errors"):
        assert await status_of("/read", BEGUN, LEFT) == 499
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "left before its request was complete" in caplog.text


async def test_a_failure_that_speaks_of_disconnection_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    assert await status_of("/fail", BEGUN) == 500
    assert "left before" not in caplog.text
    assert [record.levelname for record in caplog.records] == ["ERROR"]
