"""Dialogues written as one text with `Human:` and `Assistant:` in front of the turns."""

from __future__ import annotations

import re

from rose.conversion.building import Message, message
from rose.conversion.rows import Drop

_TURN = re.compile(r"(?:\A|\n\n)(Human|H|Assistant|A):(?: |\n|\Z|(?=\S))")
_ROLES = {"Human": "user", "H": "user", "Assistant": "assistant", "A": "assistant"}


def is_dialogue(text: str) -> bool:
    """Say whether a text is a dialogue: it begins with a person's turn and another turn follows."""
    return text.lstrip().startswith(("Human:", "H:")) and len(_TURN.findall("\n\n" + text.lstrip())) > 1


def messages_of_dialogue(text: str, *, ends_with_answer: bool) -> list[Message]:
    """Return the turns as messages; an empty `Assistant:` at the end only asks for the answer."""
    pieces = _TURN.split("\n\n" + text.lstrip())
    turns = list(zip(pieces[1::2], pieces[2::2], strict=True))
    if not ends_with_answer and turns and _ROLES[turns[-1][0]] == "assistant" and not turns[-1][1].strip():
        turns.pop()
    messages = [message(_ROLES[who], said.strip()) for who, said in turns]
    if any(not one["content"] for one in messages):
        raise Drop("has an empty turn")
    if ends_with_answer and (not messages or messages[-1]["role"] != "assistant"):
        raise Drop("does not end with the assistant's answer")
    return messages
