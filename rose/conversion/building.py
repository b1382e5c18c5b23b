"""Builds chat messages: texts, tool calls with ids that match their results, and tools in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from rose.conversion.rows import Drop, kind

Message = dict[str, Any]


def message(role: str, content: str) -> Message:
    """Return a message of a text."""
    return {"role": role, "content": content}


def encoded(value: Any) -> str:
    """Return a value as JSON text. Raises: Drop when JSON cannot hold it."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise Drop(f"holds a value that JSON cannot: {problem}") from None


def decoded(text: str) -> Any:
    """Return what a JSON text holds, or the text itself when it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


class Calls:
    """Gives each tool call of one conversation an id, and each result the id of the call that it answers."""

    def __init__(self) -> None:
        self._made = 0
        self._open: list[tuple[str, str]] = []

    def call(self, name: Any, arguments: Any, call_id: Any = None) -> Message:
        """Return a tool call; arguments are an object or its JSON text."""
        if not isinstance(name, str) or not name:
            raise Drop("a tool call has no name")
        if arguments is None or arguments == "":
            arguments = {}
        text = arguments if isinstance(arguments, str) else encoded(arguments)
        if not isinstance(decoded(text), dict):
            raise Drop(f"the arguments of the call of {name} are no JSON object")
        self._made += 1
        given = call_id if isinstance(call_id, str) and call_id else f"call_{self._made}"
        self._open.append((given, name))
        return {"id": given, "type": "function", "function": {"name": name, "arguments": text}}

    def result(self, content: Any, *, call_id: Any = None, name: Any = None) -> Message:
        """Return a tool's result: of the call with this id, else the first open one of this name, else the first."""
        text = content if isinstance(content, str) else encoded(content)
        found = self._answered(call_id, name)
        return {"role": "tool", "tool_call_id": found, "content": text}

    def _answered(self, call_id: Any, name: Any) -> str:
        by_id = [one for one in self._open if one[0] == call_id]
        by_name = [one for one in self._open if one[1] == name]
        choice = by_id or ([] if isinstance(call_id, str) and call_id else by_name or self._open)
        if not choice:
            raise Drop("has a tool's result without the call that it answers")
        found = choice[0]
        self._open.remove(found)
        return found[0]


def tools_of(value: Any) -> list[Message] | None:
    """Return tools in OpenAI's form, of that form, bare functions, or Anthropic's; a JSON text is decoded."""
    if isinstance(value, str):
        value = decoded(value) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise Drop(f"tools is {kind(value)}; expected a list")
    return [_tool(one) for one in value]


def _tool(value: Any) -> Message:
    if isinstance(value, str):
        value = decoded(value)
    if not isinstance(value, dict):
        raise Drop(f"a tool is {kind(value)}; expected an object")
    if isinstance(value.get("function"), dict):
        return {"type": "function", **{key: inner for key, inner in value.items() if inner is not None}}
    if not isinstance(value.get("name"), str):
        raise Drop("a tool has no name")
    parameters = value.get("input_schema", value.get("parameters"))
    function = {"name": value["name"]}
    if value.get("description") is not None:
        function["description"] = value["description"]
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def chat(messages: list[Message], tools: list[Message] | None = None) -> dict[str, Any]:
    """Return a line of chat data."""
    return {"messages": messages, **({"tools": tools} if tools else {})}


def system_text(row: Mapping[str, Any], name: str = "system") -> list[Message]:
    """Return the system message of a row's column, or none when it is empty."""
    value = row.get(name)
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise Drop(f"{name} is {kind(value)}; expected a text")
    return [message("system", value)]
