"""Reads requests: `read_body` a JSON body, `read_query` what stands in the address, each as its struct of schema.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import anyio
import anyio.to_thread

from rose.api.errors import AnyRequest
from rose.decoding import check_values, convert
from rose.errors import InvalidRequest, SlowRequest

Body = TypeVar("Body")

BODY_SECONDS = 60.0
"""Longest time that a JSON body may take to arrive."""
LARGE_BODY_BYTES = 1 << 18
"""A larger body is read in a thread, so that the others' streams do not stand still meanwhile."""


async def read_body(
    request: AnyRequest,
    kind: type[Body],
    *,
    nul_allowed: bool = False,
    empty_allowed: bool = False,
    elsewhere: Mapping[str, str] | None = None,
) -> Body:
    """Return the request's JSON object as `kind`; with `empty_allowed` no body at all is an empty object.

    `elsewhere`: see `rose.decoding.convert`.

    Raises: InvalidRequest when the body is no JSON object, holds what the log cannot (`check_values`), or does not fit,
    with the field's name; SlowRequest.
    """
    try:
        with anyio.fail_after(BODY_SECONDS):
            body = await request.body()
    except TimeoutError:
        raise SlowRequest() from None
    if empty_allowed and not body:
        body = b"{}"
    if len(body) < LARGE_BODY_BYTES:
        return _decoded(body, kind, nul_allowed, elsewhere)
    return await anyio.to_thread.run_sync(_decoded, body, kind, nul_allowed, elsewhere)


def _decoded(body: bytes, kind: type[Body], nul_allowed: bool, elsewhere: Mapping[str, str] | None) -> Body:
    value = _object_in(body)
    check_values(value, nul_allowed=nul_allowed)
    return convert(value, kind, elsewhere=elsewhere)


def read_query(request: AnyRequest, kind: type[Body]) -> Body:
    """Return the parameters of the address as `kind`; an empty one counts as absent, and of several the last counts.

    Raises: InvalidRequest naming the parameter.
    """
    given = {name: value for name, value in request.query_params.items() if value != ""}
    check_values(given)
    return convert(given, kind, texts=True)


def _object_in(body: bytes) -> dict[str, Any]:
    """Return the JSON object; unlike msgspec the standard library says where a mistake is by line and column."""
    if not body:
        raise InvalidRequest("The request body is empty; a JSON object is needed.", code="invalid_json")
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from None
    except UnicodeDecodeError as error:
        message = f"The request body is not valid UTF-8 at byte {error.start}."
        raise InvalidRequest(message, code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The request body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            code="invalid_json",
        ) from None
    except ValueError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
