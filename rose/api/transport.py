"""What every answer carries, whatever the route: a request id, the time it took, the version of the API.

Also the answer of those who are still waiting for one when the server's time to end is over.
"""

from __future__ import annotations

import logging
import re
import time

import anyio
from litestar.types import ASGIApp, Message, Receive, ReceiveMessage, Scope, Send

from rose.api.errors import CLIENT_LEFT, error_json, headers_of
from rose.api.limits import rate_limit_headers
from rose.errors import Unavailable
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
        begun = False

        async def receive_or_note() -> ReceiveMessage:
            message = await receive()
            if message["type"] == "http.disconnect":
                scope["state"][CLIENT_LEFT] = True
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                milliseconds = round((time.monotonic() - started) * 1000)
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(milliseconds).encode()),
                    (b"openai-version", API_VERSION.encode()),
                    *rate_limit_headers(scope),
                ]
                logger.debug("%s %s %s %s ms", scope["method"], scope["path"], message["status"], milliseconds)
                begun = True
            await send(message)

        try:
            await app(scope, receive_or_note, send_with_headers)
        except anyio.get_cancelled_exc_class():
            if begun:
                raise
            logger.warning("%s %s: given up, the server ends", scope["method"], scope["path"])
            await _send_farewell(send_with_headers)

    return envelope


async def _send_farewell(send: Send) -> None:
    error = Unavailable("The server is being stopped.", code="server_stopping", hint="Try again in a moment.")
    headers = [(name.encode(), value.encode()) for name, value in headers_of(error).items()]
    headers.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error_json(error), "more_body": False})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _USABLE_ID.match(text):
                return text
    return new_id("req_")
