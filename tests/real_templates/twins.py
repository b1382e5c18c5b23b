"""A conversation's twin: the same shape, every text a word of its own. What is learned of one follows from the other.

From the twin's learned text it is known what the template writes around an answer; with the words replaced by what the
conversation says it must be the conversation's learned text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from rose.domain.training_data import ChatExample, has_thought
from rose.errors import InvalidDataset, InvalidRequest
from rose.language_models.template import ChatTemplate, Rendering
from tests.real_templates.conversations import CONTEXT, Learned, Message, example, learned, marks, text

_BY_ITS_TEXTS = "by what is in their texts"
_BLANKS = r"(?:\s|\\[nt])*+"
"""Also as JSON and Python write them."""
_WORD = re.compile(r"Word\d\dx")


def said_as_learned(template: ChatTemplate, messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
    """Require of a conversation that it is refused with its line, or that just what its answers say is learned."""
    read = example(messages, tools)
    shape, texts = twin(messages)
    thinking = has_thought(read)
    try:
        rendering = template.render(read, CONTEXT, thinking=thinking)
    except InvalidDataset as reason:
        _require_reason(reason.message)
        if _BY_ITS_TEXTS not in reason.message:
            _require_refused(template, example(shape, tools), thinking)
        return
    twins = example(shape, tools)
    expected = _by_answer(template, twins, template.render(twins, CONTEXT, thinking=thinking), thinking)
    found = _by_answer(template, read, rendering, thinking)
    assert list(found) == list(expected)
    for index, one in found.items():
        other = expected[index]
        said, wanted = text(template, one.ids), pattern(text(template, other.ids), texts)
        assert wanted.fullmatch(said), (said, wanted.pattern)
        assert marks(template, one.ids) == marks(template, other.ids)
        assert marks(template, one.before) == marks(template, other.before)
    asked = _asked(template, shape, list(expected.values()), rendering)
    _require_said(template, shape, asked, list(expected.values()))


def _by_answer(template: ChatTemplate, read: ChatExample, rendering: Rendering, thinking: bool) -> dict[int, Learned]:
    """Return what is learned by the message that is asked for: all before it is just what a prompt for it holds."""
    found: dict[int, Learned] = {}
    prompts: dict[tuple[int, ...], int] = {}
    for index, message in enumerate(read.messages):
        if is_learned(message):
            with suppress(InvalidRequest):  # an answer that nobody can ask for is only read
                prompts[tuple(template.prompt(read.messages[:index], read.tools, thinking=thinking))] = index
    for one in learned(rendering):
        index = prompts[tuple(one.before)]
        assert index not in found
        found[index] = one
    return dict(sorted(found.items()))


def _require_reason(reason: str) -> None:
    assert re.match(r"Example 3(, message \d+)? \(line 7\): .{10}", reason)


def _require_refused(template: ChatTemplate, shape: ChatExample, thinking: bool) -> None:
    """A conversation is refused for its shape, not for its words."""
    try:
        template.render(shape, CONTEXT, thinking=thinking)
    except InvalidDataset:
        return
    raise AssertionError("the same conversation in other words is not refused")


def is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _asked(template: ChatTemplate, shape: list[Message], found: list[Learned], rendering: Rendering) -> list[int]:
    """Return the answers that are learned; before any question, one that no prompt asks for is only read."""
    said = "".join(text(template, one.ids) for one in found)
    roles = [message["role"] for message in shape]
    first = next((index for index, role in enumerate(roles) if role in ("user", "tool")), len(roles))
    answers = [index for index, message in enumerate(shape) if is_learned(message)]
    silent = [index for index in answers if index < first and not any(word in said for word in _words(shape[index]))]
    unasked = sum(caveat.count for caveat in rendering.caveats if caveat.code == "answers_not_asked")
    assert len(silent) >= unasked
    return [index for index in answers if not unasked or index not in silent]


def _require_said(template: ChatTemplate, shape: list[Message], asked: list[int], found: list[Learned]) -> None:
    """Require each text of these answers once, answer after answer, and no other message's."""
    said = "".join(text(template, one.ids) for one in found)
    wanted = [word for index in asked for word in sorted(_words(shape[index]))]
    heard = _WORD.findall(said)
    assert sorted(heard) == sorted(wanted)
    assert [_of(shape, asked, word) for word in heard] == [_of(shape, asked, word) for word in wanted]
    for index in asked:
        for one in shape[index].get("tool_calls", ()):
            assert one["function"]["name"] in said
            for value in json.loads(one["function"]["arguments"]).values():
                assert any(form in said for form in (json.dumps(value), str(value)))


def _words(message: Message) -> list[str]:
    return _WORD.findall(json.dumps(message))


def _of(shape: list[Message], asked: list[int], word: str) -> int:
    """Return the answer that says a word."""
    return next(index for index in asked if word in _words(shape[index]))


def twin(messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """Return the twin, and for each of its words the text that stands in its place; blank texts stay."""
    texts: dict[str, str] = {}
    return [{key: _twin(key, value, texts) for key, value in message.items()} for message in messages], texts


def _twin(key: str, value: Any, texts: dict[str, str]) -> Any:
    if key in ("content", "reasoning_content"):
        return _word(value, texts) if value else value
    if key == "tool_calls":
        return [{**one, "function": {**one["function"], "arguments": _arguments(one, texts)}} for one in value]
    return value


def _arguments(one: dict[str, Any], texts: dict[str, str]) -> str:
    given = json.loads(one["function"]["arguments"])
    return json.dumps({name: _word(value, texts) if isinstance(value, str) else value for name, value in given.items()})


def _word(text: str, texts: dict[str, str]) -> str:
    if not text.strip():
        return text
    word = f"Word{len(texts):02}x"
    texts[word] = text.strip()
    return word


def pattern(learned: str, texts: dict[str, str]) -> re.Pattern[str]:
    """Return what the conversation's learned text looks like, given the twin's. Blanks around a text are free."""
    pieces = re.split(f"({_WORD.pattern})", learned)
    return re.compile("".join(_piece(piece, texts) for piece in pieces), re.DOTALL)


def _piece(piece: str, texts: dict[str, str]) -> str:
    if piece in texts:
        written = "|".join(re.escape(form) for form in dict.fromkeys(forms(texts[piece])))
        return f"{_BLANKS}(?:{written}){_BLANKS}"
    return _BLANKS.join(re.escape(part) for part in re.split(r"\s+", piece))


def forms(text: str) -> Iterator[str]:
    """Yield the text as it is, as JSON quotes it, with and without other scripts, and as Python does."""
    yield text
    for quoted in (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text)):
        yield quoted[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("'", "\\'")
