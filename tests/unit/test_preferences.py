"""Preference data: what is read, and what is refused with its line and reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rose.domain.preferences import PreferencePair, read_pairs
from rose.domain.training_data import Problem, read_examples
from rose.methods import dpo, likely_method, supervised

YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
GOOD: dict[str, Any] = {
    "input": {"messages": [{"role": "user", "content": "Is it?"}]},
    "preferred_output": [YES],
    "non_preferred_output": [NO],
}
CHAT = {"messages": [{"role": "user", "content": "Is it?"}, YES]}


def read(*rows: Any) -> list[PreferencePair | Problem]:
    return list(read_pairs([json.dumps(row).encode() for row in rows]))


def refused(row: Any) -> Problem:
    (found,) = read(row)
    assert isinstance(found, Problem)
    return found


def test_a_pair_is_two_conversations_that_learn_their_last_answer() -> None:
    asked = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "?"},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    (pair,) = read({**GOOD, "input": {"messages": asked, "tools": tools, "parallel_tool_calls": True}})
    assert isinstance(pair, PreferencePair)
    for conversation, answer in zip(pair.conversations, (YES, NO), strict=True):
        assert [message.get("weight") for message in conversation.messages] == [None, 0, None, None]
        assert conversation.messages[-1] == answer
        assert conversation.tools == tuple(tools)


def test_the_old_names_and_nulls_are_read() -> None:
    old = {"input": {**GOOD["input"], "tools": None}, "preferred_completion": [YES], "non_preferred_completion": [NO]}
    assert read({**old, "metadata": None}) == read(GOOD)


def test_a_weight_of_the_file_does_not_undo_the_pair() -> None:
    assert read({**GOOD, "preferred_output": [{**YES, "weight": 0}]}) == read(GOOD)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input": None}, "no input; expected an object with input, preferred_output and non_preferred_output"),
        ({"non_preferred_output": None}, "no non_preferred_output"),
        ({"input": [YES]}, "input is a list; expected an object with messages"),
        ({"input": {"messages": []}}, "input.messages must be a list of at least one message"),
        ({"input": {**GOOD["input"], "model": "x"}}, "input has the unknown key 'model'"),
        ({"input": {"messages": [{"role": "bot", "content": "x"}]}}, 'input.messages[0].role is "bot"'),
        ({"preferred_output": YES}, "preferred_output must be a list of one assistant message"),
        ({"preferred_output": [YES, YES]}, "preferred_output must be a list of one assistant message"),
        ({"preferred_output": [{"role": "user", "content": "x"}]}, "preferred_output[0] must be an assistant message"),
        ({"non_preferred_output": [{"role": "assistant"}]}, "non_preferred_output[0] has no content"),
        ({"non_preferred_output": [YES]}, "are the same; there is nothing to prefer"),
        ({"prefered_output": [YES]}, "unknown key 'prefered_output'; did you mean 'preferred_output'?"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], text: str) -> None:
    assert text in refused({**GOOD, **changes}).text


def test_each_method_names_the_other_ones_format() -> None:
    assert "this is the chat format; a dpo job needs input" in refused(CHAT).text
    (found,) = read_examples([json.dumps(GOOD).encode()])
    assert isinstance(found, Problem)
    assert "this is the preference (DPO) format" in found.text
    assert "convert the file first" in refused({"prompt": "a", "completion": "b"}).text


def test_a_files_method_is_known_by_its_first_lines() -> None:
    good, chat, bad = (json.dumps(row).encode() + b"\n" for row in (GOOD, CHAT, {**GOOD, "input": 1}))
    assert likely_method([good, good]) is dpo
    assert likely_method([bad, good]) is dpo
    assert likely_method([chat]) is supervised
    assert likely_method([b"nonsense"]) is supervised
    assert likely_method([]) is supervised
