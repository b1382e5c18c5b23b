"""Tool calls come out of the text whole, wherever the borders between tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rose.inference.generation import ToolCall
from rose.inference.tool_calls import ToolCallFilter

ANSWER = (
    'I look.<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>\n'
    '<tool_call>\n{"name": "time"}\n</tool_call> Done <'
)


def read(pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    tool_calls = ToolCallFilter()
    found = [part for piece in pieces for part in tool_calls.push(piece)] + tool_calls.finish()
    text = "".join(part for part in found if isinstance(part, str))
    return text, [(part.name, part.arguments) for part in found if isinstance(part, ToolCall)]


@given(st.lists(st.integers(0, len(ANSWER)), max_size=8))
def test_calls_and_text_are_found_whatever_the_pieces(cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), len(ANSWER)]
    pieces = [ANSWER[start:end] for start, end in pairwise(borders)]
    assert read(pieces) == ("I look.\n Done <", [("weather", '{"city":"Köln"}'), ("time", "{}")])


def test_what_is_no_call_stays_text() -> None:
    assert read(["<tool_call>no json</tool_call>!"]) == ("<tool_call>no json</tool_call>!", [])
    assert read(['<tool_call>{"name": "cut off']) == ('<tool_call>{"name": "cut off', [])
