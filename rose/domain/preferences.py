"""Reads preference data (OpenAI's DPO format) line by line: two answers to one conversation, or a problem. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from rose.domain import formats
from rose.domain.training_data import BadLine, ChatExample, Problem, conversation, kind_of, near, read_lines

OUTPUTS = ("preferred_output", "non_preferred_output")
_OLD_NAMES = {"preferred_completion": OUTPUTS[0], "non_preferred_completion": OUTPUTS[1]}
"""Of an earlier version of OpenAI's specification."""
_KEYS = frozenset({"input", *OUTPUTS})
_INPUT_KEYS = frozenset({"messages", "tools", "parallel_tool_calls", "functions"})


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation with the answer that is preferred, and the same with another one."""

    line: int
    """Physical line of the file, from 1."""
    number: int
    """Example of the file, from 1; blank lines do not count."""
    preferred: ChatExample
    """Only its last message is learned."""
    other: ChatExample

    @property
    def conversations(self) -> tuple[ChatExample, ...]:
        """Both, the preferred one first."""
        return self.preferred, self.other


def read_pairs(lines: Iterable[bytes]) -> Iterator[PreferencePair | Problem]:
    """Yield each pair, or its first problem, in the order of the file."""
    return read_lines(lines, _pair)


def _pair(value: Mapping[str, Any], line: int, number: int) -> PreferencePair:
    value = {_OLD_NAMES.get(key, key): inner for key, inner in value.items()}
    _refuse_other_formats(value)
    unknown = sorted(set(value) - _KEYS)
    if unknown:
        raise BadLine(f"unknown key {unknown[0]!r}; {near(unknown[0], _KEYS)}")
    asked = value["input"]
    if not isinstance(asked, dict):
        raise BadLine(f"input is {kind_of(asked)}; expected an object with messages")
    unknown = sorted({key for key, inner in asked.items() if inner is not None} - _INPUT_KEYS)
    if unknown:
        raise BadLine(f"input has the unknown key {unknown[0]!r}; {near(unknown[0], _INPUT_KEYS)}")
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadLine("input.messages must be a list of at least one message")
    preferred, other = (_with(asked, messages, value[name], name, line, number) for name in OUTPUTS)
    if preferred.messages == other.messages:
        raise BadLine(f"{OUTPUTS[0]} and {OUTPUTS[1]} are the same; there is nothing to prefer")
    return PreferencePair(line=line, number=number, preferred=preferred, other=other)


def _with(asked: Mapping[str, Any], messages: list[Any], output: Any, name: str, line: int, number: int) -> ChatExample:
    """Return what was asked with one of the outputs as the only answer that is learned."""
    if not isinstance(output, list) or len(output) != 1:
        raise BadLine(f"{name} must be a list of one assistant message")
    if not isinstance(output[0], dict) or output[0].get("role") != "assistant":
        raise BadLine(f"{name}[0] must be an assistant message")
    read = [
        {**one, "weight": 0} if isinstance(one, dict) and one.get("role") == "assistant" else one for one in messages
    ]
    answer = {key: inner for key, inner in output[0].items() if key != "weight"}
    names = [*(f"input.messages[{index}]" for index in range(len(messages))), f"{name}[0]"]
    return conversation({**asked, "messages": [*read, answer]}, line, number, names)


def _refuse_other_formats(value: Mapping[str, Any]) -> None:
    """Say of a line of another format which it is, and what to do with it."""
    lacking = [name for name in ("input", *OUTPUTS) if value.get(name) is None]
    if not lacking:
        return
    if "messages" in value:
        raise BadLine("this is the chat format; a dpo job needs input, preferred_output and non_preferred_output")
    found = formats.foreign_format(value)
    if found is not None and found.name != "dpo":
        raise BadLine(f"this is {found.title}; convert the file first: {formats.COMMAND}")
    raise BadLine(f"no {lacking[0]}; expected an object with input, preferred_output and non_preferred_output")
