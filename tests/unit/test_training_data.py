"""Training data: what is accepted, and what is said about each problem."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose.domain.training_data import MAX_LINE_BYTES, ChatExample, Problem, read_examples

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
        (line({**USER, "mood": "good"}, ASSISTANT), "unknown key 'mood'"),
        (line(USER, ASSISTANT, extra=1), "unknown key 'extra'"),
        (line({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT), "only text can be"),
        (line(USER, {"role": "assistant", "tool_calls": []}), "at least one call"),
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
