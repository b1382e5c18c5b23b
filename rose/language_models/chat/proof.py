"""Whether a rendering says what the conversation says: each text there, whole, once and in order. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rose.language_models.chat.conversation import Call, Message, Refused
from rose.language_models.chat.rendering import Key, Rendered

_ADVICE = "describe them in a system message, or take a base model whose template has tools"


class NoPlaceForTools(Refused):
    """The template knows no tools; `left_out` is a call that it leaves out, too."""

    def __init__(self, left_out: str | None = None) -> None:
        call = f' and leaves out the tool call "{left_out}"' if left_out else ""
        super().__init__(f"the model's chat template has no place for tools{call}; {_ADVICE}")
        self.code, self.param = "unsupported_parameter", "tools"


def require_all(rendered: Rendered, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
    """Require what the messages, which come before an answer, and the tools say. Raises: Refused."""
    if tools and any(key[0] == -1 for key in rendered.missing):
        raise NoPlaceForTools
    for message in messages:
        require(rendered, message, thought=False)
    _require_order(rendered, messages)


def require(rendered: Rendered, message: Message, *, thought: bool = True) -> None:
    """Require all that one message says; without `thought` its thought may be left out. Raises: Refused."""
    calls = _call_numbers(message)
    own = {before.position for before in message.before} | {message.position}
    for key in rendered.missing:
        if key[0] in own and key[1] != "name" and (thought or key[1] != "thought"):
            raise Refused(f"the model's chat template leaves out {_named(key, message, calls)}", key[0])
    for key, places in rendered.places.items():
        if key[0] in own and key[1] not in ("call", "name") and len(places) > 1:
            raise Refused(f"the model's chat template writes {_named(key, message, calls)} twice", key[0])
    if thought:
        _require_thought_first(rendered, message)
    for call in message.calls:
        _require_values(rendered, message, call)


def _require_thought_first(rendered: Rendered, message: Message) -> None:
    """Require that an answer's thought stands before what it says and calls."""
    places = rendered.places.get((message.position, "thought", 0))
    if places and rendered.start_of(message.position) != places[0].start:
        raise Refused("the model's chat template puts the thought behind what was answered", message.position)


def _call_numbers(message: Message) -> list[int]:
    """Return for each text among the calls' arguments the call that it belongs to."""
    return [
        number for number, call in enumerate(message.calls) for text in _texts(call.arguments or {}) if text.strip()
    ]


def _named(key: Key, message: Message, calls: Sequence[int]) -> str:
    _, kind, number = key
    if kind == "call":
        return f'the tool call "{message.calls[number].name}"' + (f" (number {number + 1})" if number else "")
    if kind in ("argument", "arguments"):
        call = message.calls[
            calls[number] if kind == "argument" and number < len(calls) else min(number, len(message.calls) - 1)
        ]
        return f'an argument of the tool call "{call.name}"'
    if kind == "thought":
        return "the thought"
    if key[0] != message.position or message.role == "system":
        return "the system message"
    if message.role == "tool":
        return "the tool's result"
    if message.role == "user":
        return "the question's text"
    return "the text beside the tool call" if message.calls else "the answer's text"


def _require_values(rendered: Rendered, message: Message, call: Call) -> None:
    """Require the names, numbers and the like in a call's arguments, which are looked for where the message stands."""
    start, end = rendered.start_of(message.position), rendered.end_of(message.position)
    if not call.arguments or start is None or end is None:
        return
    others = [(key[0], place) for key, places in rendered.places.items() for place in places]
    begin = max(
        (place.end for position, place in others if position < message.position and place.end <= start), default=0
    )
    close = min(
        (place.start for position, place in others if position > message.position and place.start >= end), default=None
    )
    region = rendered.text[begin:close]
    for forms in _other_values(call.arguments):
        if not any(form in region for form in forms):
            raise Refused(
                f'the model\'s chat template leaves out {forms[0]} of the tool call "{call.name}"', message.position
            )


def _other_values(value: Any) -> Iterator[tuple[str, ...]]:
    """Yield the ways to write each key, number, boolean and null."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.isidentifier():
                yield (key,)
            yield from _other_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _other_values(inner)
    elif not isinstance(value, str):
        yield (json.dumps(value), str(value), str(value).lower())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _require_order(rendered: Rendered, messages: Sequence[Message]) -> None:
    """Require that the messages come one after the other; system messages may stand anywhere."""
    reached = 0
    for message in messages:
        start, end = rendered.start_of(message.position), rendered.end_of(message.position)
        if message.role == "system" or start is None or end is None:
            continue
        if start < reached:
            raise Refused("the model's chat template puts this message in another place", message.position)
        reached = end
