"""Conversations of other tools and services: ShareGPT, Anthropic, Gemini, Mistral, rendered text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from rose.errors import InvalidDataset
from tests.unit.conversions import (
    CALL,
    CALLING,
    RESULT,
    SCHEMA,
    TOOL,
    asked_and_answered,
    converted_rows,
    messages,
    said,
    why_left_out,
)


def turns(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in pairs], **more}


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
