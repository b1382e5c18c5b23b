"""Where an answer begins and ends: what a model has to say after it was asked, with the mark that ends its turn. Pure.

The answer is what the whole rendering has behind the prompt. Where the prompt is not the rendering's beginning, both
are cut behind the last text that came before the answer, and only what remains is compared.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from rose.language_models.chat.conversation import Message, Refused
from rose.language_models.chat.marks import Marks
from rose.language_models.chat.rendering import Rendered

_THOUGHT = r"(?:\w*(?:think|thought|reason)\w*)"
_EMPTY_THOUGHT = re.compile(
    rf"\s*(?:<({_THOUGHT})>\s*</\1>|\[({_THOUGHT})\]\s*\[/\2\]|<\|channel>{_THOUGHT}\s*<channel\|>)\s*\Z", re.IGNORECASE
)
_OPENED_THOUGHT = re.compile(rf"(<{_THOUGHT}>|\[{_THOUGHT}\])\s*\Z", re.IGNORECASE)
_OPENED_AT_END = re.compile(rf"(?:<{_THOUGHT}>|\[{_THOUGHT}\])\s*\Z", re.IGNORECASE)
_LONGEST_OPENING = 100
_SHOWN = 60


class Left(NamedTuple):
    """Where the answer begins."""

    start: int
    """Its first character in the whole rendering."""
    closing: str | None = None
    """The prompt opened a thought that the rendering does not have; this closes it."""


def left_edge(prompt: Rendered, whole: Rendered, message: Message, marks: Marks) -> Left:
    """Find where the answer `message` begins in `whole`. Raises: Refused when it is asked otherwise than rendered."""
    first = whole.start_of(message.position)
    if whole.text.startswith(prompt.text) and (first is None or first >= len(prompt.text)):
        return Left(len(prompt.text), _unsaid_thought(prompt, whole, message))
    asked = prompt.text[_behind_context(prompt, message) :]
    begin = _behind_context(whole, message)
    written = whole.text[begin : len(whole.text) if first is None else first]
    units, others = _units(asked, marks), _units(written, marks)
    same = next(
        (i for i, (a, b) in enumerate(zip(units, others, strict=False)) if a != b), min(len(units), len(others))
    )
    left = "".join(units[same:])
    start = begin + len("".join(others[:same]))
    if not left.strip() or (_EMPTY_THOUGHT.match(left) and not message.thought):
        return Left(start, _unsaid_thought(prompt, whole, message))
    opened = _OPENED_THOUGHT.match(left.lstrip())
    if opened is None and message.thought:
        raise Refused(
            "has a thought, but the model is asked to answer without; train with thinking on", message.position
        )
    if opened is None:
        raise Refused(
            f"the model is asked for this answer otherwise than its template renders it "
            f"(asked {asked[-_SHOWN:]!r}, rendered {written[:_SHOWN]!r})",
            message.position,
        )
    return Left(start, _closing(opened[1]))


def _unsaid_thought(prompt: Rendered, whole: Rendered, message: Message) -> str | None:
    """Return what closes the thought that the prompt opened, where the template never writes what was thought."""
    opened = _OPENED_AT_END.search(prompt.text[-_LONGEST_OPENING:])
    unsaid = opened is not None and (message.position, "thought", 0) in whole.missing
    return _closing(opened[0].strip()) if opened and unsaid else None


def _closing(opening: str) -> str:
    return opening[0] + "/" + opening[1:]


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside a thought."""
    return _OPENED_AT_END.search(prompt[-_LONGEST_OPENING:]) is not None


def _behind_context(rendered: Rendered, message: Message) -> int:
    """Return where the last text that came before the message ends."""
    return max(
        (
            place.end
            for key, places in rendered.places.items()
            if 0 <= key[0] < message.position
            for place in places[:1]
        ),
        default=0,
    )


def _units(text: str, marks: Marks) -> list[str]:
    """Split a text into marks and single characters."""
    units: list[str] = []
    last = 0
    for match in marks.pattern.finditer(text):
        units += text[last : match.start()]
        units.append(match[0])
        last = match.end()
    return units + list(text[last:])


def right_edge(tail: str, stop_ids: Collection[int], marks: Marks) -> int | None:
    """Return where a turn ends in the text behind its last words: behind the first mark that stops the model."""
    stops = (match.end() for match in marks.pattern.finditer(tail) if marks.ids[match[0]] in stop_ids)
    return next(stops, None)


def next_turn_ends(tail: str, stop_ids: Collection[int], marks: Marks) -> int | None:
    """Return the end of the mark of another turn that follows directly and stops a model; None when there is none."""
    match = marks.pattern.match(tail, len(tail) - len(tail.lstrip()))
    return match.end() if match and marks.ids[match[0]] in stop_ids else None
