"""One model's chat template: what it is asked, and what it answers then, both proven. No tokens here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from rose.language_models.chat.conversation import (
    CLOSING,
    OPENING,
    Message,
    Refused,
    read_messages,
    with_system_in_front,
)
from rose.language_models.chat.edges import left_edge, next_turn_ends, right_edge
from rose.language_models.chat.marks import Hidden, Marks
from rose.language_models.chat.proof import NoPlaceForTools, require, require_all
from rose.language_models.chat.rendering import (
    Asking,
    Rendered,
    Renderer,
    TemplateRefused,
    Variant,
    texts_of,
)

Found = TypeVar("Found")

Kind = tuple[bool, bool, bool]
"""What a conversation has that can be given in several ways: tools, calls, thoughts."""
_HELLO = "Hello"
_RESULT = "17"
_CALL = {"id": "call_0", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "rose"}'}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


class Chat(NamedTuple):
    """A conversation on its way through a template."""

    messages: tuple[Message, ...]
    asking: Asking
    hidden: Hidden

    def until(self, index: int) -> Chat:
        """Return the conversation before message `index`."""
        return self._replace(messages=self.messages[:index])


class Answer(NamedTuple):
    """What a model has to say after it was asked. Marks in users' texts are hidden."""

    prompt: Rendered
    text: str
    """All of it, with the mark that ends the turn."""
    behind: str
    """Blanks that the template writes behind it; never learned, but read as they always were."""
    said_characters: int
    """Characters of the text without what closes the turn."""
    whole: Rendered
    opened: bool
    """The prompt opened a thought, and the text closes it."""


