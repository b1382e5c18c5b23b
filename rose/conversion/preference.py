"""Preference pairs: `chosen` and `rejected`, with or without a prompt, as texts, messages or turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rose.conversion.building import Message, message, system_text, tools_of
from rose.conversion.chat import messages_of, preference_line
from rose.conversion.dialogue import is_dialogue, messages_of_dialogue
from rose.conversion.pairs import from_prompt_completion
from rose.conversion.rows import Context, Drop, kind, refuse_media
from rose.conversion.sharegpt import messages_of_turns

_QUESTIONS = ("prompt", "question", "query", "instruction", "input")


def from_preference(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return a pair of answers to one question; where both sides repeat the dialogue, it is the question."""
    refuse_media(row)
    asked = [*system_text(row), *_question(row, context)]
    chosen = _side(row["chosen"], "chosen", context)
    rejected = _side(row["rejected"], "rejected", context)
    shared = _common(chosen, rejected)
    if shared:
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        asked = before if not asked or before[: len(asked)] == asked else _joined(asked, before)
    if len(chosen) != 1 or len(rejected) != 1:
        raise Drop("chosen and rejected differ before their last answer")
    return [preference_line(asked, chosen, rejected, tools_of(row.get("tools")), context)]


def from_kto(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return an answer that was judged good."""
    if not row["label"]:
        raise Drop("was judged as a bad answer")
    return from_prompt_completion({key: value for key, value in row.items() if key != "label"}, context)


def _question(row: Mapping[str, Any], context: Context) -> list[Message]:
    given = [row[name] for name in _QUESTIONS if row.get(name)]
    if row.get("conversations"):
        given = [row["conversations"]]
    texts = [one for one in given if isinstance(one, str)]
    if len(texts) == len(given):
        text = "\n".join(texts)
        if is_dialogue(text):
            return messages_of_dialogue(text, ends_with_answer=False)
        return [message("user", text)] if text else []
    if len(given) > 1:
        raise Drop("has several columns that could be the question")
    return _listed(given[0], "prompt", context)


def _side(value: Any, name: str, context: Context) -> list[Message]:
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return _listed(value, name, context)
    if not isinstance(value, str):
        raise Drop(f"{name} is {kind(value)}; expected a text or a list of messages")
    if is_dialogue(value):
        return messages_of_dialogue(value, ends_with_answer=True)
    return [message("assistant", value)]


def _listed(value: Any, name: str, context: Context) -> list[Message]:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]:
        return messages_of_turns(value, context)
    return messages_of(value, name, context)


def _common(one: list[Message], other: list[Message]) -> int:
    """Return how many messages both begin with, the last answer excluded."""
    longest = min(len(one), len(other)) - 1
    return next((at for at in range(longest) if one[at] != other[at]), max(longest, 0))


def _joined(asked: list[Message], before: list[Message]) -> list[Message]:
    """Return the question of its own column in front of what both sides repeat, unless they say the same."""
    if asked[-1:] == before[-1:] or before == asked[-len(before) :]:
        return asked if len(asked) >= len(before) else before
    if all(one.get("role") == "system" for one in asked):
        return [*asked, *before]
    raise Drop("the prompt is not what chosen and rejected begin with")
