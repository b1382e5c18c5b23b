"""Thoughts and answers are told apart, wherever the pieces of the text are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rose.inference.thoughts import Thought, ThoughtFilter
from rose.language_models.chat.answers import Frame

QWEN = Frame("<think>", "</think>", "")
HARMONY = Frame(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>final<|message|>",
)


def told(frame: Frame, pieces: list[str], *, opened: bool = False) -> tuple[str, str]:
    """Return all that was thought and all that was answered."""
    filtered = ThoughtFilter(frame, opened=opened)
    found = [part for piece in pieces for part in filtered.push(piece)] + filtered.finish()
    thought = "".join(part.text for part in found if isinstance(part, Thought))
    return thought, "".join(part for part in found if isinstance(part, str))


def test_a_thought_at_the_beginning_is_no_part_of_the_answer() -> None:
    assert told(QWEN, ["<think>\nTwo plus two.\n</think>\n\nFour."]) == ("Two plus two.", "Four.")
    assert told(QWEN, ["<think>\n\n</think>\n\nFour."]) == ("", "Four.")
    assert told(QWEN, ["Two plus two.\n</think>\n\n    indented\n"], opened=True) == ("Two plus two.", "    indented\n")


def test_a_frame_of_marks_goes_away_with_and_without_a_thought() -> None:
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four."
    assert told(HARMONY, [said]) == ("Hm.", "Four.")
    assert told(HARMONY, ["<|channel|>final<|message|>Four."]) == ("", "Four.")


def test_a_tag_later_in_the_answer_is_text() -> None:
    text = "The tag <think> opens, </think> closes."
    assert told(QWEN, [text]) == ("", text)


def test_what_is_never_closed_is_all_thought() -> None:
    assert told(QWEN, ["<think>On and on"]) == ("On and on", "")
    assert told(QWEN, ["On and on </thi"], opened=True) == ("On and on </thi", "")
    assert told(QWEN, ["<thi"]) == ("", "<thi")


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<", "<th", "</", "b c"]), max_size=12),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    opened=st.booleans(),
)
def test_where_the_pieces_are_cut_changes_nothing(text: list[str], cuts: list[int], opened: bool) -> None:
    whole = "".join(text)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:end] for start, end in pairwise(places)]
    assert told(QWEN, pieces, opened=opened) == told(QWEN, [whole], opened=opened)
