"""Refuses keys of a body that nobody reads, and says what was meant: a near key, or the place where the key belongs.

The description of the body that `/openapi.json` shows decides. Objects that it leaves open take any key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from litestar.openapi.spec import Reference, Schema

from rose.api.body import MAX_KEY_SHOWN
from rose.errors import InvalidRequest


def check_keys(body: Mapping[str, Any], schema: Schema, elsewhere: Mapping[str, str] | None = None) -> None:
    """Check the keys of a body and of all closed objects in it; keys whose value is null count as absent.

    `elsewhere` says what keys are called here that go by quite another name in other programs.

    Raises: InvalidRequest naming the first unknown key, and what it is near to.
    """
    places = list(_places(schema, ""))
    for path, key, allowed in _unknown(body, schema, ""):
        shown = f"{path}{key[:MAX_KEY_SHOWN]}"
        near = _meant((elsewhere or {}).get(key.casefold(), key), path, places)
        raise InvalidRequest(
            f"Unknown parameter: {shown}. "
            + (f"Did you mean {near}?" if near else f"Allowed are {', '.join(f'{path}{name}' for name in allowed)}."),
            code="unknown_parameter",
            param=shown,
        )


def _unknown(value: Any, schema: Schema, path: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the path of an object, a key of it that is unknown, and those that are known, from the outside in."""
    schema = _inner(schema)
    if isinstance(value, list) and isinstance(schema.items, Schema):
        for index, item in enumerate(value):
            yield from _unknown(item, schema.items, f"{path[:-1]}[{index}].")
    if not isinstance(value, Mapping):
        return
    known = _properties(schema)
    if schema.additional_properties is not None:
        for key, inner in value.items():
            if key not in known and inner is not None:
                yield path, key, list(known)
    for key, inner in value.items():
        if key in known:
            yield from _unknown(inner, known[key], f"{path}{key}.")


def _places(schema: Schema, path: str) -> Iterator[tuple[str, str]]:
    """Yield each key that the description has, with its path."""
    schema = _inner(schema)
    if isinstance(schema.items, Schema):
        yield from _places(schema.items, f"{path[:-1]}[0].")
    for key, inner in _properties(schema).items():
        yield key, f"{path}{key}"
        yield from _places(inner, f"{path}{key}.")


def _meant(key: str, path: str, places: list[tuple[str, str]]) -> str | None:
    """Return the place of the most similar key: in the same object first, then within it, then the outermost."""
    key = key.casefold()[:MAX_KEY_SHOWN]
    names = [name for name, _ in places]
    near = [name for name in names if name == key]
    near += [name for name in names if f"_{name}".endswith(f"_{key}") or key.endswith(f"_{name}")]
    near += difflib.get_close_matches(key, names, n=1, cutoff=0.65)
    found = [place for name, place in places if name in near[:1]]
    return min(found, key=lambda place: (not place.startswith(path), place.count("."), place), default=None)


def _inner(schema: Schema) -> Schema:
    """Return what is described beside null."""
    choices = [one for one in schema.one_of or () if isinstance(one, Schema)]
    return choices[0] if choices else schema


def _properties(schema: Schema) -> dict[str, Schema]:
    return {key: inner for key, inner in (schema.properties or {}).items() if not isinstance(inner, Reference)}
