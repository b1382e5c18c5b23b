"""Random conversations: plausible and implausible orders, tools, thoughts, blanks, other scripts, marks as text."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tests.real_templates.conversations import Message, answer, call, result, system, tool, user

WORDS = (
    *("yes", "It is sunny.", "17 degrees", "Straße", "naïve", "def f(x):\n    return x - 1", "{'a': [1, 2]}"),
    *(
        "1/3 < 0.5 & 7 > 2",
        "a\n\nb",
        "日本語の文",
        "東京",
        "مرحبا بالعالم",
        "שלום",
        "🙂👍🏽",
        "👩‍👩‍👧",
        "…",
        "“quoted”",
        "C:\\new",
    ),
    *("https://example.org/?q=1", "| a | b |", "<b>bold</b>", "[link](x)", "```py\nx\n```", "𠀀𠀁", "$5", "it's"),
)
BLANKS = ("", "", "", " ", "\n", "\n\n", "  ", "\t")


def words(more: tuple[str, ...] = ()) -> st.SearchStrategy[str]:
    """Texts of one to four pieces, sometimes with blanks at their ends; `more` are further pieces."""
    piece = st.sampled_from(WORDS) if not more else st.one_of(st.sampled_from(WORDS), st.sampled_from(more))
    inner = st.lists(piece, min_size=1, max_size=4).map(" ".join)
    return st.tuples(st.sampled_from(BLANKS), inner, st.sampled_from(BLANKS)).map("".join)


@st.composite
def questions(draw: st.DrawFn) -> list[Message]:
    """A conversation without marks that ends with a question."""
    messages = [system(draw(words()))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages += [user(draw(words())), answer(draw(words()))]
    return [*messages, user(draw(words()))]


@st.composite
def conversations(draw: st.DrawFn, marks: tuple[str, ...]) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages as a file may hold them, and tools; `marks` are written into some of the texts."""
    told = words(marks) if draw(st.booleans()) else words()
    if draw(st.integers(0, 3)):
        messages = draw(_plausible(told))
    else:
        role = st.sampled_from(("system", "user", "assistant", "assistant", "call", "tool"))
        messages = [
            message for one in draw(st.lists(role, min_size=1, max_size=6)) for message in draw(_turn(one, told))
        ]
    assume(_is_lesson(messages))
    called = sorted({one["function"]["name"] for message in messages for one in message.get("tool_calls", ())})
    listed = [tool(name, city={"type": "string"}) for name in called or ["look_up"]]
    has_tools = draw(st.integers(0, 9)) > 0 if called else draw(st.integers(0, 9)) == 0
    return _numbered(messages), listed if has_tools else None


def _is_lesson(messages: list[Message]) -> bool:
    """Whether there is something to learn, as every line of a file must have."""
    answers = [message for message in messages if message["role"] == "assistant" and message.get("weight") != 0]
    return bool(answers) and len(messages) > 1


@st.composite
def _plausible(draw: st.DrawFn, told: st.SearchStrategy[str]) -> list[Message]:
    messages = [system(draw(told))] if draw(st.integers(0, 2)) == 0 else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(told)))
        if draw(st.integers(0, 3)) == 0:
            messages += [*draw(_turn("call", told)), *draw(_turn("tool", told))]
        messages += draw(_turn("assistant", told))
    return messages


@st.composite
def _turn(draw: st.DrawFn, role: str, told: st.SearchStrategy[str]) -> list[Message]:
    if role == "system":
        return [system(draw(told))]
    if role == "user":
        return [user(draw(told))]
    if role == "tool":
        return [result(draw(told))]
    more: dict[str, Any] = {}
    if draw(st.integers(0, 3)) == 0:
        more["reasoning_content"] = draw(told).strip() or "Hm."
    if draw(st.integers(0, 5)) == 0:
        more["weight"] = draw(st.sampled_from((0, 1)))
    if role == "assistant":
        return [answer(draw(told) if draw(st.integers(0, 19)) else "", **more)]
    names = st.sampled_from(("get_weather", "look_up"))
    value = st.one_of(told, st.integers(-5, 5), st.booleans())
    arguments = st.dictionaries(st.sampled_from(("city", "unit", "day")), value, max_size=2)
    calls = [
        call(draw(names), json.dumps(draw(arguments), ensure_ascii=False))
        for _ in range(draw(st.sampled_from((1, 1, 1, 2))))
    ]
    beside = draw(told) if draw(st.integers(0, 3)) == 0 else None
    return [answer(beside, tool_calls=calls, **more)]


def _numbered(messages: list[Message]) -> list[Message]:
    """Give calls their own ids, and each result the id of the newest call without one."""
    made, open_ids = 0, list[str]()
    for message in messages:
        for one in message.get("tool_calls", ()):
            made += 1
            one["id"] = f"call_{made}"
            open_ids.append(one["id"])
        if message["role"] == "tool":
            message["tool_call_id"] = open_ids.pop(0) if open_ids else f"call_{made}"
    return messages
