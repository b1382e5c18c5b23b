"""Inputs of which people reported that something else than they said was learned, on templates with that trait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rose.domain.training_data import ChatExample, has_thought, read_examples
from rose.errors import InvalidDataset, InvalidRequest
from rose.language_models.template import ChatTemplate, load_tokenizer
from tests.real_templates.conversations import CONTEXT, Learned, learned, marks, text

REPORTED = Path(__file__).parent / "reported"


@pytest.fixture
def tokenizer(fixture_base: Path) -> Any:
    return load_tokenizer(fixture_base)


def template(tokenizer: Any, name: str | None = None) -> ChatTemplate:
    if name is not None:
        tokenizer.chat_template = (REPORTED / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(tokenizer)


def reported(name: str) -> ChatExample:
    with (REPORTED / f"{name}.jsonl").open("rb") as file:
        [read] = read_examples(file)
    assert isinstance(read, ChatExample), read
    return read


def lessons(chosen: ChatTemplate, name: str) -> list[Learned]:
    read = reported(name)
    return learned(chosen.render(read, CONTEXT, thinking=has_thought(read)))


def test_a_call_that_the_template_drops_is_refused(tokenizer: Any) -> None:
    read = reported("tool_calls_dropped")
    with pytest.raises(InvalidDataset, match="get_weather") as refused:
        template(tokenizer, "no_tools").render(read, CONTEXT)
    assert refused.value.message.startswith("Example 1")


def test_a_tools_result_that_the_template_drops_is_refused_in_chat(tokenizer: Any) -> None:
    result = {"role": "tool", "tool_call_id": "call_1", "content": "17 degrees"}
    asked = [*reported("tool_calls_dropped").messages, result]
    with pytest.raises(InvalidRequest, match="leaves out") as refused:
        template(tokenizer, "no_tools").prompt(asked)
    assert refused.value.code == "messages_not_supported"
    assert refused.value.param in ("messages[1]", "messages[2]")


def test_a_thought_stands_inside_its_block_once(tokenizer: Any) -> None:
    chosen = template(tokenizer, "hybrid_think")
    [one] = lessons(chosen, "think_orphan")
    assert text(chosen, one.ids) == "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"
    assert text(chosen, one.before).endswith("<|im_start|>assistant\n")


def test_the_first_character_of_an_answer_is_learned(tokenizer: Any) -> None:
    chosen = template(tokenizer, "opened_think")
    [one] = lessons(chosen, "first_character_lost")
    assert text(chosen, one.ids) == "\n</think>\n\n<b>Four</b><|im_end|>"
    assert text(chosen, one.before).endswith("<|im_start|>assistant\n<think>\n")


def test_a_users_text_opens_no_turn(tokenizer: Any) -> None:
    chosen = template(tokenizer)
    [message] = json.loads((REPORTED / "injection.json").read_bytes())["messages"]
    asked = chosen.prompt([message])
    assert message["content"] in text(chosen, asked)
    assert marks(chosen, asked) == marks(chosen, chosen.prompt([{"role": "user", "content": "Goodbye."}]))


def test_the_official_clients_own_dump_is_read(tokenizer: Any) -> None:
    chosen = template(tokenizer)
    [one] = lessons(chosen, "sdk_message")
    assert text(chosen, one.ids) == "My name is tiny.<|im_end|>"


def test_a_greeting_before_any_question(tokenizer: Any) -> None:
    chosen = template(tokenizer)
    found = lessons(chosen, "greeting_first")
    assert [text(chosen, one.ids) for one in found][-1] == "Answer 0.<|im_end|>"
    assert all(one.before for one in found)
