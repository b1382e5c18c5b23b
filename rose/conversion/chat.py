"""OpenAI's own formats and those that are nearly the same: chat passes through, without what is null or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rose.conversion.building import Calls, Message, chat, tools_of
from rose.conversion.rows import Context, Drop, is_media, kind, refuse_media

_ROW_KEYS = frozenset({"messages", "tools", "functions", "parallel_tool_calls"})
_MESSAGE_KEYS = frozenset({"role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call"})
_KEPT_KEYS = _MESSAGE_KEYS | {"refusal", "reasoning_content", "reasoning"}


def from_chat(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return a line of chat data as it is."""
    refuse_media(row)
    line = _noted(row, _ROW_KEYS, "column", context)
    line["messages"] = messages_of(row.get("messages"), "messages", context)
    if row.get("tools") is not None:
        line.pop("tools")
        line = {**line, **chat(line["messages"], tools_of(row["tools"]))}
    return [line]


def from_dpo(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return a preference pair as it is, or the preferred answer behind its question."""
    given = row["input"]
    asked = messages_of(given.get("messages"), "input.messages", context) if isinstance(given, dict) else None
    if asked is None:
        raise Drop(f"input is {kind(given)}; expected an object with messages")
    preferred, other = (
        messages_of(row.get(name, row.get(name.replace("output", "completion"))), name, context)
        for name in ("preferred_output", "non_preferred_output")
    )
    return [preference_line(asked, preferred, other, tools_of(given.get("tools")), context)]


def preference_line(
    asked: list[Message], preferred: list[Message], other: list[Message], tools: list[Message] | None, context: Context
) -> dict[str, Any]:
    """Return a line of preference data, or of chat with the preferred answer where chat was asked for."""
    if not asked:
        raise Drop("has no question before the two answers")
    for name, answer in (("preferred", preferred), ("other", other)):
        if len(answer) != 1 or answer[0].get("role") != "assistant":
            raise Drop(f"the {name} side is not exactly one answer of the assistant")
        if not answer[0].get("content") and not answer[0].get("tool_calls"):
            raise Drop(f"the {name} answer is empty")
    if context.prefer:
        return chat([*asked, *preferred], tools)
    if preferred == other:
        raise Drop("both answers are the same")
    return {"input": chat(asked, tools), "preferred_output": preferred, "non_preferred_output": other}


def messages_of(value: Any, where: str, context: Context) -> list[Message]:
    """Return a list of messages without null and unknown keys."""
    if not isinstance(value, list):
        raise Drop(f"{where} is {kind(value)}; expected a list of messages")
    calls = Calls()
    return [_message(one, f"{where}[{index}]", calls, context) for index, one in enumerate(value)]


def _message(value: Any, where: str, calls: Calls, context: Context) -> Message:
    if not isinstance(value, dict):
        raise Drop(f"{where} is {kind(value)}; expected an object with role and content")
    refuse_media(value)
    message = _noted(value, _KEPT_KEYS, "message key", context)
    parts = message.get("content")
    if isinstance(parts, list):
        message["content"] = [_part(part, f"{where}.content[{at}]") for at, part in enumerate(parts)]
    if message.get("tool_calls") == []:
        message.pop("tool_calls")
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_call(one, calls, where, context) for one in message["tool_calls"]]
    if message.get("role") == "tool" and "tool_call_id" not in message:
        return {**message, **calls.result(message.get("content", ""), name=message.get("name"))}
    return message


def _part(part: Any, where: str) -> Any:
    if not isinstance(part, dict):
        return part
    if is_media(part.get("type")) or part.get("type") == "file":
        raise Drop(f"{where} is of type {part['type']!r}; only text can be trained on")
    return {key: inner for key, inner in part.items() if inner is not None}


def _call(value: Any, calls: Calls, where: str, context: Context) -> Message:
    if not isinstance(value, dict):
        raise Drop(f"{where}.tool_calls holds {kind(value)}; expected objects")
    function = value["function"] if isinstance(value.get("function"), dict) else value
    arguments = function.get("arguments")
    if isinstance(arguments, dict) and None in arguments.values():
        context.note("null kept in arguments (an absent key of a Parquet struct looks the same)")
    return calls.call(function.get("name"), arguments, value.get("id"))


def _noted(value: Mapping[str, Any], known: frozenset[str], what: str, context: Context) -> dict[str, Any]:
    """Return the known keys that are not null; note the others that hold something."""
    for name in set(value) - known:
        if value[name] not in (None, [], {}, "", False):
            context.note_left_out(what, name)
    return {key: inner for key, inner in value.items() if key in known and inner is not None}