class Answers:
    """Prompts and answers by one template."""

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        """`stop_ids` end a turn, and so does the mark that the template writes behind an answer."""
        self._renderer = Renderer(tokenizer)
        self.source = self._renderer.source()
        self.marks = Marks(tokenizer, self.source)
        self._eos: str = tokenizer.eos_token or ""
        self.stop_ids: frozenset[int] = frozenset(stop_ids)
        self.reads_thoughts = any(name in self.source for name in ("reasoning_content", "thinking", CLOSING))
        self.has_system_role = self._has_system_role()
        self.stop_ids |= self._end_of_probe()

    # --- conversations

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> Chat:
        """Read a conversation. Raises: Refused naming the message."""
        read = read_messages(messages, thoughts=self.reads_thoughts)
        if not self.has_system_role:
            read = with_system_in_front(read)
        texts = list(texts_of(read, tools))
        hidden = self.marks.hidden(texts)
        return Chat(read, Asking(tuple(dict(tool) for tool in tools) if tools else None, options), hidden)

    def prompt(self, chat: Chat, variant: Variant | None = None, *, prompt: bool = True) -> Rendered:
        """Return what comes before an answer to all of the conversation. Raises: Refused."""

        def render(variant: Variant) -> Rendered:
            rendered = self._renderer.render(chat.messages, chat.asking, variant, chat.hidden, prompt=prompt)
            require_all(rendered, chat.messages, chat.asking.tools)
            return rendered

        return self._first_that_works(chat, render) if variant is None else render(variant)

    def is_asked(self, chat: Chat, index: int) -> bool:
        """Whether message `index`, an answer with no question before it, is one that a prompt asks for."""
        if any(message.role in ("user", "tool") for message in chat.messages[:index]):
            return True
        before = chat.until(index)
        try:
            return self.prompt(before).text != self.prompt(before, prompt=False).text
        except Refused:
            return False

    def answer(self, chat: Chat, index: int) -> Answer:
        """Return message `index`, an answer, as it is asked and learned. Raises: Refused."""
        return self._first_that_works(chat, lambda variant: self._answer(chat, index, variant))

    def unfinished(self, chat: Chat) -> str:
        """Return the prompt after which the model goes on with the last message, an answer. Raises: Refused."""
        last = chat.messages[-1]
        if last.role != "assistant" or last.calls:
            raise Refused("continue_final_message needs an assistant's text as the last message", last.position)
        answer = self.answer(chat, len(chat.messages) - 1)
        blanks = last.content[len(last.content.rstrip()) :]
        return answer.prompt.text + answer.text[: answer.said_characters] + blanks

    def _answer(self, chat: Chat, index: int, variant: Variant) -> Answer:
        """Return message `index` as this variant renders it, if it is asked so. Raises: Refused."""
        answer = self._proven(chat, index, variant)
        if variant != self._first and self.prompt(chat.until(index)).text != answer.prompt.text:
            raise Refused(
                "the model is asked for this answer otherwise than it can be rendered", chat.messages[index].position
            )
        return answer

    def _proven(self, chat: Chat, index: int, variant: Variant) -> Answer:
        message = chat.messages[index]
        whole = self._renderer.render(chat.messages[: index + 1], chat.asking, variant, chat.hidden, prompt=False)
        try:
            prompt = self.prompt(chat.until(index), variant)
        except NoPlaceForTools:
            left_out = (
                number for position, kind, number in whole.missing if (position, kind) == (message.position, "call")
            )
            raise NoPlaceForTools(next((message.calls[number].name for number in left_out), None)) from None
        left = left_edge(prompt, whole, message, self.marks)
        opened = left.closing is not None
        require(whole, message, thought=not opened)
        if variant.thought == "left_out" and message.thought and not opened:
            raise Refused("the model's chat template leaves out the thought", message.position)
        last = max(whole.end_of(message.position) or 0, left.start)
        tail = whole.text[last:]
        end = right_edge(tail, self.stop_ids, self.marks)
        behind = ""
        if end is not None:
            closing, behind = tail[:end], tail[end:]
        else:
            closing = self._borrowed_end(chat, index, variant, tail.rstrip()) or tail.rstrip() + self._eos
        text = whole.text[left.start : last] + closing
        if left.closing is not None:
            text = _with_thought(chat.hidden.hide(message.thought), left.closing, text)
        return Answer(prompt, text, "" if behind.strip() else behind, len(text) - len(closing), whole, opened)

    def _borrowed_end(self, chat: Chat, index: int, variant: Variant, tail: str) -> str | None:
        """Return `tail`, which follows the answer, and the mark of the next turn, for models that stop at that."""
        message = chat.messages[index]
        position = len(chat.messages) + message.position + 1
        if message.calls:
            call = message.calls[-1]
            nearest = Message(
                position=position, role="tool", content=_RESULT, name=call.name, call_id=call.id, call_index=call.index
            )
        else:
            nearest = Message(position=position, role="user", content=_HELLO)
        longer = (*chat.messages[: index + 1], nearest)
        try:
            followed = self._renderer.render(longer, chat.asking, variant, chat.hidden, prompt=False)
        except Refused:
            return None
        last = followed.end_of(message.position)
        if last is None or not followed.text.startswith(tail, last):
            return None
        end = next_turn_ends(followed.text[last + len(tail) :], self.stop_ids, self.marks)
        return None if end is None else followed.text[last : last + len(tail) + end]

    # --- which way to give messages works

    def _first_that_works(self, chat: Chat, work: Callable[[Variant], Found]) -> Found:
        """Return what the first variant gives that is proven. Raises: Refused, the failure that got furthest."""
        failures: list[Refused] = []
        for variant in self._variants(_kind(chat)):
            try:
                return work(variant)
            except Refused as error:
                failures.append(error)
        raise max(failures, key=_distance)

    def _variants(self, kind: Kind) -> Iterator[Variant]:
        yield self._first
        yield from (variant for variant in _all_variants(kind, self.source) if variant != self._first)

    @cached_property
    def _first(self) -> Variant:
        """The way to give messages to this model: for thoughts and for calls the first that a probe of its own proves.

        It must not depend on a conversation: what was trained with all of one is asked with its beginning alone.
        """
        asked = {"role": "user", "content": _HELLO}
        thinks = {"role": "assistant", "content": _RESULT, "reasoning_content": _HELLO + _HELLO}
        calls = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
        thought = self._probed(self.chat([asked, thinks], None, thinking_options(on=True))) or Variant()
        with_tool = self._probed(self.chat([asked, calls], [_TOOL], thinking_options(on=False)))
        without = self._probed(self.chat([asked, calls], None, thinking_options(on=False)))
        return (with_tool or without or Variant())._replace(thought=thought.thought)

    def _probed(self, chat: Chat) -> Variant | None:
        for variant in _all_variants(_kind(chat), self.source):
            with suppress(Refused):
                self._proven(chat, 1, variant)
                return variant
        return None

    # --- what the template is like

    def _has_system_role(self) -> bool:
        system = {"role": "system", "content": "Be brief."}
        asking = Asking(options=thinking_options(on=False))
        read = read_messages([system, {"role": "user", "content": _HELLO}])
        try:
            rendered = self._renderer.render(read, asking, Variant(), Hidden(None, {}, frozenset()), prompt=True)
        except Refused:
            return False
        return not any(key[0] == 0 for key in rendered.missing)

    def _end_of_probe(self) -> frozenset[int]:
        """Return the mark that directly follows a plain answer, unless it is only the first of several up to a stop.

        Some templates close a conversation with one more mark on a line of its own (Phi-3), which no model makes;
        others end each turn with two marks (Cohere).
        """
        messages = [{"role": "user", "content": _HELLO}, {"role": "assistant", "content": _RESULT}]
        try:
            chat = self.chat(messages, None, thinking_options(on=False))
            whole = self._renderer.render(chat.messages, chat.asking, Variant(), chat.hidden, prompt=False)
        except Refused:
            return frozenset()
        end = whole.end_of(1)
        tail = whole.text[end:] if end is not None else ""
        match = self.marks.pattern.match(tail, len(tail) - len(tail.lstrip()))
        stop = right_edge(tail, self.stop_ids, self.marks)
        if match is None or (stop is not None and not self.marks.pattern.sub("", tail[match.start() : stop])):
            return frozenset()
        return frozenset({self.marks.ids[match[0]]} & self.marks.special_ids)

    def probe_ids(self) -> set[int]:
        """Return the ids of the marks in a plain conversation."""
        messages = [{"role": "user", "content": _HELLO}, {"role": "assistant", "content": _RESULT}]
        try:
            whole = self.prompt(self.chat(messages, None, thinking_options(on=False)), Variant(), prompt=False)
        except Refused:
            return set()
        return {self.marks.ids[match[0]] for match in self.marks.pattern.finditer(whole.text)}

    def frame(self) -> Frame:
        """Return how the model writes a thought and an answer; found by asking the template for one of each."""
        options = thinking_options(on=True)
        thought, words = "Hm, hm.", "Indeed."
        asked = {"role": "user", "content": _HELLO}
        said = {"role": "assistant", "content": words}
        opener, closer, plain = OPENING, CLOSING, ""
        with suppress(Refused):
            text = self.answer(self.chat([asked, {**said, "reasoning_content": thought}], None, options), 1).text
            opener, _, rest = text.partition(thought)
            closer = rest.partition(words)[0]
        with suppress(Refused):
            text = self.answer(self.chat([asked, said], None, thinking_options(on=False)), 1).text
            plain = text.partition(words)[0]
        return Frame(opener.strip(), closer.strip(), plain.strip())


