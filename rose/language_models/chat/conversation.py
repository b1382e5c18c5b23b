"""A conversation as files and requests give it, in the one form that is rendered. Pure.

Training and answering read messages through `read_messages`, so that both see the same. What it does not accept it
refuses with the message's number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from rose.errors import InvalidRequest

OPENING, CLOSING = "<think>", "</think>"
"""How a thought is written inside a text, by whoever writes it there."""


class Refused(InvalidRequest):
    """These messages cannot be rendered as they are; `position` is the message, from 0, or None for all of them."""

    default_code = "messages_not_supported"

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message, param="messages" if position is None else f"messages[{position}]")
        self.position = position


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A function that an answer calls."""

    id: str
    index: int
    """Its number among the conversation's calls, from 0."""
    name: str
    arguments: dict[str, Any] | None
    """None when they are no JSON object; then only `text` is there."""
    text: str
    """The arguments as JSON, as they were given."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message."""

    position: int
    """Its place among the messages that were given, from 0; stays when others are left out."""
    role: str
    """system, user, assistant or tool."""
    content: str = ""
    before: tuple[Message, ...] = ()
    """System messages that stand in front of the content, for a template without that role."""
    thought: str = ""
    calls: tuple[Call, ...] = ()
    name: str | None = None
    call_id: str | None = None
    """Of a tool's result: the call that it answers."""
    call_index: int | None = None
    weight: float = 1.0
    """0: an answer that is only read."""

    @property
    def is_learned(self) -> bool:
        """Whether this is an answer that counts."""
        return self.role == "assistant" and self.weight > 0


_ROLES = {"developer": "system", "function": "tool"}


def read_messages(messages: Iterable[Mapping[str, Any]], *, thoughts: bool = False) -> tuple[Message, ...]:
    """Return the messages in the form that is rendered; keys whose value is null are as if they were not there.

    `thoughts` says that the model's template knows thoughts; then a thought that is opened and never closed is no text.

    Raises: Refused naming the message.
    """
    read: list[Message] = []
    made: dict[str, Call] = {}
    numbered = 0
    for position, given in enumerate(messages):
        message = {key: value for key, value in given.items() if value is not None}
        role = str(message["role"])
        role = _ROLES.get(role, role)
        calls = _calls(message, numbered)
        numbered += len(calls)
        made |= {call.id: call for call in calls}
        content = _content(message, position)
        thought = ""
        if role == "assistant":
            thought, content = _thought(message, content, position, thoughts)
        call_id = message.get("tool_call_id")
        if role == "tool" and call_id is None:
            call_id = _open_call(read)
        answered = made.get(str(call_id)) if role == "tool" else None
        read.append(
            Message(
                position=position,
                role=role,
                content=content,
                thought=thought,
                calls=calls,
                name=answered.name if answered else message.get("name"),
                call_id=call_id,
                call_index=answered.index if answered else None,
                weight=float(message.get("weight", 1)),
            )
        )
    return tuple(read)


def with_system_in_front(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Put the system messages at the beginning in front of the first question, for a template without that role."""
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    if not head or head == len(messages) or messages[head].role != "user":
        return tuple(messages)
    first = msgspec.structs.replace(messages[head], before=tuple(messages[:head]))
    return (first, *messages[head + 1 :])


def _content(message: Mapping[str, Any], position: int) -> str:
    """Return the text: of a string, of its parts with nothing between them, or the refusal in its place."""
    content = message.get("content")
    pieces: list[str] = []
    refusals: list[str] = []
    parts: list[Any] = [content] if isinstance(content, str) else list(content or ())
    for part in parts:
        kind: Any = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in ("text", "refusal"):
            text = str(part.get(kind, "")) if isinstance(part, dict) else str(part)
            (pieces if kind == "text" else refusals).append(text)
        else:
            raise Refused(f"holds {kind!r}; only text can be read", position)
    text, refusal = "".join(pieces), "".join(refusals)
    if message.get("refusal") and refusal not in ("", message["refusal"]):
        raise Refused("has two different refusals", position)
    refusal = refusal or str(message.get("refusal") or "")
    if refusal and text.strip():
        raise Refused("has a refusal and a text; an answer is one of them", position)
    return refusal or text


def _thought(message: Mapping[str, Any], content: str, position: int, thoughts: bool) -> tuple[str, str]:
    """Return the thought and the answer without it."""
    given = [str(message[key]).strip() for key in ("reasoning_content", "reasoning") if message.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        raise Refused("has two different thoughts, in reasoning_content and in reasoning", position)
    written, answer = split_thought(content)
    if written is None:
        head, _, rest = content.partition(CLOSING)
        if thoughts and rest and head.strip() and OPENING not in head:
            written, answer = head.strip(), rest.lstrip("\n")
        elif thoughts and content.lstrip().startswith(OPENING):
            raise Refused(f"opens {OPENING} and never closes it", position)
    if given and written and written != given[0]:
        raise Refused("has two different thoughts, in reasoning_content and in the text", position)
    return (given[0] if given else written or ""), answer


def split_thought(content: str) -> tuple[str | None, str]:
    """Return the thought at the beginning of a text, without blank lines around it, and the rest; None without one."""
    head = content.lstrip()
    if not head.startswith(OPENING) or CLOSING not in head:
        return None, content
    thought, _, answer = head.removeprefix(OPENING).partition(CLOSING)
    return thought.strip(), answer.lstrip("\n")


def _calls(message: Mapping[str, Any], numbered: int) -> tuple[Call, ...]:
    calls: list[Any] = list(message.get("tool_calls") or ())
    if message.get("function_call"):
        calls.append({"function": message["function_call"]})
    return tuple(
        _call(call["function"], str(call.get("id") or f"call_{index}"), index)
        for index, call in enumerate(calls, numbered)
    )


def _call(function: Mapping[str, Any], call_id: str, index: int) -> Call:
    """Read a call; OpenAI gives the arguments as JSON in a string, and templates mostly print an object."""
    given = function.get("arguments")
    text = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
    try:
        parsed: Any = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        parsed = None
    arguments = parsed if isinstance(parsed, dict) else None
    text = text if text.strip() else "{}"
    return Call(id=call_id, index=index, name=str(function["name"]), arguments=arguments, text=text)


def _open_call(messages: Sequence[Message]) -> str | None:
    """Return the id of the newest call without a result, for results in the old form that name none."""
    answered = {message.call_id for message in messages if message.role == "tool"}
    return next(
        (call.id for message in reversed(messages) for call in message.calls if call.id not in answered),
        None,
    )
