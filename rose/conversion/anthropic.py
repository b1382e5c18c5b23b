"""Anthropic messages: a system text beside them, and contents of blocks; tools' results sit in the user's turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rose.conversion.building import Calls, Message, chat, message, tools_of
from rose.conversion.rows import Context, Drop, kind, text_of


def from_anthropic(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return the conversation with the system text in front, calls as tool_calls and results as tool messages."""
    given = row.get("messages")
    if not isinstance(given, list):
        raise Drop(f"messages is {kind(given)}; expected a list of messages")
    calls = Calls()
    messages: list[Message] = []
    if row.get("system"):
        messages.append(message("system", _joined(row["system"], "system")))
    for index, one in enumerate(given):
        messages += _messages(one, f"messages[{index}]", calls, context)
    for name in set(row) - {"messages", "system", "tools"}:
        if row[name] is not None:
            context.note_left_out("column", name)
    return [chat(messages, tools_of(row.get("tools")))]


def _messages(value: Any, where: str, calls: Calls, context: Context) -> list[Message]:
    role = value.get("role") if isinstance(value, dict) else None
    if role not in ("user", "assistant"):
        raise Drop(f"{where} is no message of a user or an assistant")
    content = value.get("content")
    if isinstance(content, str):
        return [message(role, content)]
    blocks = _blocks(content, where)
    return _user(blocks, where, calls) if role == "user" else [_assistant(blocks, where, calls, context)]


def _user(blocks: list[Mapping[str, Any]], where: str, calls: Calls) -> list[Message]:
    """Return what a user's turn holds in its order: results of tools as tool messages, texts between them as one."""
    messages: list[Message] = []
    for block in blocks:
        if block["type"] == "tool_result":
            text = _joined(block.get("content") or "", f"{where} (tool_result)")
            messages.append(calls.result(text, call_id=block.get("tool_use_id")))
        elif block["type"] != "text":
            raise _no_text(block, where)
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n\n" + text_of(block.get("text"), where)
        else:
            messages.append(message("user", text_of(block.get("text"), where)))
    return messages


def _assistant(blocks: list[Mapping[str, Any]], where: str, calls: Calls, context: Context) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    called: list[Message] = []
    for block in blocks:
        match block["type"]:
            case "text":
                if called:
                    raise Drop(f"{where} has text behind a tool call; chat has no place for it")
                texts.append(text_of(block.get("text"), where))
            case "tool_use":
                called.append(calls.call(block.get("name"), block.get("input"), block.get("id")))
            case "thinking":
                thoughts.append(text_of(block.get("thinking"), where))
            case "redacted_thinking":
                context.note("encrypted thought (redacted_thinking) left out")
            case _:
                raise _no_text(block, where)
    made = message("assistant", "".join(texts))
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    if called:
        made["tool_calls"] = called
    elif not texts:
        raise Drop(f"{where} has neither text nor a tool call")
    return made


def _blocks(content: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not content:
        raise Drop(f"{where}.content is {'empty' if content == [] else kind(content)}; expected a text or blocks")
    for block in content:
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise Drop(f"{where}.content holds a block without a type")
    return content


def _joined(value: Any, where: str) -> str:
    """Return a text, or the texts of blocks."""
    if isinstance(value, str):
        return value
    blocks = _blocks(value, where)
    for block in blocks:
        if block["type"] != "text":
            raise _no_text(block, where)
    return "\n\n".join(text_of(block.get("text"), where) for block in blocks)


def _no_text(block: Mapping[str, Any], where: str) -> Drop:
    return Drop(f"{where} has a block of type {block['type']!r}; only text can be trained on")
