"""A line's rendering is its own: the lines before it, refused ones among them, change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from rose.domain.training_data import ChatExample, has_thought
from rose.errors import InvalidDataset
from rose.language_models.template import ChatTemplate
from tests.real_templates.conversations import CONTEXT, answer, call, example, result, system, tool, user

pytestmark = pytest.mark.real_templates

FAMILIES = ("qwen3_5", "llama3_1", "gemma4_first", "kimi_k2_5")
TOOLS = [tool("look_up", city={"type": "string"})]
ROUNDS = 25

Q, Q2 = user("Two and two?"), user("And three?")
A, B = answer("Four."), answer("Seven.")
T = {"reasoning_content": "Two plus two."}
TA, READ_TA = answer("Four.", **T), answer("Four.", weight=0, **T)
ROME = [call("look_up", '{"city": "Rome"}')]
TWO = [*ROME, call("look_up", '{"city": "Paris"}', "call_2")]
C, TC, XC, XTC = (
    answer(None, tool_calls=ROME),
    answer(None, tool_calls=ROME, **T),
    answer("Let me see.", tool_calls=ROME),
    answer("Let me see.", tool_calls=ROME, **T),
)
R = result("17 degrees")
SHAPES = (
    [Q, A],
    [Q, TA],
    [Q, READ_TA, Q2, B],
    [Q, READ_TA, Q2, TA],
    [Q, C],
    [Q, C, R, A],
    [Q, READ_TA, Q2, C, R, B],
    [Q, READ_TA, Q2, TC, R, B],
    [Q, TC, R, TA],
    [Q, XC, R, A],
    [Q, XTC, R, TA],
    [Q, answer(None, tool_calls=TWO, **T)],
    [system("Be brief."), Q, C, R, TA, Q2, B],
    [Q, A, B],
)
EXAMPLES = [example(messages, tools) for tools in (None, TOOLS) for messages in SHAPES]


def outcome(template: ChatTemplate, one: ChatExample) -> Any:
    try:
        rendering = template.render(one, CONTEXT, thinking=has_thought(one))
    except InvalidDataset as refused:
        return refused.message
    return [(sequence.ids, sequence.weights) for sequence in rendering.examples]


def outcomes(template: ChatTemplate, examples: Iterable[ChatExample]) -> list[Any]:
    return [outcome(template, one) for one in examples]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendering_does_not_depend_on_those_before(template: Callable[[str], ChatTemplate], family: str) -> None:
    known = template(family)

    def fresh() -> ChatTemplate:
        return ChatTemplate(known.tokenizer, stop_ids=known.stop_ids)

    alone = [outcome(fresh(), one) for one in EXAMPLES]
    assert any(isinstance(one, list) for one in alone)
    used = fresh()
    assert outcomes(used, EXAMPLES) == alone
    assert outcomes(used, EXAMPLES[::-1]) == alone[::-1]
    refused = [one for one, found in zip(EXAMPLES, alone, strict=True) if isinstance(found, str)]
    for one in refused[::6] * ROUNDS:
        outcome(used, one)
    assert outcomes(used, EXAMPLES) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_is_what_is_asked(template: Callable[[str], ChatTemplate], family: str) -> None:
    """The tokens before the last answer are those of a request for it, whatever kinds of messages come later."""
    chosen = template(family)
    for one in EXAMPLES:
        thinking = has_thought(one)
        found = outcome(chosen, one)
        if isinstance(found, str):
            continue
        ids, weights = found[-1]
        last = len(weights) - weights[::-1].index(1.0)
        start = next((i + 1 for i in range(last - 1, -1, -1) if weights[i] == 0.0), 0)
        prompts = [
            chosen.prompt(one.messages[:index], one.tools, thinking=thinking)
            for index, message in enumerate(one.messages)
            if message["role"] == "assistant"
        ]
        assert ids[:start] in prompts
