"""Training data: what is accepted, and what is said about each problem."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose.domain.training_data import MAX_LINE_BYTES, ChatExample, Problem, has_thought, read_examples

USER = {"role": "user", "content": "What is 2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def line(*messages: Any, **more: Any) -> bytes:
    return msgspec.json.encode({"messages": list(messages), **more}) + b"\n"


def problem(raw: bytes) -> Problem:
    [found] = read_examples([raw])
    assert isinstance(found, Problem), found
    return found


def example(raw: bytes) -> ChatExample:
    [found] = read_examples([raw])
    assert isinstance(found, ChatExample), found
    return found


def test_line_numbers_are_physical_and_example_numbers_are_not() -> None:
    lines = [b"\xef\xbb\xbf" + line(USER, ASSISTANT), b"\r\n", line(USER, ASSISTANT)[:-1] + b"\r\n", b"{\n", b"  \n"]
    found = list(read_examples(lines))
    assert [(type(one).__name__, one.line) for one in found] == [
        ("ChatExample", 1),
        ("ChatExample", 3),
        ("Problem", 4),
    ]
    assert found[1].number == 2  # type: ignore[union-attr]
    assert found[2].sentence.startswith("Example 3 (line 4): not valid JSON")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"messages": [1, 2,, 3]}', "not valid JSON: expecting value at column 20"),
        (b'["a"]', "expected an object with messages, found a list"),
        (b"\xff\xfe", "not valid UTF-8 at byte 1"),
        (b'{"messages": "hi"}', "messages must be a list"),
        (b'{"messages": []}', "at least one message"),
        (b"{}", "no messages"),
        (b'{"prompt": "a", "completion": "b"}', "prompt/completion pairs; convert the file first: rose files convert"),
        (b'{"input": {}, "preferred_output": [], "non_preferred_output": []}', "preference (DPO) format"),
        (line(USER), "no assistant message"),
        (line(ASSISTANT), "something must be asked first"),
        (line(USER, {**ASSISTANT, "weight": 0}), "every assistant message has weight 0"),
        (line(USER, {**ASSISTANT, "weight": 0.5}), "messages[1].weight is 0.5; expected 0 or 1"),
        (line({**USER, "weight": 1}, ASSISTANT), "messages[0].weight is allowed on assistant messages only"),
        (line({"role": "bot", "content": "x"}, ASSISTANT), 'messages[0].role is "bot"; expected system,'),
        (line({"content": "x"}, ASSISTANT), "messages[0] has no role"),
        (line({"role": "user"}, ASSISTANT), "messages[0] has no content"),
        (line({"role": "user", "content": 3}, ASSISTANT), "messages[0].content is a number"),
        (line("hello", ASSISTANT), "messages[0] is a text"),
        (line({**USER, "mood": "good"}, ASSISTANT), "unknown key 'mood'; allowed are audio, content,"),
        (line(USER, {**ASSISTANT, "wieght": 0}), "unknown key 'wieght'; did you mean 'weight'?"),
        (line(USER, ASSISTANT, extra=1), "unknown key 'extra'; allowed are functions, messages,"),
        (line(USER, ASSISTANT, tool=[]), "unknown key 'tool'; did you mean 'tools'?"),
        (line(USER, {**ASSISTANT, "refusal": "No."}), "messages[1] has a refusal and a text; an answer is one of them"),
        (
            line(USER, {**ASSISTANT, "content": [{"type": "refusal", "refusal": "No."}], "refusal": "Never."}),
            "messages[1] has two different refusals",
        ),
        (line(USER, {**ASSISTANT, "annotations": [{"type": "url_citation"}]}), "has the unknown key 'annotations'"),
        (line(USER, {"role": "assistant", "refusal": 3}), "messages[1].refusal is a number; expected a text"),
        (line({**USER, "refusal": "No."}, ASSISTANT), "messages[0].refusal is allowed on assistant messages only"),
        (line(USER, {"role": "assistant", "refusal": None, "content": None}), "messages[1] has no content"),
        (line(USER, {**ASSISTANT, "audio": {"id": "audio_1"}}), "messages[1].audio holds sound; only text can be"),
        (line(USER, {**ASSISTANT, "reasoning": "a", "reasoning_content": "b"}), "has two different thoughts"),
        (line(USER, {**ASSISTANT, "reasoning": ["a"]}), "messages[1].reasoning is a list; expected a text"),
        (line({**USER, "reasoning_content": "Hm."}, ASSISTANT), ".reasoning_content is allowed on assistant"),
        (line({**USER, "name": 3}, ASSISTANT), "messages[0].name is a number; expected a text"),
        (line({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT), "only text can be"),
        (line(USER, {"role": "assistant", "tool_calls": []}), "has no content"),
        (
            line(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "not valid JSON",
        ),
        (line(USER, {"role": "tool", "content": "x"}, ASSISTANT), "no tool_call_id"),
        (line(USER, ASSISTANT, tools=[{}]), "tools[0].function has no name"),
        (b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}', "messages[0].content holds a NUL character"),
        (b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}', "half a character"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": NaN}', "not valid JSON"),
    ],
)
def test_each_problem_is_named(raw: bytes, says: str) -> None:
    assert says in problem(raw).text


def test_the_message_is_counted_from_one_in_the_sentence() -> None:
    found = problem(line(USER, {"role": "bot", "content": "x"}))
    assert (found.message, found.example) == (2, 1)
    assert found.sentence.startswith("Example 1, message 2 (line 1): messages[1].role")


def test_what_openai_accepts_is_accepted() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    tool = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    read = example(
        line(
            developer,
            parts,
            calling,
            tool,
            {**ASSISTANT, "weight": 1},
            tools=[{"type": "function", "function": {"name": "add"}}],
        )
    )
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [message["content"] for message in read.messages] == ["Be brief.", "ab", "", "4", "4"]
    assert read.tools is not None
    assert read.tools[0]["function"]["name"] == "add"


def test_the_official_sdks_message_dump_is_read() -> None:
    """It writes every key that it knows, null where there is nothing to say."""
    read = example(
        b'{"messages": [{"role": "user", "content": "What is your name?"}, {"content": "My name is tiny.", '
        b'"refusal": null, "role": "assistant", "annotations": null, "audio": null, "function_call": null, '
        b'"tool_calls": null}], "tools": null, "functions": null, "metadata": null}'
    )
    assert read.messages == (
        {"role": "user", "content": "What is your name?"},
        {"role": "assistant", "content": "My name is tiny."},
    )
    assert read.tools is None


def test_null_is_kept_where_it_is_an_answer() -> None:
    """Only keys of the example and of a message are dropped; what a call or a tool says stays as it is."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": null}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"default": None}}}
    read = example(line(USER, {"role": "assistant", "tool_calls": [call]}, tools=[tool]))
    assert read.messages[1]["tool_calls"] == [call]
    assert read.tools == (tool,)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "refusal": "I cannot help with that."},
        {"content": "", "refusal": "I cannot help with that."},
        {"refusal": "I cannot help with that."},
        {"content": [{"type": "refusal", "refusal": "I cannot help with that."}]},
        {
            "content": [{"type": "refusal", "refusal": "I cannot help with that."}],
            "refusal": "I cannot help with that.",
        },
        {"content": None, "refusal": "I cannot help with that.", "annotations": []},
    ],
)
def test_a_refusal_is_the_answer(answer: dict[str, Any]) -> None:
    read = example(line(USER, {"role": "assistant", **answer}))
    assert read.messages[1] == {"role": "assistant", "content": "I cannot help with that."}


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning_content": "2 and 2."},
        {"reasoning": " 2 and 2.\n"},
        {"reasoning": "2 and 2.", "reasoning_content": "2 and 2.\n"},
        {"reasoning": "", "reasoning_content": "2 and 2."},
    ],
)
def test_a_thought_has_one_name(thought: dict[str, Any]) -> None:
    read = example(line(USER, {**ASSISTANT, **thought}))
    assert read.messages[1] == {**ASSISTANT, "reasoning_content": "2 and 2."}


