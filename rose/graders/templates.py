"""Fills `{{item.path}}` and `{{sample.path}}` into texts. A path is made of `.name`, `[0]` and `["name"]`.

A text is put in as it is, everything else as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from rose.errors import InvalidRequest

NAMESPACES = ("item", "sample")
MAX_TEXT_CHARACTERS = 4 << 20
"""Longest text that a template may become: a template that repeats a long value must not fill the memory."""
_PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_NAME = re.compile(r"[^\W\d]\w*")
_STEP = re.compile(
    r"""\s*(?: \. \s* (?P<name>[\w-]+)
    | \[ \s* (?P<index>-?\d{1,9}) \s* \]
    | \[ \s* "(?P<double>[^"]*)" \s* \]
    | \[ \s* '(?P<single>[^']*)' \s* \] )""",
    re.VERBOSE,
)
MAX_SHOWN = 80

Path = tuple[str | int, ...]


class MissingVariable(Exception):
    """A template names what there is not."""


class UnreadableSample(MissingVariable):
    """A template needs the sample as JSON, and it is none."""


def sample_of(text: str) -> dict[str, Any]:
    """Return the namespace `sample` of a model's answer; `output_json` is there when the answer is JSON."""
    sample: dict[str, Any] = {
        "output_text": text,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
    }
    with suppress(msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        sample["output_json"] = msgspec.json.decode(text)
    return sample


def check(text: str, param: str) -> None:
    """Check that all templates in a text can be read. Raises: InvalidRequest naming the one that cannot."""
    for place in _PLACE.finditer(text):
        if _path(place[1]) is None:
            raise InvalidRequest(
                f"{param} has the template {_shown(place[0])}; a template is item or sample and where in it, "
                "for example {{item.answer}}, {{sample.output_text}} or {{item.choices[0].text}}.",
                code="invalid_template",
                param=param,
            )


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Return a text with its templates filled in from the namespaces in `values`.

    Raises: MissingVariable naming the template and what it could have been.
    """
    length = 0

    def value(place: re.Match[str]) -> str:
        nonlocal length
        path = _path(place[1])
        if path is None:
            raise MissingVariable(f"{_shown(place[0])} is no template that ROSE reads.")
        found = _text(_look_up(path, values))
        length += len(found)
        if length > MAX_TEXT_CHARACTERS:
            raise MissingVariable(
                f"With its templates filled in, the text is longer than {MAX_TEXT_CHARACTERS} letters."
            )
        return found

    return _PLACE.sub(value, text)


def _path(template: str) -> Path | None:
    """Return the steps that a template's inside stands for, or None when it is nothing of that kind."""
    template = template.strip()
    root = _NAME.match(template)
    if root is None or root[0] not in NAMESPACES:
        return None
    steps: list[str | int] = [root[0]]
    position = root.end()
    while position < len(template):
        step = _STEP.match(template, position)
        if step is None:
            return None
        if step["index"] is not None:
            steps.append(int(step["index"]))
        else:
            steps.append(next(text for text in (step["name"], step["double"], step["single"]) if text is not None))
        position = step.end()
    return tuple(steps)


def _look_up(path: Path, values: Mapping[str, Any]) -> Any:
    value: Any = values
    for depth, step in enumerate(path):
        where = _written(path[: depth + 1])
        if isinstance(value, Mapping):
            if step not in value:
                if path[: depth + 1] == ("sample", "output_json"):
                    raise UnreadableSample(f"{{{{{_written(path)}}}}}: the sample is not valid JSON.")
                known = ", ".join(str(key)[:MAX_SHOWN] for key in list(value)[:8]) or "nothing"
                raise MissingVariable(f"{{{{{where}}}}}: there is no {step!r}; there is {known}.")
            value = value[step]
        elif isinstance(value, list):
            index = int(step) if isinstance(step, int) or step.isdecimal() else None
            if index is None or not -len(value) <= index < len(value):
                raise MissingVariable(
                    f"{{{{{where}}}}}: it is a list of {len(value)}, so an index below that is needed."
                )
            value = value[index]
        else:
            raise MissingVariable(f"{{{{{where}}}}}: {_written(path[:depth])} has no parts.")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _written(path: Path) -> str:
    first, *rest = path
    return str(first) + "".join(f"[{step}]" if isinstance(step, int) else f".{step[:MAX_SHOWN]}" for step in rest)


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
