"""Chat messages to tokens, by the model's own template: one way for training and for answering, without torch.

The text is rendered once and tokenised once; which tokens are learned follows from character positions. The template
is the only source of special tokens. `{% generation %}` marks are not used: most models' templates lack them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from jinja2 import TemplateError

from rose.domain.training_data import ChatExample
from rose.errors import InvalidDataset, InvalidRequest
from rose.language_models.clock import without_clock

_PROOF_CHARACTERS = 12
"""Characters at an answer's end that must be in the text; templates may change what is before (thoughts, mostly)."""
_IN_THE_FILE_ONLY = ("weight", "refusal", "audio", "function_call")


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence for the model."""

    ids: list[int]
    weights: list[float]
    """For each token its weight as a target: 0 for what is only read. The first is 0: nothing comes before it."""


class Rendering(msgspec.Struct, frozen=True, kw_only=True):
    """An example as the model sees it."""

    examples: tuple[Tokenized, ...]
    """One sequence with every answer in it or, where the template renders earlier answers in another way than the
    last one, a sequence per answer, each exactly as it is asked later."""
    cut: bool
    """Whether the oldest turns, or the beginning of a question, were left out because they did not fit."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def label_tokens(self) -> int:
        """Those of them that are learned."""
        return sum(len(example.weights) - example.weights.count(0.0) for example in self.examples)


class _Span(NamedTuple):
    """Characters of the text that are learned, and how much each of their tokens counts."""

    start: int
    end: int
    weight: float


class _Text(NamedTuple):
    text: str
    spans: list[_Span]


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer in a model folder; it has a chat template and knows each token's place in the text.

    Raises: InvalidRequest (`model_not_available`) when it cannot be loaded or lacks one of these.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the boundary to transformers and tokenizers, which raise whatever a file brings about
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InvalidRequest(
            f"The tokenizer in {path} cannot be loaded: {reason}",
            code="model_not_available",
            hint="The folder needs tokenizer.json and tokenizer_config.json of a model that transformers knows.",
        ) from error
    if not tokenizer.chat_template:
        raise InvalidRequest(
            f"The model in {path} has no chat template, so ROSE cannot know how it was taught to read messages.",
            code="model_not_available",
            param="model",
            hint="Take the model's chat or instruct version, or put a chat_template.jinja into the folder.",
        )
    if not tokenizer.is_fast:
        raise InvalidRequest(
            f"The tokenizer in {path} is of the slow kind, which does not tell where a token stands in the text.",
            code="model_not_available",
            param="model",
            hint="Convert it to tokenizer.json with transformers, or take another model.",
        )
    return tokenizer


def render_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Return the token ids after which the model is to answer.

    Raises: InvalidRequest when the template refuses the messages, for example because of their roles.
    """
    text = _render(tokenizer, [prepare(message) for message in messages], tools, prompt=True)
    return _encode(tokenizer, text)[0]


def render_training(tokenizer: Any, example: ChatExample, maximum_tokens: int) -> Rendering:
    """Return what the model learns from an example: each answer, with the mark that ends it, given all before it.

    Where it does not fit into `maximum_tokens`, the oldest whole turns go, then the beginning of the last question;
    system messages and the last answer stay.

    Raises: InvalidDataset naming the example's line when the last answer alone does not fit, the template refuses
    the messages, or nothing is left to learn.
    """
    messages = [prepare(message) for message in example.messages]
    weights = [float(message.get("weight", 1)) for message in example.messages]
    try:
        return _render_training(_Chat(tokenizer, messages, weights, example.tools), maximum_tokens)
    except InvalidRequest as error:
        raise InvalidDataset(
            f"Example {example.number} (line {example.line}): {error.message}",
            code="invalid_training_file",
            param="training_file",
        ) from error


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the template's own mark and the tokenizer's end of sequence."""
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set[int]()
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        ids, _ = _encode(tokenizer, _render(tokenizer, messages, None, prompt=False))
    except InvalidRequest:
        return frozenset(ends)
    special = _special_ids(tokenizer)
    end = _end_mark(ids, range(len(ids)), special, lambda index: not tokenizer.decode([ids[index]]).strip())
    return frozenset(ends if end is None else {*ends, ids[end]})


def _end_mark(
    ids: Sequence[int], inside: Sequence[int], special: frozenset[int], is_blank: Callable[[int], bool]
) -> int | None:
    """Return which of the tokens `inside` ends the answer; None when only text does.

    What is blank behind it is never made by the model, nor what comes after that: some templates close the
    conversation with one more mark on a line of its own (Phi-3).
    """
    found: int | None = None
    blank_before = False
    for index in reversed(inside):
        if ids[index] in special:
            if found is not None:
                return index if blank_before else found
            found, blank_before = index, False
        elif is_blank(index):
            blank_before = True
        else:
            break
    return found


