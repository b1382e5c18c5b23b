"""A conversation through the model's own template, with proof of where each text of it came to stand.

Every text is rendered once as it is and once between two rare characters. Without these both renderings must be equal;
with them it is known where each text stands, and whether it is there whole, once and in order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from rose.language_models.chat.conversation import CLOSING, OPENING, Call, Message, Refused
from rose.language_models.chat.marks import RARE, Hidden
from rose.language_models.clock import without_clock

Kind = Literal["content", "thought", "call", "argument", "arguments", "name", "tool"]
Key = tuple[int, Kind, int]
"""Message's position (-1: the tools), what it is of it, and which one."""
_IN_SINGLE_QUOTES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"})
"""How templates that call a function as Python does write a text (LFM2)."""
_SHORT_ID = 9
"""Characters of a call's id where Mistral's templates insist on it."""


class Variant(NamedTuple):
    """A way to give messages to a template; which one it understands is found by trying."""

    beside: Literal["empty", "null", "absent"] = "empty"
    """The content of an answer that is calls only."""
    arguments: Literal["object", "text"] = "object"
    thought: Literal["field", "parts", "text", "left_out"] = "field"
    ids: Literal["given", "short", "numbered"] = "given"


class Asking(NamedTuple):
    """How a conversation is asked, besides its messages."""

    tools: tuple[dict[str, Any], ...] | None = None
    options: Mapping[str, Any] = {}
    """Variables of the template, for example `enable_thinking`."""


class Place(NamedTuple):
    """Where a text stands in the rendering."""

    start: int
    end: int


class Rendered(NamedTuple):
    """A rendering whose marks in users' texts are hidden."""

    text: str
    places: dict[Key, list[Place]]
    """Every occurrence of each text that is there whole."""
    missing: dict[Key, str]
    """Texts that are not there, or not whole."""

    def start_of(self, position: int) -> int | None:
        """Return where the first text of a message begins; None when none of its texts is there."""
        return min((p[0].start for key, p in self.places.items() if key[0] == position), default=None)

    def end_of(self, position: int) -> int | None:
        """Return where the last text of a message ends; a name that is printed again later does not count."""
        return max((p[0].end for key, p in self.places.items() if key[0] == position), default=None)


class Renderer:
    """One tokenizer's template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._constants: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._variables: dict[str, dict[str, Any]] = {}
        """Of the constants those that a template reads."""

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """Return the template; some models have another one for tools."""
        return self._tokenizer.get_chat_template(tools=list(tools) if tools else None)

    def render(
        self, messages: Sequence[Message], asking: Asking, variant: Variant, hidden: Hidden, *, prompt: bool
    ) -> Rendered:
        """Render the messages; `prompt` adds what comes before an answer. Raises: Refused."""
        plain, marked = _Builder(hidden.hide), _Builder(hidden.hide, hidden.rare())
        source = self.source(asking.tools)
        if source not in self._variables:
            self._variables[source] = {name: value for name, value in self._constants.items() if name in source}
        given = {**self._variables[source], **asking.options}
        if asking.tools is None:
            texts = _run(source, [one.messages(messages, variant) for one in (plain, marked)], None, prompt, given)
        else:
            texts = [
                text
                for one in (plain, marked)
                for text in _run(source, [one.messages(messages, variant)], one.tools(asking.tools), prompt, given)
            ]
        return marked.places(*texts)


def _run(
    source: str,
    conversations: list[list[dict[str, Any]]],
    tools: list[dict[str, Any]] | None,
    prompt: bool,
    variables: Mapping[str, Any],
) -> list[str]:
    """Return what the template makes of each conversation. Raises: TemplateRefused."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=conversations,
            tools=tools,  # pyright: ignore[reportArgumentType]
            chat_template=without_clock(source),
            add_generation_prompt=prompt,
            **variables,
        )
    except TemplateError as error:
        raise TemplateRefused(error, own=type(error) is TemplateError) from error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise TemplateRefused(error, own=False) from error
    return list(texts)


class TemplateRefused(Refused):
    """The template raised an error."""

    def __init__(self, error: Exception, *, own: bool) -> None:
        reason = (str(error).splitlines() or [""])[0][:300]
        super().__init__(f"The model's chat template refuses these messages: {reason}")
        self.own = own
        """The sentence is the template's own, not one of Jinja or Python."""