class Frame(NamedTuple):
    """What a model writes around a thought and in front of an answer."""

    opener: str
    """Empty where the prompt opens the thought."""
    closer: str
    plain: str
    """In front of an answer without a thought."""


def thinking_options(on: bool) -> dict[str, Any]:
    """Return the variables by which templates are told whether the model thinks first; families have two names."""
    return {"enable_thinking": on, "thinking": on}


def _with_thought(thought: str, closing: str, text: str) -> str:
    """Close the thought that the prompt has opened, in front of the answer."""
    if text.lstrip().startswith(closing):
        return thought + text
    return f"{thought}\n{closing}\n\n{text}"


def _kind(chat: Chat) -> Kind:
    return (
        bool(chat.asking.tools),
        any(message.calls for message in chat.messages),
        any(message.thought for message in chat.messages),
    )


def _all_variants(kind: Kind, source: str) -> Iterator[Variant]:
    _, calls, thoughts = kind
    beside = ("empty", "null", "absent") if calls else ("empty",)
    arguments = ("object", "text") if calls else ("object",)
    ids = ("given", "short", "numbered") if calls else ("given",)
    ways = ["field", "parts", "text", "left_out"] if thoughts else ["field"]
    if not re.search("[\"']thinking[\"']", source):
        ways = [way for way in ways if way != "parts"]
    for thought, call_ids, words, content in itertools.product(ways, ids, arguments, beside):
        yield Variant(beside=content, arguments=words, thought=thought, ids=call_ids)  # pyright: ignore[reportArgumentType]


def _distance(failure: Refused) -> int:
    """Say how far a variant got: an error of Python's, the template's own sentence, or a proof that failed."""
    return 2 if not isinstance(failure, TemplateRefused) else 1 if failure.own else 0
