"""Reads chat training data line by line: examples, and problems that name line, example, message and reason. Pure.

The same check runs on the command line before an upload and in the validation of a job. Memory is bounded by the
longest line. OpenAI's rules are followed where it has them; over-long examples are no problem here, they
are cut when rendered.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from rose.domain import formats
from rose.errors import InvalidDataset

MAX_LINE_BYTES = 16 << 20
"""Longest line that is read; a conversation of this size fits no model."""

_SKIPPED_BYTES = 1 << 20

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_EXAMPLE_KEYS = frozenset({"messages", "tools", "parallel_tool_calls", "functions"})
_MESSAGE_KEYS = frozenset(
    {
        "role",
        "content",
        "name",
        "weight",
        "tool_calls",
        "tool_call_id",
        "function_call",
        "refusal",
        "audio",
        "reasoning_content",
        "reasoning",
    }
)
_THOUGHT_KEYS = ("reasoning_content", "reasoning")
_BOM = b"\xef\xbb\xbf"
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


Parsed = TypeVar("Parsed")


class ChatExample(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation to learn from."""

    line: int
    """Physical line of the file, from 1."""
    number: int
    """Example of the file, from 1; blank lines do not count."""
    messages: tuple[dict[str, Any], ...]
    """As in the file; `developer` has become `system`, content parts have become text."""
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def conversations(self) -> tuple[ChatExample, ...]:
        """Itself; a line of other data can have several."""
        return (self,)


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a line cannot be learned from."""

    line: int
    example: int
    text: str
    """What is wrong, for example `messages[0].role is "bot"; expected system, …`."""
    message: int | None = None
    """Message of the example, from 1."""

    @property
    def sentence(self) -> str:
        """The problem as the hosted service words it: `Example 3, message 2: …`."""
        where = f"Example {self.example}" + (f", message {self.message}" if self.message else "")
        return f"{where} (line {self.line}): {self.text}"


class UnusableExample(InvalidDataset):
    """An example cannot be learned from."""

    default_code = "invalid_training_file"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.sentence, param="training_file")
        self.problem = problem


class BadLine(Exception):
    """A line cannot be learned from; `message` (from 1) is the one at fault."""

    def __init__(self, text: str, message: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.message = message


def check_name(name: str, param: str | None = None) -> None:
    """Refuse a file that does not call itself JSON Lines, before it is sent, when it arrives and when a job names it.

    Raises: InvalidDataset saying what to do.
    """
    if name.lower().endswith(".jsonl"):
        return
    hint = "If it holds one conversation per line, rename it so that its name ends in .jsonl."
    if formats.convertible_suffix(name):
        hint = f"Convert it: {formats.COMMAND}"
    raise InvalidDataset(
        f"Invalid file format for Fine-Tuning API. Must be .jsonl; this file is named {name!r}.",
        code="invalid_file_format",
        param=param,
        hint=hint,
    )


def read_examples(lines: Iterable[bytes]) -> Iterator[ChatExample | Problem]:
    """Yield each example, or its first problem, in the order of the file.

    A byte-order mark, Windows line ends and blank lines are accepted. Of an open file no more than the longest
    allowed line is held in memory, whatever the file.
    """
    return read_lines(lines, _chat_line)


def read_lines(
    lines: Iterable[bytes], parse: Callable[[dict[str, Any], int, int], Parsed]
) -> Iterator[Parsed | Problem]:
    """Yield what `parse` makes of each line's object, its line and its number, or the problem that it raises (BadLine).

    Keys whose value is null are left out of the object. The bounds are those of `read_examples`.
    """
    number = 0
    for line, raw in enumerate(bounded_lines(lines), start=1):
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if not raw or raw.isspace():
            continue
        number += 1
        try:
            yield parse(_object(raw), line, number)
        except BadLine as bad:
            yield Problem(line=line, example=number, text=bad.text, message=bad.message)


def has_thought(example: ChatExample) -> bool:
    """Whether an answer that is learned has a thought: in a field of its own, or at its beginning."""
    return any(
        message["role"] == "assistant" and message.get("weight") != 0 and _thinks(message)
        for message in example.messages
    )


def _thinks(message: Mapping[str, Any]) -> bool:
    if any(str(message.get(key) or "").strip() for key in ("reasoning_content", "reasoning")):
        return True
    content = str(message.get("content") or "").lstrip()
    before, closing, _ = content.partition("</think>")
    if content.startswith("<think>"):
        return bool(closing and before.removeprefix("<think>").strip())
    return bool(closing and before.strip() and "<think>" not in before)


def bounded_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines, of an open file at most the first MAX_LINE_BYTES + 1 bytes of each."""
    read = getattr(lines, "readline", None)
    if read is None:
        yield from lines
        return
    while line := read(MAX_LINE_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = read(_SKIPPED_BYTES)


def _object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise BadLine(f"the line has more than {MAX_LINE_BYTES >> 20} MB; no model reads a conversation of that length")
    value = _decode(raw)
    if not isinstance(value, dict):
        raise BadLine(f"expected an object with messages, found {kind_of(value)}")
    return _without_nulls(value)


def _chat_line(value: Mapping[str, Any], line: int, number: int) -> ChatExample:
    _refuse_other_formats(value)
    unknown = sorted(set(value) - _EXAMPLE_KEYS)
    if unknown:
        raise BadLine(f"unknown key {unknown[0]!r}; {near(unknown[0], _EXAMPLE_KEYS)}")
    return conversation(value, line, number)


def conversation(value: Mapping[str, Any], line: int, number: int, names: Sequence[str] | None = None) -> ChatExample:
    """Return a conversation of the keys `messages`, `tools` and `functions`; `names` are what its messages are called.

    Raises: BadLine.
    """
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadLine("messages must be a list of at least one message")
    names = names or [f"messages[{index}]" for index in range(len(messages))]
    read = tuple(_message(message, index, names[index]) for index, message in enumerate(messages))
    _check_order(read)
    return ChatExample(line=line, number=number, messages=read, tools=_tools(value))


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object without keys whose value is null: SDKs write all the keys that they know."""
    return {key: inner for key, inner in value.items() if inner is not None}


def near(key: str, known: Iterable[str]) -> str:
    """Say which key was meant, or which there are."""
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(sorted(known))}"


def _decode(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise BadLine(f"not valid UTF-8 at byte {problem.start + 1}; save the file as UTF-8") from None
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError as problem:
        raise BadLine(_why_no_json(text, str(problem))) from None
    except RecursionError:
        raise BadLine("not usable JSON: nested too deeply") from None
    if "\\u0000" in text:
        _refuse_nul(value, "")
    return value


def _why_no_json(text: str, otherwise: str) -> str:
    """Say what is wrong and at which column; msgspec is fast, the standard library tells the place."""
    if _LONE_SURROGATE.search(text):
        return "the line holds half a character (a lone surrogate such as \\ud800); write the whole character"
    try:
        json.loads(text)
    except json.JSONDecodeError as problem:
        return f"not valid JSON: {problem.msg[0].lower()}{problem.msg[1:]} at column {problem.colno}"
    except RecursionError:
        return "not usable JSON: nested too deeply"
    return f"not valid JSON: {otherwise}"


def _refuse_nul(value: Any, path: str) -> None:
    """Refuse NUL, which no database keeps."""
    if isinstance(value, str):
        if "\x00" in value:
            raise BadLine(f"{path or 'the line'} holds a NUL character")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_nul(key, path)
            _refuse_nul(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_nul(inner, f"{path}[{index}]")


def _refuse_other_formats(value: Mapping[str, Any]) -> None:
    """Say of a line of another format which it is, and what converts it."""
    if value.keys() <= _EXAMPLE_KEYS and "messages" in value and not formats.has_foreign_messages(value):
        return
    found = formats.foreign_format(value)
    if found is None and "messages" in value:
        return
    if found is None:
        raise BadLine("no messages; expected an object with a list of messages")
    if found.name == "dpo":
        raise BadLine(
            "this is the preference (DPO) format; a supervised job needs messages, a dpo job takes it as it is"
        )
    if found.name in ("text", "rft"):
        raise BadLine(f"this is {found.title}; a supervised job needs messages with answers")
    raise BadLine(f"this is {found.title}; convert the file first: {formats.COMMAND}")


def _message(value: Any, index: int, where: str) -> dict[str, Any]:
    def bad(text: str) -> BadLine:
        return BadLine(f"{where}{text}", index + 1)

    if not isinstance(value, dict):
        raise bad(f" is {kind_of(value)}; expected an object with role and content")
    if "role" not in value:
        raise bad(" has no role")
    role = value["role"]
    if role not in ROLES:
        raise bad(f".role is {_shown(role)}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    message = _without_nulls(value)
    if message.get("annotations") == []:
        del message["annotations"]  # the official SDK's dump of an answer that cites nothing
    if message.get("tool_calls") == []:
        del message["tool_calls"]  # vLLM's dump of an answer that calls nothing
    unknown = sorted(set(message) - _MESSAGE_KEYS)
    if unknown:
        raise bad(f" has the unknown key {unknown[0]!r}; {near(unknown[0], _MESSAGE_KEYS)}")
    if "audio" in message:
        raise bad(".audio holds sound; only text can be trained on")
    if role == "developer":
        message["role"] = "system"
    calls = _calls(message, bad)
    message["content"] = _content(message, role, calls, bad)
    _read_thought(message, role, bad)
    if "weight" in message:
        if role != "assistant":
            raise bad(".weight is allowed on assistant messages only")
        if isinstance(message["weight"], bool) or message["weight"] not in (0, 1):
            raise bad(f".weight is {_shown(message['weight'])}; expected 0 or 1")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise bad(" has no tool_call_id; a tool message answers a call")
    if role == "function" and not isinstance(message.get("name"), str):
        raise bad(" has no name; a function message answers a call")
    if "name" in message and not isinstance(message["name"], str):
        raise bad(f".name is {kind_of(message['name'])}; expected a text")
    return message


def _read_thought(message: dict[str, Any], role: str, bad: Any) -> None:
    """Leave an answer's thought under one name. Raises: BadLine for two that differ, and for one of somebody else."""
    given = {key: message.pop(key) for key in _THOUGHT_KEYS if key in message}
    for key, thought in given.items():
        if role != "assistant":
            raise bad(f".{key} is allowed on assistant messages only")
        if not isinstance(thought, str):
            raise bad(f".{key} is {kind_of(thought)}; expected a text")
    thoughts = {thought.strip() for thought in given.values() if thought.strip()}
    if len(thoughts) > 1:
        raise bad(" has two different thoughts, in reasoning_content and in reasoning")
    if thoughts:
        message["reasoning_content"] = thoughts.pop()


def _content(message: dict[str, Any], role: str, calls: bool, bad: Any) -> str:
    """Return the text of a message; a refusal is the answer's text where there is no other."""
    content = message.get("content")
    refusal = message.pop("refusal", "")
    if not isinstance(refusal, str):
        raise bad(f".refusal is {kind_of(refusal)}; expected a text")
    if refusal and role != "assistant":
        raise bad(".refusal is allowed on assistant messages only")
    if content is None and not refusal and not (role == "assistant" and calls):
        raise bad(" has no content")
    if isinstance(content, list):
        content, refused = _parts(content, role, bad)
        if refused and refusal not in ("", refused):
            raise bad(" has two different refusals")
        refusal = refusal or refused
    if not isinstance(content, str | None):
        raise bad(f".content is {kind_of(content)}; expected a text")
    if refusal and (content or "").strip():
        raise bad(" has a refusal and a text; an answer is one of them")
    return refusal or content or ""


def _parts(parts: list[Any], role: str, bad: Any) -> tuple[str, str]:
    """Return the text and the refusal in a list of parts."""
    pieces: list[str] = []
    refusals: list[str] = []
    for position, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "image", "file"):
            raise bad(f".content[{position}] is of type {kind!r}; only text can be trained on")
        if kind == "refusal" and role == "assistant" and isinstance(part.get("refusal"), str):
            refusals.append(part["refusal"])
        elif kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            raise bad(f".content[{position}] is no text part")
    return "".join(pieces), "".join(refusals)


