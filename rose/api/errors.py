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
    Conflict,
    InvalidRequest,
    LimitReached,
    MethodNotSupported,
    NoSpace,
    NotFound,
    RoseError,
    TooLarge,
    Unavailable,
)
from rose.inference.generation import EngineBusy

logger = logging.getLogger(__name__)

AnyRequest = Request[Any, Any, Any]
RETRY_AFTER_SECONDS = 2


class SlowRequest(InvalidRequest):
    """The rest of the request did not come in time."""

    status = 408
    default_code = "request_timeout"


def path_of(request: AnyRequest) -> str:
    """Return the path that was asked for; the framework's URL cannot be made with a broken Host header."""
    return request.scope["path"]


def error_json(error: RoseError) -> bytes:
    """Return the JSON body for `error`; also what a stream sends when it breaks in the middle."""
    body = ErrorBody(message=str(error), type=error.kind, param=error.param, code=error.code, hint=error.hint)
    return msgspec.json.encode(ErrorAnswer(error=body))


def answer(error: RoseError) -> Response[bytes]:
    """Return the response for `error`.

    A lost race answers 503, not 409: the SDK would repeat a 409 silently. What a retry cannot mend says so.
    """
    headers: dict[str, str] = {}
    status = error.status
    if isinstance(error, Conflict):
        status = Unavailable.status
    if status == Unavailable.status:
        wait = error.retry_after_seconds if isinstance(error, EngineBusy) else RETRY_AFTER_SECONDS
        headers["retry-after"] = str(math.ceil(wait))
    if isinstance(error, NoSpace):
        headers["x-should-retry"] = "false"
    if isinstance(error, LimitReached):
        if error.retry_after_seconds is None:
            headers["x-should-retry"] = "false"
        else:
            headers["retry-after"] = str(math.ceil(error.retry_after_seconds))
            headers["retry-after-ms"] = str(math.ceil(error.retry_after_seconds * 1000))
    return Response(error_json(error), status_code=status, media_type="application/json", headers=headers)


def handle_rose_error(request: AnyRequest, error: RoseError) -> Response[bytes]:
    """Answer an error that ROSE raised on purpose."""
    if error.status == 500 and not isinstance(error, Conflict):
        logger.error("request %s failed: %s", path_of(request), error, exc_info=error)
    return answer(error)


def handle_framework_error(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Answer what Litestar itself refuses: unknown route, method, size, parameters."""
    if isinstance(error, InternalServerException):
        if "disconnected" in error.detail:
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
    if error.status_code == 413:
        return TooLarge("The request body is too large.")
    if isinstance(error, SerializationException):
        return InvalidRequest("The request body is not valid JSON.", code="invalid_json")
    wrapped = InvalidRequest(error.detail)
    details: Any = error.extra
    if isinstance(details, list) and details and isinstance(details[0], dict):
        first: dict[str, Any] = details[0]
        wrapped = InvalidRequest(str(first.get("message", error.detail)), param=first.get("key"))
    if 400 <= error.status_code < 500:
        wrapped.status = error.status_code
    return wrapped


EXCEPTION_HANDLERS: Any = {
    RoseError: handle_rose_error,
    HTTPException: handle_framework_error,
    Exception: handle_unexpected,
}
