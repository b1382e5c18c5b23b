"""Reads request bodies and query parameters by hand, so that every refusal names the field it is about."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import msgspec

from rose.api.errors import AnyRequest, SlowRequest
from rose.errors import InvalidRequest

_SURROGATE = re.compile("[\ud800-\udfff]")
_LOWEST, _HIGHEST = -(1 << 63), (1 << 64) - 1
"""Numbers that every reader of JSON can hold; with them infinity, which `1e999` is read as, is refused, too."""
MAX_KEY_SHOWN = 80
MAX_DEPTH = 100
"""Values in values that a body may hold; templates and other readers of it would fail where it is much deeper."""
BODY_SECONDS = 60.0
"""Longest time that a JSON body may take to arrive."""
LARGE_BODY_BYTES = 1 << 18
"""A larger body is read in a thread, so that the others' streams do not stand still meanwhile."""


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which page of a list is wanted: at most `limit` entries behind the entry `after`."""

    limit: int
    after: str | None


async def read_object(request: AnyRequest, *, nul_allowed: bool = False) -> dict[str, Any]:
    """Return the request's JSON object.

    Raises: InvalidRequest when the body is no JSON object, or holds what the log cannot: see `check_values`.
    """
    try:
        with anyio.fail_after(BODY_SECONDS):
            body = await request.body()
    except TimeoutError:
        raise SlowRequest() from None
    if len(body) < LARGE_BODY_BYTES:
        return _object_in(body, nul_allowed)
    return await anyio.to_thread.run_sync(_object_in, body, nul_allowed)


def _object_in(body: bytes, nul_allowed: bool) -> dict[str, Any]:
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
    check_values(value, nul_allowed=nul_allowed)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def check_values(value: Any, path: str = "", *, nul_allowed: bool = False) -> None:
    """Check the texts and numbers in a JSON value, in memory that does not grow with its size.

    Raises: InvalidRequest naming the field whose key or text has a lone surrogate or (unless `nul_allowed`) a NUL,
    whose number does not fit into 64 bits, or that is nested too deeply.
    """
    place: list[str | int] = []
    inside: list[Iterator[tuple[str | int, Any]]] = [iter([(path, value)])]
    while inside:
        for name, item in inside[-1]:
            problem = _problem(name, nul_allowed) or _problem(item, nul_allowed)
            if problem is not None:
                raise _unusable(problem, [*place, name])
            if isinstance(item, (dict, list)):
                if len(inside) > MAX_DEPTH:
                    raise _unusable(("is nested too deeply", "invalid_json"), place[:2])
                inside.append(iter(item.items()) if isinstance(item, dict) else enumerate(item))
                place.append(name)
                break
        else:
            inside.pop()
            del place[-1:]


def _problem(value: Any, nul_allowed: bool) -> tuple[str, str] | None:
    """Return what is wrong with a key, a text or a number, and the code for it."""
    if isinstance(value, str):
        if "\0" in value and not nul_allowed:
            return "contains a NUL character", "invalid_text"
        if _SURROGATE.search(value):
            return "contains half of a surrogate pair, which is no character", "invalid_text"
    elif isinstance(value, (int, float)) and not _LOWEST <= value <= _HIGHEST:
        return "is a number out of range", "invalid_value"
    return None


def _unusable(problem: tuple[str, str], place: list[str | int]) -> InvalidRequest:
    """Return the error about the value at `place`: names of fields and indices of lists, from the outside in."""
    where = ""
    for name in place:
        if isinstance(name, int):
            where += f"[{name}]"
            continue
        shown = name[:MAX_KEY_SHOWN].encode("utf-8", "replace").decode().replace("\0", "?")
        where = f"{where}.{shown}" if where else shown
    what, code = problem
    return InvalidRequest(f"{where or 'The text'} {what}.", code=code, param=where or None)


def query_page(request: AnyRequest, *, default: int, maximum: int, clamp: bool = False) -> PageRequest:
    """Return the paging parameters; with `clamp` a larger limit counts as `maximum`.

    Raises: InvalidRequest naming `limit` when it is no number from 0 to `maximum`.
    """
    text = request.query_params.get("limit")
    limit = default
    if text not in (None, ""):
        limit = int(text[:20]) if text.isascii() and text.isdigit() else -1
        if clamp:
            limit = min(limit, maximum)
        if not 0 <= limit <= maximum:
            raise InvalidRequest(
                f"limit is {text[:40]!r}; it must be a whole number from 0 to {maximum}.",
                code="invalid_value",
                param="limit",
            )
    return PageRequest(limit=limit, after=request.query_params.get("after") or None)


def query_choice(request: AnyRequest, name: str, choices: tuple[str, ...], default: str) -> str:
    """Return a parameter that takes one of `choices`. Raises: InvalidRequest naming it."""
    value = request.query_params.get(name) or default
    if value not in choices:
        raise InvalidRequest(
            f"{name} is {value[:40]!r}; it must be {' or '.join(choices)}.", code="invalid_value", param=name
        )
    return value


def require_text(body: dict[str, Any], name: str, *, maximum: int = 512) -> str:
    """Return a required, non-empty text. Raises: InvalidRequest naming it."""
    value = optional_text(body, name, maximum=maximum)
    if value is None:
        raise InvalidRequest(f"Missing required parameter: {name}.", code="missing_required_parameter", param=name)
    return value


def optional_text(body: dict[str, Any], name: str, *, maximum: int = 512) -> str | None:
    """Return a text, or None when it is absent or null. Raises: InvalidRequest naming it."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        wrong_type(name, "a string", value)
    if not 0 < len(value) <= maximum:
        raise InvalidRequest(
            f"{name} must have 1 to {maximum} characters; it has {len(value)}.", code="invalid_value", param=name
        )
    return value


def optional_object(body: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return an object, or None when it is absent or null. Raises: InvalidRequest naming it."""
    value = body.get(name.rpartition(".")[2])
    if value is not None and not isinstance(value, dict):
        wrong_type(name, "an object", value)
    return value


def wrong_type(name: str, expected: str, value: Any) -> NoReturn:
    """Raises: InvalidRequest saying what `name` must be and what it is."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object", list: "a list"}
    given = "null" if value is None else names.get(type(value), type(value).__name__)
    raise InvalidRequest(f"{name} must be {expected}; it is {given}.", code="invalid_type", param=name)
