"""Bodies of OpenAI's /v1/responses: a request's input and a response's output items as chat messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rose.conversion.building import Calls, Message, message
from rose.conversion.rows import Drop, kind

_TEXTS = ("input_text", "output_text", "text")


def question_of_response(body: Mapping[str, Any]) -> list[Message]:
    """Return what was asked."""
    if body.get("previous_response_id") or body.get("conversation"):
        raise Drop("goes on with an earlier response that is not in the request")
    messages = [message("system", body["instructions"])] if isinstance(body.get("instructions"), str) else []
    given = body.get("input")
    if isinstance(given, str):
        return [*messages, message("user", given)]
    if not isinstance(given, list):
        raise Drop(f"body.input is {kind(given)}; expected a text or a list")
    return [*messages, *_messages(given, "input")]


def answer_of_response(body: Mapping[str, Any]) -> Message:
    """Return what was answered, as one message."""
    if body.get("status") not in (None, "completed"):
        raise Drop(f"the response's status is {body['status']!r}")
    output = body.get("output")
    if not isinstance(output, list):
        raise Drop("the response has no output")
    answers = _messages(output, "output")
    if not answers or any(one["role"] != "assistant" for one in answers):
        raise Drop("the response has no answer of the assistant alone")
    made = message("assistant", "".join(one["content"] for one in answers))
    called = [call for one in answers for call in one.get("tool_calls", [])]
    return {**made, "tool_calls": called} if called else made


def _messages(items: list[Any], where: str) -> list[Message]:
    calls = Calls()
    messages: list[Message] = []
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise Drop(f"{where}[{index}] is {kind(item)}; expected an object")
        match item.get("type", "message"):
            case "message":
                messages.append(message(_role(item, where), _content(item.get("content"), f"{where}[{index}]")))
            case "function_call":
                call = calls.call(item.get("name"), item.get("arguments"), item.get("call_id"))
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append(message("assistant", ""))
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append(calls.result(item.get("output"), call_id=item.get("call_id")))
            case "reasoning":
                pass  # encrypted, or a summary that another model wrote: not the thought itself
            case other:
                raise Drop(f"{where}[{index}] is of type {other!r}; chat has no place for it")
    return messages


def _role(item: Mapping[str, Any], where: str) -> str:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise Drop(f"{where} has a message of the role {role!r}")
    return "system" if role == "developer" else role


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Drop(f"{where}.content is {kind(content)}; expected a text or a list")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            raise Drop(f"{where} has a part that is no text; only text can be trained on")
    return "".join(part["text"] for part in content)
