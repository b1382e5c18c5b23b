"""What each format's rows become, and which rows are left out with which reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from rose.conversion.converting import TooManyDrops
from rose.errors import InvalidDataset, InvalidRequest
from tests.unit.conversions import asked_and_answered, converted, converted_rows, messages, said, written

CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"a":1}'}}
CALLING = said("assistant", "", tool_calls=[CALL])
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "42"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "get", "description": "gets", "parameters": SCHEMA}}


def turns(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in pairs], **more}


def why_left_out(folder: Path, *rows: Any, **asked: Any) -> str:
    """Return why none of the rows could be converted."""
    with pytest.raises(TooManyDrops) as caught:
        converted_rows(folder, *rows, **asked)
    assert not (folder / "converted.jsonl").exists()
    return "\n".join(caught.value.details)


# OpenAI's own formats


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


# ShareGPT


@pytest.mark.parametrize("who", ["gpt", "assistant", "bing", "bard", "chatgpt", "model", "GPT"])
@pytest.mark.parametrize("asker", ["human", "user"])
def test_sharegpt_names_of_speakers(tmp_path: Path, who: str, asker: str) -> None:
    row = turns(("system", "s"), (asker, "q"), (who, "a"))
    assert messages(tmp_path, row) == [said("system", "s"), said("user", "q"), said("assistant", "a")]


def test_sharegpt_calls_and_observations(tmp_path: Path) -> None:
    call = '{"name": "get", "arguments": {"a": 1}}'
    row = turns(("human", "q"), ("function_call", call), ("observation", "42"), ("gpt", "a"), system="s")
    row["tools"] = msgspec.json.encode([TOOL["function"]]).decode()
    _, [line] = converted_rows(tmp_path, row)
    assert line == {
        "messages": [said("system", "s"), said("user", "q"), CALLING, RESULT, said("assistant", "a")],
        "tools": [TOOL],
    }


def test_sharegpt_calls_side_by_side_get_ids_that_their_results_name(tmp_path: Path) -> None:
    calls = '[{"name": "get", "arguments": {}}, {"name": "put", "arguments": "{}"}]'
    row = turns(("human", "q"), ("function_call", calls), ("observation", "1"), ("observation", "2"), ("gpt", "a"))
    made = messages(tmp_path, row)
    assert [call["id"] for call in made[1]["tool_calls"]] == ["call_1", "call_2"]
    assert [one["tool_call_id"] for one in made if one["role"] == "tool"] == ["call_1", "call_2"]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "content": "q"}, {"role": "assistant", "value": "a"}]},
        {"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'},
        {
            "conversations": [
                {"from": "human", "value": "q", "weight": None},
                {"from": "gpt", "value": "a", "weight": 1},
            ]
        },
    ],
)
def test_sharegpt_spellings(tmp_path: Path, row: Any) -> None:
    report, lines = converted_rows(tmp_path, row)
    assert (report.format, lines) == ("sharegpt", [asked_and_answered("q", "a")])


def test_sharegpt_says_who_begins_and_who_speaks_twice_and_keeps_both(tmp_path: Path) -> None:
    rows = [turns(("gpt", "Hello!"), ("human", "q"), ("gpt", "a")), turns(("human", "q"), ("gpt", "a"), ("gpt", "b"))]
    report, lines = converted_rows(tmp_path, *rows)
    assert lines[0]["messages"][0] == said("assistant", "Hello!")
    assert lines[1]["messages"][1:] == [said("assistant", "a"), said("assistant", "b")]
    assert sorted(report.notes) == [
        "conversation begins with the assistant, kept as it is",
        "conversation with two turns of the same speaker in a row, kept as two messages",
    ]


def test_sharegpt_answers_that_are_not_to_be_learned_have_weight_0(tmp_path: Path) -> None:
    row = turns(("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))
    row["conversations"][1]["train"] = False
    assert messages(tmp_path, row)[1::2] == [said("assistant", "a", weight=0), said("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (turns(("human", "q"), ("narrator", "a")), "conversations[1].from is 'narrator'"),
        (turns(("human", "q"), ("gpt", None)), "conversations[1].value is null"),
        (turns(("human", "q"), ("gpt", "a"), image="cat.png"), "has image"),
        (turns(("human", "q"), ("observation", "1"), ("gpt", "a")), "result without the call"),
        (turns(("human", "q"), ("function_call", "get it"), ("gpt", "a")), "no JSON object with name and arguments"),
        (turns(("system", "one"), ("human", "q"), ("gpt", "a"), system="two"), "system text of its own and another"),
        (turns(("human", "q")), "no assistant message"),
        ({"conversations": []}, "messages must be a list of at least one message"),
    ],
)
def test_sharegpt_rows_that_are_left_out(tmp_path: Path, row: Any, why: str) -> None:
    assert why in why_left_out(tmp_path, row, format="sharegpt")


# Alpaca and pairs


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


# Other services


def test_anthropic_blocks_become_thoughts_calls_and_results(tmp_path: Path) -> None:
    row = {
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            said("user", "q"),
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "get", "input": {"a": 1}},
                    {"type": "tool_use", "id": "toolu_2", "name": "get", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "2"}]},
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "1"},
                    {"type": "text", "text": "And?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        ],
        "tools": [{"name": "get", "description": "gets", "input_schema": SCHEMA}],
        "max_tokens": 10,
    }
    report, [line] = converted_rows(tmp_path, row)
    made = line["messages"]
    assert report.format == "anthropic"
    assert line["tools"] == [TOOL]
    assert made[0] == said("system", "s")
    assert made[2]["reasoning_content"] == "hm"
    assert [(one["id"], one["function"]["arguments"]) for one in made[2]["tool_calls"]] == [
        ("toolu_1", '{"a":1}'),
        ("toolu_2", "{}"),
    ]
    assert made[3:] == [
        {"role": "tool", "tool_call_id": "toolu_2", "content": "2"},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "1"},
        said("user", "And?"),
        said("assistant", "Three."),
    ]


def test_gemini_calls_get_ids_and_parts_are_joined(tmp_path: Path) -> None:
    row = {
        "systemInstruction": {"parts": [{"text": "s"}]},
        "contents": [
            {"role": "user", "parts": [{"text": "a"}, {"text": "b"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "get", "args": {"a": 1}}}]},
            {"role": "function", "parts": [{"functionResponse": {"name": "get", "response": {"n": 42}}}]},
            {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "It is "}, {"text": "42."}]},
        ],
        "tools": [
            {
                "functionDeclarations": [
                    {
                        "name": "get",
                        "description": "gets",
                        "parameters": {"type": "OBJECT", "properties": {"a": {"type": "INTEGER"}}},
                    }
                ]
            }
        ],
    }
    report, [line] = converted_rows(tmp_path, row)
    assert report.format == "gemini"
    assert line == {
        "messages": [
            said("system", "s"),
            said("user", "ab"),
            CALLING,
            {**RESULT, "content": '{"n":42}'},
            said("assistant", "It is 42.", reasoning_content="hm"),
        ],
        "tools": [TOOL],
    }


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {
                "system": "s",
                "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}, said("assistant", "a")],
            },
            "block of type 'image'",
        ),
        (
            {
                "contents": [
                    {"role": "user", "parts": [{"inlineData": {}}]},
                    {"role": "model", "parts": [{"text": "a"}]},
                ]
            },
            "a part with inlineData",
        ),
        ({"contents": [{"role": {}, "parts": [{"text": "a"}]}]}, "contents[0].role"),
    ],
)
def test_pictures_of_other_services_leave_their_row_out(tmp_path: Path, row: Any, why: str) -> None:
    assert why in why_left_out(tmp_path, row)


def test_mistral_loses_its_prefix_key_and_keeps_its_ids(tmp_path: Path) -> None:
    call = {"id": "a1b2c3d4e", "function": {"name": "get", "arguments": '{"a":1}'}}
    row = {
        "messages": [
            said("user", "q"),
            said("assistant", "", tool_calls=[call], prefix=False),
            said("tool", "42", tool_call_id="a1b2c3d4e"),
            said("assistant", "a", weight=1, prefix=True),
        ]
    }
    report, [line] = converted_rows(tmp_path, row)
    assert report.format == "mistral"
    assert line["messages"][1]["tool_calls"] == [{**CALL, "id": "a1b2c3d4e"}]
    assert line["messages"][3] == said("assistant", "a", weight=1)


def test_rendered_text_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="belong to one model"):
        converted_rows(tmp_path, {"text": "<|im_start|>user\nq<|im_end|>"})


# Recognising


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
