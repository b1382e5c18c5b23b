"""Reads a grader from JSON: every refusal names the field, what it is and what it may be.

Two kinds of faults: what is no grader at all is refused by `read`; what can be read but never gives a reward (a formula
or a template that makes no sense) by `check`, and shows as a flag of the errors when the grader is run all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from rose.decoding import convert
from rose.errors import InvalidRequest
from rose.graders import formula, templates
from rose.graders.kinds import (
    MAX_SOURCE_BYTES,
    Grader,
    LabelModel,
    Message,
    Multi,
    Python,
    ScoreModel,
    Single,
    StringCheck,
    TextSimilarity,
)
from rose.wording import type_of

KINDS: Mapping[str, Any] = {
    "string_check": StringCheck,
    "text_similarity": TextSimilarity,
    "python": Python,
    "score_model": ScoreModel,
    "label_model": LabelModel,
    "multi": Multi,
}
MAX_GRADERS = 32
"""Most graders of a multi grader."""


def read(value: Any, param: str = "grader") -> Grader:
    """Return the grader in a JSON value. Raises: InvalidRequest naming the field that is wrong."""
    kind = _kind(value, param, tuple(name for name in KINDS if name != "label_model"))
    if kind != "multi":
        return _single(value, param)
    if value.get("graders") is None:
        return convert(value, Multi, param)  # which says what is wrong
    # What is read already is taken over as it is.
    return convert({**value, "graders": _several(value["graders"], f"{param}.graders")}, Multi, param)


def check(grader: Grader, param: str = "grader") -> None:
    """Check that a grader can give a reward at all. Raises: InvalidRequest naming the field that is wrong."""
    for where, text in texts(grader, param):
        templates.check(text, where)
    if isinstance(grader, Multi):
        where = f"{param}.calculate_output"
        try:
            formula.Formula(grader.calculate_output, frozenset(grader.graders))
        except formula.FormulaError as error:
            raise InvalidRequest(f"{where} makes no formula: {error}.", code="invalid_formula", param=where) from None


def parts(grader: Grader, param: str = "grader") -> Iterator[tuple[str, Single]]:
    """Yield the graders that compute something, with the path of each: the grader itself, or those of a multi."""
    if isinstance(grader, Multi):
        for name, one in grader.graders.items():
            yield f"{param}.graders.{name}", one
    else:
        yield param, grader


def texts(grader: Grader, param: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of a grader that may hold templates, with the path of each."""
    for where, one in parts(grader, param):
        match one:
            case StringCheck() | TextSimilarity():
                yield f"{where}.input", one.input
                yield f"{where}.reference", one.reference
            case ScoreModel() | LabelModel():
                for index, message in enumerate(one.input):
                    yield from ((f"{where}.input[{index}].content", text) for text in texts_of(message))
            case Python():
                pass


def texts_of(message: Message) -> list[str]:
    """Return the texts of a message, in order."""
    content = message.content if isinstance(message.content, list) else [message.content]
    return [part if isinstance(part, str) else part.text for part in content]


def _several(value: Any, param: str) -> dict[str, Single]:
    """Return the graders of a multi grader: a map, or one alone, which the SDKs' types have, under its own name."""
    if not isinstance(value, dict):
        _wrong(param, "must be an object of graders by name", code="invalid_type")
    if isinstance(value.get("type"), str):
        only = _single(value, param)
        if not formula.is_name(only.name):
            _wrong(f"{param}.name", _unnameable(only.name))
        return {only.name: only}
    if not 0 < len(value) <= MAX_GRADERS:
        _wrong(param, f"must have 1 to {MAX_GRADERS} graders; it has {len(value)}")
    for name in value:
        if not formula.is_name(name):
            _wrong(param, _unnameable(name))
    return {name: _single(one, f"{param}.{name}") for name, one in value.items()}


def _unnameable(name: str) -> str:
    return f"has {name[:80]!r}, which no formula can name; use letters, digits and _, for example {_near(name)!r}"


def _near(name: str) -> str:
    return re.sub(r"\W+", "_", f"_{name}" if name[:1].isdigit() else name)[:40].strip("_") or "exact"


def _kind(value: Any, param: str, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, dict):
        _wrong(param, f"must be an object; it is {type_of(value)}", code="invalid_type")
    kind = value.get("type")
    if kind is None:
        _wrong(
            f"{param}.type", f"is missing; it must be one of {', '.join(allowed)}", code="missing_required_parameter"
        )
    if kind == "label_model" and kind not in allowed:
        _wrong(f"{param}.type", "is 'label_model', which stands only in the graders of a multi grader")
    if not isinstance(kind, str) or kind not in allowed:
        _wrong(f"{param}.type", f"is {str(kind)[:80]!r}; it must be one of {', '.join(allowed)}")
    return kind


def _single(value: Any, param: str) -> Single:
    kind = _kind(value, param, tuple(name for name in KINDS if name != "multi"))
    if "input" in value and kind in ("score_model", "label_model"):
        _refuse_other_media(value["input"], f"{param}.input")
    grader = convert(value, KINDS[kind], param)
    match grader:
        case Python(source=source) if len(source.encode()) > MAX_SOURCE_BYTES:
            _wrong(f"{param}.source", f"has more than {MAX_SOURCE_BYTES >> 10} kB")
        case ScoreModel(range=(low, high)) if not low < high:
            _wrong(f"{param}.range", f"is [{low:g}, {high:g}]; the first number must be below the second")
        case LabelModel(labels=labels, passing_labels=passing):
            strangers = [label for label in passing if label not in labels]
            if strangers:
                _wrong(
                    f"{param}.passing_labels",
                    f"has {strangers[0][:80]!r}; it may have labels only: {', '.join(labels)[:200]}",
                )
        case _:
            pass
    return grader


def _refuse_other_media(messages: Any, param: str) -> None:
    given: list[Any] = messages if isinstance(messages, list) else []
    for index, message in enumerate(given):
        content: Any = message.get("content") if isinstance(message, dict) else None
        parts: list[Any] = content if isinstance(content, list) else [content]
        for part in parts:
            kind: Any = part.get("type") if isinstance(part, dict) else "input_text"
            if kind not in ("input_text", "output_text"):
                where = f"{param}[{index}].content"
                raise _error(
                    f"{where} has a part of type {str(kind)[:80]!r}; it may be input_text or output_text: models of "
                    "ROSE read text only.",
                    "unsupported_content",
                    where,
                )


def _error(message: str, code: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, code=code, param=param)


def _wrong(param: str, what: str, *, code: str = "invalid_value") -> NoReturn:
    raise _error(f"{param} {what}.", code, param)