def prepare(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates want it: text content, tool calls with their arguments as objects, no nulls."""
    ready = {key: value for key, value in message.items() if value is not None and key not in _IN_THE_FILE_ONLY}
    role = message.get("role")
    if role == "developer":
        ready["role"] = "system"
    elif role == "function":
        ready["role"] = "tool"
    ready["content"] = _as_text(message.get("content"))
    calls: list[Any] = list(message.get("tool_calls") or ())
    if message.get("function_call"):
        calls.append({"type": "function", "function": message["function_call"]})
    if calls:
        ready["tool_calls"] = [_with_object_arguments(call) for call in calls]
    return ready


def _as_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)


def _with_object_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI gives the arguments as JSON in a string, templates print an object; the keys keep their order."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}


def _render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]] | None, *, prompt: bool
) -> str:
    """Return the template's text; `prompt` adds what comes before an answer.

    Templates of hybrid models are asked not to think aloud: training data holds answers without thoughts, and what is
    trained must be what is asked.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=[dict(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,
            chat_template=without_clock(tokenizer.get_chat_template(tools=tools)),
        )
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise InvalidRequest(
            f"The model's chat template refuses these messages: {(str(error).splitlines() or [''])[0][:300]}",
            code="messages_not_supported",
            param="messages",
        ) from error
    return text


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return token ids and their characters' places; a mark of the beginning that is written twice is one."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    places: list[tuple[int, int]] = list(encoded["offset_mapping"])
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        return ids[1:], places[1:]
    return ids, places


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


# --- training


class _Chat(NamedTuple):
    """A conversation of which some answers are learned."""

    tokenizer: Any
    messages: list[dict[str, Any]]
    weights: list[float]
    tools: Sequence[Mapping[str, Any]] | None

    def until(self, index: int) -> _Chat:
        """Return the conversation up to and with message `index`, of which only that one is learned."""
        return self._replace(messages=self.messages[: index + 1], weights=[0.0] * index + [self.weights[index]])

    def answers(self) -> list[int]:
        return [
            index
            for index, message in enumerate(self.messages)
            if message.get("role") == "assistant" and self.weights[index] > 0
        ]


def _render_training(chat: _Chat, maximum_tokens: int) -> Rendering:
    answers = chat.answers()
    if not answers:
        raise InvalidRequest("no assistant message, so nothing to learn from")
    last = answers[-1] + 1  # what comes after the last learned answer changes nothing
    chat = chat._replace(messages=chat.messages[:last], weights=chat.weights[:last])
    whole = _conversation(chat)
    if whole is None:
        fitted = [_fit(_single, _single(one), one, maximum_tokens) for one in map(chat.until, answers)]
    else:
        fitted = [_fit(_conversation, whole, chat, maximum_tokens)]
    return Rendering(examples=tuple(example for example, _ in fitted), cut=any(cut for _, cut in fitted))


def _conversation(chat: _Chat) -> Tokenized | None:
    """Return the conversation in one sequence; None when one of its answers follows another text than when asked.

    A template is prefix-preserving when the text up to an answer is the beginning of the whole text; the same must
    hold for the tokens.
    """
    whole = _render(chat.tokenizer, chat.messages, chat.tools, prompt=False)
    spans: list[_Span] = []
    for index in chat.answers():
        single = _answer(chat.until(index), whole if index == len(chat.messages) - 1 else None)
        if not whole.startswith(single.text):
            return None
        spans += single.spans
    ids, places = _encode(chat.tokenizer, whole)
    starts = {span.start for span in spans}
    if any(not starts.isdisjoint(range(start + 1, end)) for start, end in places):
        return None
    return _weigh(chat.tokenizer, _Text(whole, spans), ids, places)


def _single(chat: _Chat) -> Tokenized:
    """Return the last message, an answer, after the tokens with which it is asked."""
    rendered = _answer(chat)
    seam = rendered.spans[0].start
    ids, places = _encode(chat.tokenizer, rendered.text)
    if any(start < seam < end for start, end in places):
        # A token that reaches over the seam is never made: the prompt has ended before it.
        ids, places = _encode(chat.tokenizer, rendered.text[:seam])
        rest, rest_places = _encode(chat.tokenizer, rendered.text[seam:])
        ids, places = ids + rest, places + [(start + seam, end + seam) for start, end in rest_places]
    return _weigh(chat.tokenizer, rendered, ids, places)


def _answer(chat: _Chat, whole: str | None = None) -> _Text:
    """Return the prompt exactly as it is asked, followed by the last message, the answer.

    `whole` is the rendered conversation where it is known already. Raises: InvalidRequest when the answer is not in it.
    """
    weight = chat.weights[-1]
    whole = whole or _render(chat.tokenizer, chat.messages, chat.tools, prompt=False)
    if chat.messages[-1]["content"].strip()[-_PROOF_CHARACTERS:] not in whole:
        raise InvalidRequest("the model's chat template leaves out the answer's text")
    if len(chat.messages) == 1:
        start = max(whole.find(chat.messages[0]["content"]), 0)
        return _Text(whole, [_Span(start, len(whole), weight)])
    asked = _render(chat.tokenizer, chat.messages[:-1], chat.tools, prompt=True)
    if not whole.startswith(asked):
        # The prompt ends otherwise than the answer begins (an opened thought, say): ask as it is asked.
        shared = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(whole))
        whole = asked + whole[shared:]
    return _Text(whole, [_Span(len(asked), len(whole), weight)])


def _weigh(tokenizer: Any, rendered: _Text, ids: list[int], places: list[tuple[int, int]]) -> Tokenized:
    """Weigh the tokens of each span up to the mark that ends the answer.

    Raises: InvalidRequest when nothing is left to learn, whatever the reason.
    """
    special = _special_ids(tokenizer)
    weights = [0.0] * len(ids)
    inside: list[int] = []
    for span in rendered.spans:
        inside = [i for i, (start, end) in enumerate(places) if span.start <= start < end <= span.end]
        written = [i for i in inside if rendered.text[slice(*places[i])].strip()]
        end = _end_mark(ids, inside, special, lambda i, written=frozenset(written): i not in written)
        last = end if end is not None else max(written, default=-1)
        inside = [i for i in inside if i <= last]
        for i in inside:
            weights[i] = span.weight
    if inside and ids[inside[-1]] not in special and tokenizer.eos_token_id is not None:
        # A template without an end mark would teach the model to go on for ever.
        stop = inside[-1] + 1
        ids, weights = [*ids[:stop], tokenizer.eos_token_id], [*weights[:stop], rendered.spans[-1].weight]
    if weights:
        weights[0] = 0.0
    if not any(weights):
        raise InvalidRequest("the model's chat template leaves nothing of the answer to learn from")
    return Tokenized(ids=ids, weights=weights)


def _fit(
    tokenise: Callable[[_Chat], Tokenized | None], example: Tokenized, chat: _Chat, maximum_tokens: int
) -> tuple[Tokenized, bool]:
    """Return the conversation with as many of its newest turns as fit, and whether something had to go."""
    if len(example.ids) <= maximum_tokens:
        return example, False
    shortest = chat
    for shortest in _without_oldest_turns(chat):
        shorter = tokenise(shortest)
        if shorter is not None and len(shorter.ids) <= maximum_tokens:
            return shorter, True
    shortest = shortest.until(len(shortest.messages) - 1)
    return _cut_question(shortest, _single(shortest), maximum_tokens), True


def _without_oldest_turns(chat: _Chat) -> Iterable[_Chat]:
    """Yield the conversation without its oldest turn, without its two oldest, …; system messages at the start stay.

    A turn begins with a user's message.
    """
    messages, weights = chat.messages, chat.weights
    head = next((i for i, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    for start in range(head + 1, len(messages)):
        if messages[start].get("role") == "user":
            yield chat._replace(messages=messages[:head] + messages[start:], weights=weights[:head] + weights[start:])


def _cut_question(chat: _Chat, example: Tokenized, maximum_tokens: int) -> Tokenized:
    """Leave out the beginning of the only question that is left; the system messages before it stay if they fit."""
    first = next(i for i, weight in enumerate(example.weights) if weight)
    answer_tokens = len(example.ids) - first
    if answer_tokens + 1 > maximum_tokens:
        raise InvalidRequest(f"the answer alone has {answer_tokens} tokens; the model's context holds {maximum_tokens}")
    head = 0
    if chat.messages[0].get("role") == "system":
        with suppress(InvalidRequest):  # some templates refuse system messages alone
            kept = _encode(chat.tokenizer, _render(chat.tokenizer, chat.messages[:1], chat.tools, prompt=False))[0]
            if example.ids[: len(kept)] == kept and len(kept) + answer_tokens < maximum_tokens:
                head = len(kept)
    tail = len(example.ids) - (maximum_tokens - head)
    weights = example.weights[:head] + example.weights[tail:]
    return Tokenized(ids=example.ids[:head] + example.ids[tail:], weights=[0.0, *weights[1:]])
