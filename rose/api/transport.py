"""What every answer carries, whatever the route: a request id, the time it took, the version of the API."""

from __future__ import annotations

import logging
import re
import time

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from rose.ids import new_id

API_VERSION = "2020-10-01"
"""The version header that OpenAI's service sends; the SDKs only show it."""
_USABLE_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")

logger = logging.getLogger("rose.access")


def request_envelope(app: ASGIApp) -> ASGIApp:
    """Wrap `app`, so that also answers of unknown routes carry the headers. A usable `x-request-id` is kept."""

    async def envelope(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                milliseconds = round((time.monotonic() - started) * 1000)
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(milliseconds).encode()),
                    (b"openai-version", API_VERSION.encode()),
                ]
                logger.debug("%s %s %s %s ms", scope["method"], scope["path"], message["status"], milliseconds)
            await send(message)

        await app(scope, receive, send_with_headers)

    return envelope


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _USABLE_ID.match(text):
                return text
    return new_id("req_")
