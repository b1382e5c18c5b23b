"""Gemini: `contents` of parts, where the assistant is called `model` and calls have no ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rose.conversion.building import Calls, Message, chat, message, tools_of
from rose.conversion.rows import Context, Drop, kind

_ROLES = {"user": "user", "model": "assistant", "function": "user", "tool": "user", None: "user"}
_SYSTEM = ("systemInstruction", "system_instruction")
_IGNORED = frozenset({"thought", "thoughtSignature", "thought_signature"})


def from_gemini(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return the contents as messages; each call gets an id, and a result the id of the call of its name."""
    calls = Calls()
    messages: list[Message] = []
    for name in _SYSTEM:
        if row.get(name):
            messages.append(message("system", _system(row[name])))
    for index, content in enumerate(row["contents"]):
        messages += _messages(content, f"contents[{index}]", calls)
    for name in set(row) - {"contents", "tools", *_SYSTEM}:
        if row[name] is not None:
            context.note_left_out("column", name)
    return [chat(messages, _tools(row.get("tools")))]


def _system(value: Any) -> str:
    if isinstance(value, str):
        return value
    parts = _parts(value, "systemInstruction")
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise Drop("systemInstruction holds something else than text")
    return "".join(part["text"] for part in parts)


def _messages(content: Any, where: str, calls: Calls) -> list[Message]:
    parts = _parts(content, where)
    role = content.get("role")
    if not isinstance(role, str | None) or role not in _ROLES:
        raise Drop(f"{where}.role is {role!r}; expected user, model or function")
    if _ROLES[role] == "assistant":
        return [_answer(parts, where, calls)]
    messages: list[Message] = []
    for part in parts:
        result = _named(part, "functionResponse", "function_response")
        if result is not None:
            messages.append(calls.result(result.get("response", {}), call_id=result.get("id"), name=result.get("name")))
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += _text(part, where)
        else:
            messages.append(message("user", _text(part, where)))
    return messages


def _answer(parts: list[Mapping[str, Any]], where: str, calls: Calls) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    called: list[Message] = []
    for part in parts:
        call = _named(part, "functionCall", "function_call")
        if call is not None:
            called.append(calls.call(call.get("name"), call.get("args"), call.get("id")))
        elif part.get("thought") is True:
            thoughts.append(_text(part, where))
        elif called:
            raise Drop(f"{where} has text behind a function call; chat has no place for it")
        else:
            texts.append(_text(part, where))
    made = message("assistant", "".join(texts))
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    if called:
        made["tool_calls"] = called
    return made


def _parts(content: Any, where: str) -> list[Mapping[str, Any]]:
    parts = content.get("parts") if isinstance(content, dict) else None
    if isinstance(parts, dict):
        parts = [parts]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise Drop(f"{where} has no list of parts")
    return [{key: value for key, value in part.items() if value is not None} for part in parts]


def _text(part: Mapping[str, Any], where: str) -> str:
    if isinstance(part.get("text"), str):
        return part["text"]
    names = ", ".join(sorted(set(part) - _IGNORED)) or "nothing"
    raise Drop(f"{where} has a part with {names}; only text can be trained on")


def _named(part: Mapping[str, Any], *names: str) -> Mapping[str, Any] | None:
    found = next((part[name] for name in names if name in part), None)
    if found is not None and not isinstance(found, dict):
        raise Drop(f"{names[0]} is {kind(found)}; expected an object")
    return found


def _tools(value: Any) -> list[Message] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise Drop("tools is no list of objects")
    declared = [one.get("functionDeclarations", one.get("function_declarations")) for one in value]
    if not all(isinstance(one, list) for one in declared):
        raise Drop("tools holds something else than functionDeclarations; chat has functions only")
    return tools_of([_lower_types(function) for one in declared for function in one])


def _lower_types(value: Any) -> Any:
    """Return a schema whose types are written as JSON Schema has them: Gemini writes OBJECT and STRING."""
    if isinstance(value, list):
        return [_lower_types(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: inner.lower() if key == "type" and isinstance(inner, str) else _lower_types(inner)
        for key, inner in value.items()
    }