def test_an_empty_thought_is_none() -> None:
    assert example(line(USER, {**ASSISTANT, "reasoning": "  "})).messages[1] == ASSISTANT


def test_a_call_may_have_no_arguments() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    read = example(line(USER, {"role": "assistant", "tool_calls": [call]}))
    assert read.messages[1]["tool_calls"] == [call]


@pytest.mark.parametrize(
    ("answer", "thinks"),
    [
        ({"content": "4", "reasoning_content": "2 and 2."}, True),
        ({"content": "4", "reasoning": "2 and 2."}, True),
        ({"content": "<think>\n2 and 2.\n</think>\n\n4"}, True),
        ({"content": "\n <think>2 and 2.</think>4"}, True),
        ({"content": "2 and 2.\n</think>\n\n4"}, True),
        ({"content": "4"}, False),
        ({"content": "<think>\n\n</think>\n\n4"}, False),
        ({"content": "</think>4"}, False),
        ({"content": "<think>2 and 2."}, False),
        ({"content": "The tag <think> is closed by </think>."}, False),
        ({"content": "4", "reasoning_content": " "}, False),
        ({"content": "4", "reasoning_content": "2 and 2.", "weight": 0}, False),
    ],
)
def test_an_answer_that_is_learned_has_a_thought_or_not(answer: dict[str, Any], thinks: bool) -> None:
    asked = {"role": "user", "content": "<think>Mine.</think> What is 2+2?"}
    read = example(line(asked, {"role": "assistant", **answer}, USER, ASSISTANT))
    assert has_thought(read) is thinks


def test_surrogate_pairs_are_whole_characters() -> None:
    assert example(
        b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}, {"role": "assistant", "content": "x"}]}'
    )


@given(st.binary(max_size=200))
def test_any_bytes_give_an_example_or_a_problem(raw: bytes) -> None:
    for found in read_examples(raw.splitlines(keepends=True)):
        assert isinstance(found, (ChatExample, Problem))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["role", "content", "messages", "weight", "tool_calls", "tools"]), inner)
        ),
    )
)
def test_any_json_gives_an_example_or_a_problem(value: Any) -> None:
    for raw in (msgspec.json.encode(value), msgspec.json.encode({"messages": value})):
        for found in read_examples([raw]):
            assert isinstance(found, (ChatExample, Problem))


def test_memory_is_bounded_whatever_the_line(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + line(USER, ASSISTANT))
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            too_long, good = read_examples(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(too_long, Problem)
    assert too_long.text.startswith("the line has more than 16 MB")
    assert (good.line, type(good)) == (2, ChatExample)
    assert peak < 5 * MAX_LINE_BYTES


def test_a_line_of_ten_megabytes_is_read() -> None:
    assert len(example(line({**USER, "content": "x" * (10 << 20)}, ASSISTANT)).messages[0]["content"]) == 10 << 20


def test_an_empty_list_of_calls_is_none() -> None:
    read = example(line(USER, {"role": "assistant", "content": "Four.", "tool_calls": []}))
    assert read.messages[1] == {"role": "assistant", "content": "Four."}
