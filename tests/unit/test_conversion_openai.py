"""OpenAI's own formats: what their rows become, and when a format is recognised at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from rose.conversion.converting import TooManyDrops
from rose.errors import InvalidDataset, InvalidRequest
from tests.unit.conversions import (
    CALLING,
    RESULT,
    TOOL,
    asked_and_answered,
    converted,
    converted_rows,
    said,
    why_left_out,
    written,
)


def test_chat_passes_through_without_nulls_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    dumped = said("assistant", "a", refusal=None, annotations=None, audio=None, tool_calls=None, stamp="noon")
    row = {"messages": [said("user", "q", name=None), dumped], "topic": "x", "tools": None}
    report, [line] = converted_rows(tmp_path, row)
    assert line == asked_and_answered("q", "a")
    assert report.format == "chat"
    assert report.notes == {"column 'topic' left out": 1, "message key 'stamp' left out": 1}


def test_chat_keeps_calls_results_tools_weights_and_text_parts(tmp_path: Path) -> None:
    asked = said("user", "q")
    asked["content"] = [{"type": "text", "text": "q", "annotations": None}]
    row = {
        "messages": [
            said("developer", "s"),
            asked,
            CALLING,
            RESULT,
            said("assistant", "no", weight=0),
            said("user", "x"),
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    row["messages"].append(said("assistant", "yes", weight=1))
    expected = msgspec.json.decode(msgspec.json.encode(row))
    del expected["messages"][1]["content"][0]["annotations"]
    assert converted_rows(tmp_path, row)[1] == [expected]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "input_audio"}])
def test_a_row_with_a_picture_is_left_out_whole(tmp_path: Path, part: Any) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, part]}, said("assistant", "a")]}
    assert "only text can be trained on" in why_left_out(tmp_path, row)


def test_dpo_lines_stay_and_give_the_preferred_answer_only_when_asked(tmp_path: Path) -> None:
    row = {
        "input": {"messages": [said("user", "q")], "tools": [TOOL]},
        "preferred_output": [said("assistant", "good")],
        "non_preferred_output": [said("assistant", "bad", refusal=None)],
    }
    report, [line] = converted_rows(tmp_path, row)
    assert (report.kind, report.format) == ("preference", "dpo")
    assert line == {**row, "non_preferred_output": [said("assistant", "bad")]}
    report, [line] = converted_rows(tmp_path, row, to_chat=True)
    assert report.kind == "chat"
    assert line == {**asked_and_answered("q", "good"), "tools": [TOOL]}


def test_reinforcement_data_is_refused_but_a_question_among_answers_is_only_left_out(tmp_path: Path) -> None:
    question = {"messages": [said("user", "q")], "reference_answer": "3"}
    with pytest.raises(InvalidDataset, match="no answers") as caught:
        converted_rows(tmp_path, question, question)
    assert caught.value.code == "no_conversations"
    report, _ = converted_rows(tmp_path, asked_and_answered("q", "a"), question, allow_drops=True)
    assert [(one.place, one.reason) for one in report.drops] == [
        ("rows.jsonl line 2", "no assistant message, so nothing to learn from")
    ]


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "m", "messages": [said("user", f"ask {custom_id}")], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": asked}


def answer(custom_id: str, *texts: str, status: int = 200, finish: str = "stop") -> dict[str, Any]:
    choices = [
        {"index": at, "message": said("assistant", text), "finish_reason": finish} for at, text in enumerate(texts)
    ]
    response = {"status_code": status, "request_id": "r", "body": {"object": "chat.completion", "choices": choices}}
    return {"id": "b", "custom_id": custom_id, "response": response, "error": None}


def test_batch_answers_find_their_requests_in_any_order(tmp_path: Path) -> None:
    requests = written(tmp_path / "requests.jsonl", [request("a"), request("b", tools=[TOOL]), request("c")])
    output = written(tmp_path / "output.jsonl", [answer("c", "C1", "C2"), answer("a", "A"), answer("b", "B")])
    for inputs in ((requests, output), (output, requests)):
        report, lines = converted(*inputs)
        assert lines == [
            asked_and_answered("ask a", "A"),
            {**asked_and_answered("ask b", "B"), "tools": [TOOL]},
            asked_and_answered("ask c", "C1"),
            asked_and_answered("ask c", "C2"),
        ]
        assert (report.format, report.rows, report.dropped) == ("batch", 3, 0)


def test_what_a_batch_did_not_answer_is_counted_with_the_reason(tmp_path: Path) -> None:
    requests = written(
        tmp_path / "requests.jsonl", [request(one) for one in ("ok", "bad", "cut", "late", "none", "twice")]
    )
    expired = {"custom_id": "late", "response": None, "error": {"code": "batch_expired", "message": "m"}}
    rows = [answer("ok", "yes"), answer("bad", status=500), answer("cut", "y", finish="length"), expired]
    rows += [answer("stranger", "x"), answer("twice", "1"), answer("twice", "2")]
    report, lines = converted(requests, written(tmp_path / "output.jsonl", rows), allow_drops=True)
    assert lines == [asked_and_answered("ask ok", "yes"), asked_and_answered("ask twice", "1")]
    assert {one.place: one.reason for one in report.drops} == {
        "output.jsonl line 2": "the answer's status_code is 500",
        "output.jsonl line 3": "the answer was cut off (finish_reason length)",
        "output.jsonl line 4": "the batch has no answer: 'batch_expired'",
        "requests.jsonl line 5": "has no answer in these files",
        "output.jsonl line 5": "answers 'stranger', which is no request of these files",
        "output.jsonl line 7": "is a second one of answers with custom_id 'twice'",
    }
    assert report.rows == report.dropped + 2


@pytest.mark.parametrize(
    ("row", "lacks"), [(request("a"), "the answers are in"), (answer("a", "A"), "the requests are in")]
)
def test_half_a_batch_names_the_other_half(tmp_path: Path, row: Any, lacks: str) -> None:
    with pytest.raises(InvalidDataset, match=lacks):
        converted_rows(tmp_path, row)


def test_a_batch_of_responses_is_read_by_its_items(tmp_path: Path) -> None:
    body = {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a?"}]},
            {"type": "function_call", "call_id": "call_1", "name": "get", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "42"},
        ],
    }
    output = [
        {"type": "reasoning", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "It is 42.", "annotations": []}],
        },
    ]
    response = {"status_code": 200, "body": {"object": "response", "status": "completed", "output": output}}
    rows = [{"custom_id": "a", "body": body}, {"custom_id": "a", "response": response}]
    assert converted_rows(tmp_path, *rows)[1] == [
        {"messages": [said("system", "Be brief."), said("user", "a?"), CALLING, RESULT, said("assistant", "It is 42.")]}
    ]


def test_two_formats_that_fit_are_both_named(tmp_path: Path) -> None:
    row = {"instruction": "q", "output": "a", "prompt": "p", "completion": "c"}
    with pytest.raises(InvalidRequest, match="Alpaca and prompt/completion") as caught:
        converted_rows(tmp_path, row)
    assert caught.value.hint == "Say which it is: --from alpaca or --from prompt-completion"
    assert converted_rows(tmp_path, row, format="alpaca")[1] == [asked_and_answered("q", "a")]


def test_the_row_that_breaks_the_format_is_named(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a"}] * 3 + [{"prompt": "q", "completion": "a"}]
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl line 4 is not: it has 'prompt', 'completion'"):
        converted_rows(tmp_path, *rows)
    report, lines = converted_rows(tmp_path, *rows, format="alpaca", allow_drops=True)
    assert (len(lines), report.drops[0].reason) == (3, "is not Alpaca")


def test_up_to_one_row_in_a_hundred_is_left_out_without_asking(tmp_path: Path) -> None:
    rows: list[Any] = [{"instruction": f"q{at}", "output": "a"} for at in range(100)]
    rows[7]["output"] = ""
    report, lines = converted_rows(tmp_path, *rows)
    assert (len(lines), report.dropped) == (99, 1)
    rows[8]["output"] = ""
    with pytest.raises(TooManyDrops, match="2 of 100 rows cannot be converted; nothing was written"):
        converted_rows(tmp_path, *rows)
