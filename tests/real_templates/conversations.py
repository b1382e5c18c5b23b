"""Conversations that the tests are made of, and what a rendering teaches, read back from its tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rose.domain.training_data import ChatExample, has_thought, read_examples
from rose.language_models.template import ChatTemplate, Rendering

Message = dict[str, Any]

CONTEXT = 16_384


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: str, call_id: str = "call_1") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, call_id: str = "call_1") -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


def example(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> ChatExample:
    """Return the conversation as the reader of files gives it: the third example, of line 7."""
    value = {"messages": list(messages), **({"tools": list(tools)} if tools else {})}
    blank = [b"\n"] * 4
    first = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    *_, read = read_examples([first, *blank, first, json.dumps(value).encode()])
    assert isinstance(read, ChatExample), read
    return read


def render(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendering:
    """Render a conversation as a file that holds nothing else would be."""
    read = example(messages, tools)
    return template.render(read, CONTEXT, thinking=has_thought(read))


class Learned(NamedTuple):
    """Neighbouring learned tokens."""

    before: list[int]
    """All tokens that the model reads before it."""
    ids: list[int]


def learned(rendering: Rendering) -> list[Learned]:
    """Return what is learned in the order of the sequences, after checking what holds of every rendering."""
    found: list[Learned] = []
    for sequence in rendering.examples:
        assert len(sequence.ids) == len(sequence.weights)
        assert set(sequence.weights) <= {0.0, 1.0}
        assert sequence.weights[0] == 0.0
        start = None
        for index, weight in enumerate([*sequence.weights, 0.0]):
            if weight and start is None:
                start = index
            elif not weight and start is not None:
                found.append(Learned(sequence.ids[:start], sequence.ids[start:index]))
                start = None
    return found


def text(template: ChatTemplate, ids: Sequence[int]) -> str:
    """Return tokens as text, marks written out."""
    decoded: str = template.tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
    )
    return decoded


def mark_ids(template: ChatTemplate) -> frozenset[int]:
    """Return the tokens that stand for structure: the special ones, and the added ones that the template writes."""
    source: str = template.tokenizer.get_chat_template()
    added = template.tokenizer.added_tokens_decoder
    return frozenset(
        number
        for number, token in added.items()
        if token.special or (token.content.strip() and token.content in source)
    )


def marks(template: ChatTemplate, ids: Sequence[int]) -> list[str]:
    """Return the marks among the tokens, in their order."""
    known = mark_ids(template)
    return [template.tokenizer.convert_ids_to_tokens(number) for number in ids if number in known]
