"""ShareGPT: lists of turns with `from` and `value`, under the many names that tools have given them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from rose.conversion.building import Calls, Message, chat, decoded, message, system_text, tools_of
from rose.conversion.rows import Context, Drop, is_media, kind, refuse_media, shortened

ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "instruction"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "chatbot", "bing", "bard", "claude", "gemini", "model", "bot"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "observation", "function_response", "function-response", "tool_response", "ipython"), "tool"
    ),
    **dict.fromkeys(("function_call", "function-call", "tool_call"), "call"),
}
"""What a turn's `from` says -> who speaks."""

_WHO = ("from", "role")
_WHAT = ("value", "content", "text")
_TURNS = ("conversations", "conversation", "messages")
_LEARNED = ("weight", "train", "loss")


def from_sharegpt(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return a conversation of turns as chat."""
    refuse_media(row)
    turns = next((row[name] for name in _TURNS if row.get(name) is not None), None)
    messages = messages_of_turns(turns, context)
    system = system_text(row)
    if system and any(one["role"] == "system" for one in messages):
        if system != messages[:1]:
            raise Drop("has a system text of its own and another one among its turns")
        system = []
    roles = [one["role"] for one in messages if one["role"] != "system"]
    if roles[:1] == ["assistant"]:
        context.note("conversation begins with the assistant, kept as it is")
    if any(one == two and one in ("user", "assistant") for one, two in pairwise(roles)):
        context.note("conversation with two turns of the same speaker in a row, kept as two messages")
    return [chat([*system, *messages], tools_of(row.get("tools")))]


def messages_of_turns(turns: Any, context: Context) -> list[Message]:
    """Return turns as messages; a conversation that is stored as JSON text is decoded."""
    if isinstance(turns, str):
        turns = decoded(turns)
    if not isinstance(turns, list):
        raise Drop(f"conversations is {kind(turns)}; expected a list of turns")
    calls = Calls()
    return [_message(turn, index, calls, context) for index, turn in enumerate(turns)]


def _message(turn: Any, index: int, calls: Calls, context: Context) -> Message:
    where = f"conversations[{index}]"
    if isinstance(turn, str):
        turn = decoded(turn)
    if not isinstance(turn, dict):
        raise Drop(f"{where} is {kind(turn)}; expected an object with from and value")
    refuse_media(turn)
    who = _first(turn, _WHO)
    role = ROLES.get(who.strip().lower()) if isinstance(who, str) else None
    if role is None:
        raise Drop(
            f"{where}.from is {shortened(str(who))!r}; expected human, gpt, system, tool, observation or function_call"
        )
    calling = turn.get("tool_calls")
    text = _text(_first(turn, _WHAT), where, empty=bool(calling))
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(text, where, calls)}
    if role == "tool":
        return calls.result(text, call_id=turn.get("tool_call_id"), name=turn.get("name"))
    made = message(role, text)
    if role == "assistant":
        made.update(_weight(turn, where))
        if isinstance(turn.get("reasoning_content"), str):
            made["reasoning_content"] = turn["reasoning_content"]
        if calling:
            made["tool_calls"] = _calls(calling, where, calls)
    return made


def _first(turn: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _text(value: Any, where: str, *, empty: bool) -> str:
    if value is None and empty:
        return ""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or is_media(part.get("type")) or not isinstance(part.get("text"), str):
                raise Drop(f"{where} has a part that is no text; only text can be trained on")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise Drop(f"{where}.value is {kind(value)}; expected a text")
    return value


def _calls(value: Any, where: str, calls: Calls) -> list[Message]:
    """Return the tool calls that a turn's JSON text (or list) names: one, or a list for calls side by side."""
    found = decoded(value) if isinstance(value, str) else value
    listed = found if isinstance(found, list) else [found]
    if not listed or not all(isinstance(one, dict) for one in listed):
        raise Drop(f"{where} is a call, but no JSON object with name and arguments")
    functions = [(one["function"] if isinstance(one.get("function"), dict) else one, one.get("id")) for one in listed]
    return [
        calls.call(function.get("name"), function.get("arguments", function.get("parameters")), call_id)
        for function, call_id in functions
    ]


def _weight(turn: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return weight 0 for an answer that is marked as not to be learned."""
    value = _first(turn, _LEARNED)
    if value is None:
        return {}
    if value not in (0, 1):
        raise Drop(f"{where} has the weight {value!r}; an answer is learned (1) or not (0)")
    return {} if value else {"weight": 0}
