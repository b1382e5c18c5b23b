"""Decodes cells that hold a list or an object as text: tables have nothing else, and some tools write them everywhere.

A question or an answer may be JSON itself and has to stay a text, so a cell is decoded only where its column says so,
and what is inside are messages.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

import msgspec

from rose.conversion.rows import Row

_MESSAGES = ("messages", "conversations", "conversation", "contents")
_PAIRS = (("prompt", "completion"), ("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
_OTHERS = {"tools": list, "history": list, "systemInstruction": dict}
_WITH_NEIGHBOUR = {"input": "preferred_output", "body": "custom_id", "response": "custom_id", "error": "custom_id"}
_STARTS = re.compile(r"\s*[\[{]")
_PRINTED_BY_PYTHON = re.compile(r"\s*\[\s*\{\s*['\"]")
_MOST_PRINTED = 1 << 20
"""Longest text that is read as Python prints lists; its syntax tree takes a hundred times the room."""

_SPEAKERS = frozenset({"system", "developer", "user", "assistant", "tool", "function", "model"})


def with_decoded_cells(row: Row) -> Row:
    """Return the row with message lists and objects in place of their texts."""
    if row.value is None or not any(isinstance(cell, str) and _STARTS.match(cell) for cell in row.value.values()):
        return row
    value = dict(row.value)
    for name in _MESSAGES:
        value[name] = _messages(value.get(name), strict=False) or value.get(name)
    for pair in _PAIRS:
        found = [_messages(value.get(name), strict=True) for name in pair]
        if all(found):
            value.update(zip(pair, found, strict=True))
    for name, kind in _OTHERS.items():
        if isinstance(value.get(name), str) and isinstance(found := _parsed(value[name]), kind):
            value[name] = found
    for name, neighbour in _WITH_NEIGHBOUR.items():
        if neighbour in value and isinstance(value.get(name), str) and isinstance(found := _parsed(value[name]), dict):
            value[name] = found
    return Row(place=row.place, value={name: cell for name, cell in value.items() if name in row.value})


def _messages(cell: Any, *, strict: bool) -> list[Any] | None:
    """Return the messages that a text holds; strictly: of known speakers only, as an answer may have the key `role`."""
    found = _parsed(cell) if isinstance(cell, str) else None
    if not isinstance(found, list) or not found:
        return None
    return found if all(_is_message(one, strict) for one in found) else None


def _is_message(value: Any, strict: bool) -> bool:
    if not isinstance(value, dict):
        return False
    if not strict:
        return bool({"role", "from", "parts"} & set(value))
    return ("from" in value and "value" in value) or (
        isinstance(value.get("role"), str)
        and value["role"] in _SPEAKERS
        and bool({"content", "tool_calls"} & set(value))
    )


def _parsed(text: str) -> Any:
    if not _STARTS.match(text):
        return None
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    if len(text) > _MOST_PRINTED or not _PRINTED_BY_PYTHON.match(text):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