def _calls(message: Mapping[str, Any], bad: Any) -> bool:
    """Check tool calls; return whether there are any."""
    calls = message.get("tool_calls")
    if calls is None and "function_call" not in message:
        return False
    if message["role"] != "assistant":
        raise bad(" calls a tool; only an assistant does")
    if "function_call" in message:
        _check_call(message["function_call"], ".function_call", bad)
    if calls is not None:
        if not isinstance(calls, list) or not calls:
            raise bad(".tool_calls must be a list of at least one call")
        for index, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            _check_call(function, f".tool_calls[{index}].function", bad)
            if not isinstance(call.get("id"), str | None):
                raise bad(f".tool_calls[{index}].id is {kind_of(call['id'])}; expected a text")
    return True


def _check_call(function: Any, where: str, bad: Any) -> None:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(f"{where} has no name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise bad(f"{where}.arguments is {kind_of(arguments)}; expected JSON as a text")
    if not arguments.strip():
        return  # a call without arguments
    try:
        parsed = msgspec.json.decode(arguments)
    except msgspec.DecodeError as problem:
        raise bad(f"{where}.arguments is not valid JSON: {problem}") from None
    if not isinstance(parsed, dict):
        raise bad(f"{where}.arguments is {kind_of(parsed)}; expected a JSON object")


def _check_order(messages: tuple[dict[str, Any], ...]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadLine("no assistant message, so nothing to learn from")
    if all(message.get("weight") == 0 for message in answers):
        raise BadLine("every assistant message has weight 0, so nothing to learn from")
    if messages[0]["role"] == "assistant" and len(messages) == 1:
        raise BadLine("only an assistant message; something must be asked first")


def _tools(value: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = value.get("tools")
    functions = value.get("functions")
    if tools is None and functions is None:
        return None
    if tools is not None and functions is not None:
        raise BadLine("tools and functions exclude each other; functions is the old name")
    given = tools if tools is not None else functions
    name = "tools" if tools is not None else "functions"
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise BadLine(f"{name} must be a list of objects")
    if tools is None:
        return tuple({"type": "function", "function": one} for one in given)
    for index, one in enumerate(given):
        if not isinstance(one.get("function"), dict) or not isinstance(one["function"].get("name"), str):
            raise BadLine(f"tools[{index}].function has no name")
    return tuple(given)


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "something else")


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else text[:57] + "…"
