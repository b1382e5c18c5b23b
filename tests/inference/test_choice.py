"""Given tokens become the right pieces: with a real tokenizer, and logits that leave no choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from openai.types.chat import ChatCompletion

from rose.errors import RoseError
from rose.inference.choice import Choice
from rose.inference.generation import Done, Finished, Text, ToolCall
from rose.inference.one_by_one import OneByOne
from rose.inference.resident import Resident
from rose.inference.wire import Answer, Chunks, Header
from rose.language_models.load import load_model
from rose.language_models.locate import locate
from rose.language_models.template import load_template
from tests.inference.asking import World, ask

TEXT = "Die Rose 🌹 blüht schön — 日本の薔薇 e\u0301."
TOOLS = [{"type": "function", "function": {"name": "water"}}]


@pytest.fixture(scope="module")
def resident(world: World) -> Resident:
    located = locate(str(world.folder), models_dir=world.folder)
    return Resident(
        located.fingerprint,
        located,
        OneByOne(load_model(world.folder), context_tokens=located.context_tokens),
        load_template(world.folder),
    )


def write(
    resident: Resident, world: World, text: str, *, end: bool = True, limit: int = 1000, **asked: Any
) -> list[Any]:
    """Return the pieces of a choice whose model writes exactly `text`."""
    choice = Choice(ask(world.target(), **asked), 0, resident, limit)
    ids = resident.tokenizer.encode(text, add_special_tokens=False)
    pieces: list[Any] = []
    for token_id in [*ids, *([resident.tokenizer.eos_token_id] if end else [])]:
        logits = torch.full((resident.vocabulary,), -50.0)
        logits[token_id] = 50.0
        if choice.finished:
            break
        chosen, new = choice.advance(logits)
        assert chosen == token_id
        pieces += new
    return pieces


def shown(pieces: list[Any]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Text))


def test_characters_of_several_tokens_are_never_split(resident: Resident, world: World) -> None:
    pieces = write(resident, world, TEXT)
    assert len(resident.tokenizer.encode("🌹")) > 1, "else this proves nothing"
    assert shown(pieces) == TEXT
    assert not any("\ufffd" in piece.text for piece in pieces if isinstance(piece, Text))
    assert pieces[-1] == Finished(index=0, reason="stop")


def test_a_limit_within_a_character_shows_that_it_is_unfinished(resident: Resident, world: World) -> None:
    tokens = len(resident.tokenizer.encode("Rose 🌹"))
    pieces = write(resident, world, "Rose 🌹", limit=tokens - 1)
    assert shown(pieces) == "Rose \ufffd"
    assert pieces[-1] == Finished(index=0, reason="length")


def test_a_stop_string_of_several_bytes_over_several_tokens(resident: Resident, world: World) -> None:
    pieces = write(resident, world, TEXT, stop=["🌹 bl", "never"])
    assert shown(pieces) == "Die Rose "
    assert pieces[-1] == Finished(index=0, reason="stop")


def test_what_might_have_been_a_stop_string_is_shown_at_the_end(resident: Resident, world: World) -> None:
    text = "A rose is a ro"
    assert shown(write(resident, world, text, stop=["rose!", "ros\n"])) == text
    tokens = len(resident.tokenizer.encode(text))
    assert shown(write(resident, world, text, stop=["rose!"], end=False, limit=tokens)) == text


def test_logprobs_come_with_their_text_and_end_at_the_stop_string(resident: Resident, world: World) -> None:
    pieces = write(resident, world, "One two three four", logprobs=True, stop=[" three"])
    entries = [entry for piece in pieces if isinstance(piece, Text) for entry in piece.logprobs]
    assert "".join(entry.token for entry in entries) == "One two"
    assert all(entry.logprob > -1e-3 for entry in entries)
    whole = write(resident, world, TEXT, logprobs=True)
    raw = [entry.bytes for piece in whole if isinstance(piece, Text) for entry in piece.logprobs]
    assert b"".join(bytes(part or []) for part in raw) == TEXT.encode()


def test_a_tool_call_is_taken_out_of_the_text(resident: Resident, world: World) -> None:
    text = 'I water it.<tool_call>{"name": "water", "arguments": {"litres": 2}}</tool_call>'
    pieces = write(resident, world, text, tools=TOOLS)
    assert shown(pieces) == "I water it."
    (call,) = [piece.tool_call for piece in pieces if isinstance(piece, Text) and piece.tool_call]
    assert isinstance(call, ToolCall)
    assert (call.name, call.arguments) == ("water", '{"litres":2}')
    assert pieces[-1] == Finished(index=0, reason="tool_calls")
    assert shown(write(resident, world, text)) == text, "without tools it is only text"


def test_a_tool_call_that_is_cut_off_is_text(resident: Resident, world: World) -> None:
    text = '<tool_call>{"name": "water", "argu'
    ids = resident.tokenizer.encode(text, add_special_tokens=False)
    pieces = write(resident, world, text, tools=TOOLS, end=False, limit=len(ids))
    assert shown(pieces) == text
    assert pieces[-1] == Finished(index=0, reason="length")


def test_logits_that_are_no_numbers_are_an_error(resident: Resident, world: World) -> None:
    broken = torch.full((resident.vocabulary,), float("nan"))
    for temperature in (0, 1):
        choice = Choice(ask(world.target(), temperature=temperature), 0, resident, 5)
        with pytest.raises(RoseError, match="diverged"):
            choice.advance(broken)


def test_a_call_of_functions_by_their_old_name_is_answered_by_the_old_name(resident: Resident, world: World) -> None:
    call = '<tool_call>{"name": "water", "arguments": {"litres": 2}}</tool_call>'
    functions = [{"name": "water"}]
    pieces = write(resident, world, f"I water it.{call}{call}", functions=functions)
    assert shown(pieces) == f"I water it.{call}", "the old name has room for one call; what follows stays text"
    assert pieces[-1] == Finished(index=0, reason="function_call")
    header = Header(id="chatcmpl-1", created=1, model="m", fingerprint=None)
    answer = Answer(header, choices=1, logprobs=False, functions=True)
    for piece in pieces:
        answer.add(piece)
    body = answer.body(Done(prompt_tokens=1, completion_tokens=1))
    message = ChatCompletion.model_validate(body, strict=True).choices[0].message
    assert message.function_call is not None
    assert (message.function_call.name, message.function_call.arguments) == ("water", '{"litres":2}')
    assert message.tool_calls is None
    chunks = Chunks(header, choices=1, include_usage=False, logprobs=False, functions=True)
    streamed = b"".join(chunks.frames(piece) for piece in pieces)
    assert b'"function_call":{"name":"water","arguments":"{\\"litres\\":2}"}' in streamed
    assert b'"finish_reason":"function_call"' in streamed
    assert b"tool_calls" not in streamed
    none = write(resident, world, call, functions=functions, function_call="none")
    assert (shown(none), none[-1]) == (call, Finished(index=0, reason="stop"))
