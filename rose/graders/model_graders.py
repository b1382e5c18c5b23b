"""What a grading model is asked, and how its answer is read. Pure: whoever grades brings the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from rose.graders import templates
from rose.graders.kinds import LabelModel, Message, SamplingParams, ScoreModel
from rose.graders.results import Fault, Usage

_STEPS = '"steps": [{"description": "…", "conclusion": "…"}]'
MAX_EXCERPT = 300


class ModelAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a model answered."""

    text: str
    usage: Usage
    refusal: str | None = None
    cut: bool = False
    """Whether the answer ends only because it may not be longer."""


class Asker(Protocol):
    """Asks a model. Raises: Fault when it cannot answer."""

    def __call__(
        self, model: str, messages: list[dict[str, Any]], sampling: SamplingParams
    ) -> Awaitable[ModelAnswer]: ...


def messages_for(grader: ScoreModel | LabelModel, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the conversation that a model is asked, with how to answer at its end.

    Raises: templates.MissingVariable.
    """
    messages = [{"role": message.role, "content": _content(message, values)} for message in grader.input]
    wish = _score_wish(grader) if isinstance(grader, ScoreModel) else _label_wish(grader)
    if messages[-1]["role"] == "user":
        messages[-1]["content"] += f"\n\n{wish}"
    else:
        messages.append({"role": "user", "content": wish})
    return messages


def score(grader: ScoreModel, answer: ModelAnswer) -> float:
    """Return the score in an answer, within the grader's range. Raises: Fault when there is none."""
    for found in _objects(answer.text):
        value = found.get("result")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return _within(grader, float(value))
    try:
        alone = float(answer.text.strip())
    except ValueError:
        alone = math.nan
    if math.isfinite(alone):
        return _within(grader, alone)
    raise _unreadable(answer, 'no {"result": number}')


def passes(grader: LabelModel, answer: ModelAnswer) -> bool:
    """Say whether the label in an answer is a passing one. Raises: Fault when there is no label."""
    told = [found.get("result") for found in _objects(answer.text)]
    for text in [*told, answer.text]:
        label = _label(grader.labels, text)
        if label is not None:
            return label in grader.passing_labels
    raise _unreadable(answer, f"none of the labels {', '.join(grader.labels)[:MAX_EXCERPT]}")


def _content(message: Message, values: Mapping[str, Any]) -> str:
    parts = message.content if isinstance(message.content, list) else [message.content]
    return "\n".join(templates.fill(part if isinstance(part, str) else part.text, values) for part in parts)


def _score_wish(grader: ScoreModel) -> str:
    low, high = grader.limits
    return (
        f'Answer with one JSON object and nothing else: {{{_STEPS}, "result": number}}. '
        f"The result is a number from {low:g} to {high:g}."
    )


def _label_wish(grader: LabelModel) -> str:
    labels = ", ".join(json.dumps(label, ensure_ascii=False) for label in grader.labels)
    return f'Answer with one JSON object and nothing else: {{{_STEPS}, "result": label}}. The label is one of {labels}.'


def _within(grader: ScoreModel, value: float) -> float:
    low, high = grader.limits
    return min(high, max(low, value))


def _label(labels: Sequence[str], text: Any) -> str | None:
    """Return the label that a text is, or, if no other fits, is but for its case and punctuation."""
    if not isinstance(text, str):
        return None
    if text.strip() in labels:
        return text.strip()
    plain = [label for label in labels if _plain(label) == _plain(text)]
    return plain[0] if len(plain) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", text).casefold()


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in an answer, the last one first: a model may write something before or around it."""
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            found.append(value)
        position = text.find("{", end)
    yield from reversed(found)


def _unreadable(answer: ModelAnswer, missing: str) -> Fault:
    if answer.refusal:
        return Fault("model_grader_refusal_error", answer.refusal[:MAX_EXCERPT])
    if not answer.text.strip():
        return Fault("unresponsive_reward_error", "The model answered with nothing.")
    why = " It was cut off at its token limit." if answer.cut else ""
    return Fault("model_grader_parse_error", f"The answer has {missing}.{why} It is: {answer.text[:MAX_EXCERPT]!r}")