class _Builder:
    """Makes what a template gets; with `rare`, each text between two characters by which it is found again."""

    def __init__(self, hide: Callable[[str], str], rare: Iterator[str] | None = None) -> None:
        self.hide = hide
        self._rare = rare
        self._texts: list[tuple[Key, str]] = []
        self._at: dict[str, int] = {}
        self._counts: dict[tuple[int, Kind], int] = {}

    def messages(self, messages: Sequence[Message], variant: Variant) -> list[dict[str, Any]]:
        """Return the messages as a template gets them."""
        return [as_given(message, variant, self) for message in messages]

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the tools as a template gets them; their functions' names are found again."""
        return [self._tool(tool) for tool in tools]

    def text(self, kind: Kind, position: int, text: str) -> str:
        """Return the text as the template gets it; blanks at its ends stay outside of the two characters."""
        hidden = self.hide(text)
        core = hidden.strip()
        if self._rare is None or not core:
            return hidden
        opening, closing = next(self._rare), next(self._rare)
        number = self._counts[position, kind] = self._counts.get((position, kind), -1) + 1
        self._at[opening] = self._at[closing] = len(self._texts)
        self._texts.append(((position, kind, number), core))
        start = hidden.index(core)
        return f"{hidden[:start]}{opening}{core}{closing}{hidden[start + len(core) :]}"

    def value(self, position: int, value: Any) -> Any:
        """Return a call's argument; the texts in it are found again."""
        if isinstance(value, str):
            return self.text("argument", position, value)
        if isinstance(value, dict):
            return {self.hide(key): self.value(position, inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(position, inner) for inner in value]
        return value

    def _tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        ready: dict[str, Any] = _each_text(tool, self.hide)
        function = ready.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            function["name"] = self.text("tool", -1, tool["function"]["name"])
        return ready

    def places(self, plain: str, marked: str) -> Rendered:
        """Find the texts in the marked rendering. Raises: Refused when it says something else than the plain one."""
        places: dict[Key, list[Place]] = {}
        missing = dict(self._texts)
        opened: dict[int, int] = {}
        taken, pieces, last = 0, [], 0
        for match in RARE.finditer(marked):
            number = self._at.get(match[0])
            if number is None:
                continue
            pieces.append(marked[last : match.start()])
            last = match.end()
            here = match.start() - taken
            taken += 1
            if number not in opened:
                opened[number] = here
                continue
            place = Place(opened.pop(number), here)
            key, core = self._texts[number]
            if _says(plain[place.start : place.end], core, key[1]):
                places.setdefault(key, []).append(place)
                missing.pop(key, None)
        pieces.append(marked[last:])
        if "".join(pieces) != plain:
            raise Refused("The model's chat template renders these messages by what is in their texts")
        return Rendered(plain, places, missing)


def _says(found: str, core: str, kind: Kind) -> bool:
    """Whether what stands between a text's two characters is that text, as it is or quoted in JSON or by Python.

    Arguments as JSON text must stand as they are: quoted once more, they would be a text and no object.
    """
    if found == core or kind in ("thought", "arguments"):
        return found == core
    quoted = (json.dumps(core, ensure_ascii=False), json.dumps(core), repr(core))
    return found in (*(text[1:-1] for text in quoted), core.translate(_IN_SINGLE_QUOTES))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(inner, change) for inner in value]
    return value


def texts_of(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    """Yield every text that a conversation gives to a template."""
    for message in itertools.chain(*((*m.before, m) for m in messages)):
        yield message.content
        yield message.thought
        yield message.name or ""
        yield message.call_id or ""
        for call in message.calls:
            yield call.id
            yield call.name
            yield call.text
            yield json.dumps(call.arguments, ensure_ascii=False) if call.arguments else ""
    if tools:
        yield json.dumps(list(tools), ensure_ascii=False)


# --- messages as templates want them


def as_given(message: Message, variant: Variant, builder: _Builder) -> dict[str, Any]:
    """Return a message as a template gets it."""
    given: dict[str, Any] = {"role": message.role, "content": _content(message, builder)}
    if message.calls:
        if not message.content:
            _say_nothing(given, variant)
        given["tool_calls"] = [_call(call, message.position, variant, builder) for call in message.calls]
    if message.thought and variant.thought != "left_out":
        _add_thought(given, message, variant, builder)
    if message.name is not None:
        name = message.name
        given["name"] = builder.hide(name) if message.role == "tool" else builder.text("name", message.position, name)
    if message.call_id is not None:
        numbered = variant.ids == "numbered" and message.call_index is not None
        own = f"functions.{message.name}:{message.call_index}" if numbered else _id(message.call_id, variant)
        given["tool_call_id"] = builder.hide(own)
    return given


def _content(message: Message, builder: _Builder) -> str:
    parts = [builder.text("content", before.position, before.content) for before in message.before]
    return "\n\n".join([*parts, builder.text("content", message.position, message.content)])


def _say_nothing(given: dict[str, Any], variant: Variant) -> None:
    if variant.beside == "null":
        given["content"] = None
    elif variant.beside == "absent":
        del given["content"]


def _add_thought(given: dict[str, Any], message: Message, variant: Variant, builder: _Builder) -> None:
    thought = builder.text("thought", message.position, message.thought)
    if variant.thought == "field":
        given |= {"reasoning_content": thought, "reasoning": thought, "thinking": thought}
    elif variant.thought == "parts":
        given["content"] = [
            {"type": "thinking", "thinking": thought},
            {"type": "text", "text": given.get("content") or ""},
        ]
    else:
        content = given.get("content") or ""
        given["content"] = f"{OPENING}\n{thought}\n{CLOSING}" + (f"\n\n{content}" if content else "")


def _call(call: Call, position: int, variant: Variant, builder: _Builder) -> dict[str, Any]:
    name = builder.text("call", position, call.name)
    arguments: Any
    if variant.arguments == "object" and call.arguments is not None:
        arguments = builder.value(position, call.arguments)
    else:
        arguments = builder.text("arguments", position, call.text)
    numbered = variant.ids == "numbered"
    call_id = f"functions.{name}:{call.index}" if numbered else builder.hide(_id(call.id, variant))
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _id(call_id: str, variant: Variant) -> str:
    if variant.ids == "short" and not re.fullmatch(f"[A-Za-z0-9]{{{_SHORT_ID}}}", call_id):
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:_SHORT_ID]
    return call_id
