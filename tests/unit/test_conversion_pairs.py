"""One question and one answer, or two: Alpaca, prompt/completion, named columns, preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose.errors import InvalidDataset, InvalidRequest
from tests.unit.conversions import (
    asked_and_answered,
    converted_rows,
    messages,
    said,
    why_left_out,
)


def test_alpaca_joins_instruction_and_input_and_an_empty_input_adds_no_newline(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi", "system": "s", "text": "Below is an instruction"},
        {"instruction": "Greet.", "input": None, "output": "Hi", "history": [["a", "b"]], "system": ""},
        {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"},
    ]
    report, lines = converted_rows(tmp_path, *rows)
    assert report.format == "alpaca"
    assert lines == [
        asked_and_answered("Add.\n1 2", "3"),
        {"messages": [said("system", "s"), *asked_and_answered("Greet.", "Hi")["messages"]]},
        {"messages": [*asked_and_answered("a", "b")["messages"], *asked_and_answered("Greet.", "Hi")["messages"]]},
        asked_and_answered("Who?\nAnn came.", "Ann"),
    ]
    assert report.notes == {"conversation with a history, whose answers are learned, too": 1}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"instruction": "", "output": "a"}, "the question is empty"),
        ({"instruction": "q", "output": ""}, "the answer is empty"),
        ({"instruction": "q", "output": 3}, "output is a number"),
        ({"instruction": "q", "output": "a", "history": ["b"]}, "history holds something else"),
    ],
)
def test_alpaca_rows_that_are_left_out(tmp_path: Path, row: Any, why: str) -> None:
    assert why in why_left_out(tmp_path, row)


def test_old_markers_are_taken_off_only_when_every_row_bears_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{at}\n\n###\n\n", "completion": f" a{at} END"} for at in range(3)]
    report, lines = converted_rows(tmp_path, *rows)
    assert lines == [asked_and_answered(f"q{at}", f"a{at}") for at in range(3)]
    assert set(report.notes.values()) == {3}
    rows[2] = {"prompt": "q2", "completion": "a2"}
    report, lines = converted_rows(tmp_path, *rows)
    assert lines[0] == asked_and_answered("q0\n\n###\n\n", " a0 END")
    assert report.notes == {}


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path: Path) -> None:
    row = {"prompt": [said("system", "s"), said("user", "q")], "completion": [said("assistant", "a")]}
    assert messages(tmp_path, row) == [said("system", "s"), said("user", "q"), said("assistant", "a")]


def test_a_prompt_of_human_and_assistant_turns_becomes_messages(tmp_path: Path) -> None:
    row = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": " d"}
    assert messages(tmp_path, row) == [
        *asked_and_answered("a", "b")["messages"],
        *asked_and_answered("c", "d")["messages"],
    ]


@pytest.mark.parametrize(("asks", "answers"), [("question", "answer"), ("query", "response"), ("input", "output")])
def test_other_names_of_pairs_are_taken_when_nothing_else_could_be_asked(
    tmp_path: Path, asks: str, answers: str
) -> None:
    assert converted_rows(tmp_path, {asks: "q", answers: "a", "id": 1})[1] == [asked_and_answered("q", "a")]
    with pytest.raises(InvalidDataset, match="No format that is known") as caught:
        converted_rows(tmp_path, {asks: "q", answers: "a", "passage": "p"})
    assert "--map user=COLUMN,assistant=COLUMN" in str(caught.value.hint)


def test_an_answer_that_is_json_stays_a_text(tmp_path: Path) -> None:
    answers = ['[{"name": "Ann", "role": "chief"}]', "[1, 2]", '{"messages": []}']
    lines = converted_rows(tmp_path, *({"prompt": "q", "completion": one} for one in answers))[1]
    assert [line["messages"][1]["content"] for line in lines] == answers


def test_named_columns(tmp_path: Path) -> None:
    rows = [{"Q": "q", "A": "a", "S": "s", "more": 1}, {"Q": "r", "A": "b", "S": ""}]
    report, lines = converted_rows(tmp_path, *rows, columns={"user": "Q", "assistant": "A", "system": "S"})
    assert lines == [
        {"messages": [said("system", "s"), *asked_and_answered("q", "a")["messages"]]},
        asked_and_answered("r", "b"),
    ]
    assert report.notes == {"column 'more' left out": 1}


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    why = why_left_out(tmp_path, {"Q": "q", "A": "a"}, columns={"user": "X", "assistant": "A"})
    assert "has no column 'X'; it has 'A', 'Q'" in why


# Preferences


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "prompt": "q",
            "chosen": [said("user", "q"), said("assistant", "good")],
            "rejected": [said("user", "q"), said("assistant", "bad")],
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": [said("user", "q")], "chosen": [said("assistant", "good")], "rejected": [said("assistant", "bad")]},
        {"question": "q", "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
    ],
)
def test_preferences_share_the_question_that_both_sides_repeat(tmp_path: Path, row: Any) -> None:
    report, [line] = converted_rows(tmp_path, row)
    assert report.kind == "preference"
    assert line == {
        "input": {"messages": [said("user", "q")]},
        "preferred_output": [said("assistant", "good")],
        "non_preferred_output": [said("assistant", "bad")],
    }
    assert converted_rows(tmp_path, row, to_chat=True)[1] == [asked_and_answered("q", "good")]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "both answers are the same"),
        ({"prompt": [{"content": "q"}], "chosen": "good", "rejected": "bad"}, "messages[0] has no role"),
        (
            {
                "prompt": [{"content": "p"}],
                "chosen": [said("user", "q"), said("assistant", "good")],
                "rejected": [said("user", "q"), said("assistant", "bad")],
            },
            "the prompt is not what chosen and rejected begin with",
        ),
        ({"chosen": "good", "rejected": "bad"}, "no question before the two answers"),
        ({"prompt": "q", "chosen": "", "rejected": "bad"}, "the preferred answer is empty"),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: x\n\nAssistant: y",
            },
            "differ before their last answer",
        ),
    ],
)
def test_preferences_that_are_left_out(tmp_path: Path, row: Any, why: str) -> None:
    assert why in why_left_out(tmp_path, row)


def test_judged_answers_must_be_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}]
    with pytest.raises(InvalidRequest, match="verdict"):
        converted_rows(tmp_path, *rows)
    report, lines = converted_rows(tmp_path, *rows, to_chat=True, allow_drops=True)
    assert lines == [asked_and_answered("q", "a")]
    assert report.drops[0].reason == "was judged as a bad answer"
