"""Turns every failure of a request, ROSE's and the framework's, into OpenAI's error shape.

An internal failure is logged with its traceback and the request id; its answer never repeats the exception.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import (
    HTTPException,
    InternalServerException,
    MethodNotAllowedException,
    NotFoundException,
    SerializationException,
)

from rose.api.schema import ErrorAnswer, ErrorBody
from rose.errors import (
    InvalidRequest,
    MethodNotSupported,
    NotFound,
    RoseError,
    TooLarge,
    Unavailable,
    error_of,
)

logger = logging.getLogger(__name__)

AnyRequest = Request[Any, Any, Any]
CLIENT_LEFT = "client_left"
"""True in a request's state once its client has gone (rose/api/transport.py); Litestar says it only in prose."""


def path_of(request: AnyRequest) -> str:
    """Return the path that was asked for; the framework's URL cannot be made with a broken Host header."""
    return request.scope["path"]


def error_json(error: RoseError) -> bytes:
    """Return the JSON body for `error`; also what a stream sends when it breaks in the middle."""
    body = ErrorBody(message=str(error), type=error.kind, param=error.param, code=error.code, hint=error.hint)
    return msgspec.json.encode(ErrorAnswer(error=body))


def headers_of(error: RoseError) -> dict[str, str]:
    """Return the headers that say whether and when to ask again."""
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_seconds))
        if error.retry_after_seconds % 1:
            headers["retry-after-ms"] = str(math.ceil(error.retry_after_seconds * 1000))
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    return headers


def answer(error: RoseError) -> Response[bytes]:
    """Return the response for `error`."""
    return Response(
        error_json(error), status_code=error.status, media_type="application/json", headers=headers_of(error)
    )


def handle_rose_error(request: AnyRequest, error: RoseError) -> Response[bytes]:
    """Answer an error that ROSE raised on purpose."""
    if error.status == RoseError.status:
        logger.error("request %s failed: %s", path_of(request), error, exc_info=error)
    return answer(error)


def handle_framework_error(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Answer what Litestar itself refuses: unknown route, method, size, parameters."""
    if isinstance(error, InternalServerException):
        if request.scope["state"].get(CLIENT_LEFT):
            logger.info("the client of %s %s left before its request was complete", request.method, path_of(request))
            return Response(b"", status_code=499, media_type="application/json")
        return handle_unexpected(request, error)
    response = answer(_translate(request, error))
    for name, value in (error.headers or {}).items():
        response.set_header(name, value)
    return response


def handle_unexpected(request: AnyRequest, error: Exception) -> Response[bytes]:
    """Answer a failure that nobody foresaw: the log has it, the client gets the request id."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        logger.warning("%s %s: the database does not answer: %r", request.method, path_of(request), error)
        return answer(
            Unavailable("The database does not answer.", code="database_unavailable", hint="Try again in a moment.")
        )
    request_id = request.scope["state"].get("request_id", "")
    logger.error("request %s (%s %s) failed", request_id, request.method, path_of(request), exc_info=error)
    return answer(RoseError(f"The server had an error; its log names the cause under request {request_id}."))


def _translate(request: AnyRequest, error: HTTPException) -> RoseError:
    if isinstance(error, NotFoundException):
        return NotFound(
            f"Unknown request URL: {request.method} {path_of(request)}.",
            code="unknown_url",
            hint="The API lives under /v1; GET / says what there is.",
        )
    if isinstance(error, MethodNotAllowedException):
        return MethodNotSupported(f"{path_of(request)} does not take {request.method}.")
    if error.status_code == TooLarge.status:
        return TooLarge("The request body is too large.")
    if isinstance(error, SerializationException):
        return InvalidRequest("The request body is not valid JSON.", code="invalid_json")
    kind = error_of(error.status_code, None)
    details: Any = error.extra
    if isinstance(details, list) and details and isinstance(details[0], dict):
        first: dict[str, Any] = details[0]
        return kind(str(first.get("message", error.detail)), param=first.get("key"))
    return kind(error.detail)


EXCEPTION_HANDLERS: Any = {
    RoseError: handle_rose_error,
    HTTPException: handle_framework_error,
    Exception: handle_unexpected,
}
