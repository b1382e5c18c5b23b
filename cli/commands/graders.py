"""`rose graders …`: tries a grader on one answer, or checks it, before a training depends on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from cli.commands.files import require_file
from cli.options import COMMON, Common
from rose.api import schema
from rose.errors import InvalidRequest


def run(
    grader: Path,
    /,
    *,
    sample: Annotated[str, Parameter(name=["--sample", "-s"], env_var="ROSE_SAMPLE", allow_leading_hyphen=True)],
    item: Annotated[str | None, Parameter(name=["--item", "-i"], env_var="ROSE_ITEM")] = None,
    common: Common = COMMON,
) -> int:
    """Grade one answer: print the reward, and what went wrong. Exit 1 when anything did.

    Parameters
    ----------
    grader
        A JSON file with the grader.
    sample
        The answer to grade; `-` reads it from the standard input.
    item
        What `{{item.…}}` and `grade(sample, item)` get: a JSON object, or a file with one.
    """
    body = schema.RunGrader(
        grader=_object(grader),
        model_sample=sys.stdin.read() if sample == "-" else sample,
        item=None if item is None else _item(item),
    )
    with common.client() as client:
        found = client.run_grader(body)
    common.output.show(found, identity=f"{found.reward:g}", lines=_lines(found))
    faults = list(_faults(msgspec.to_builtins(found.metadata.errors)))
    if not common.json:
        for fault in faults:
            common.output.talk(fault)
    return 1 if faults else 0


def validate(grader: Path, /, *, common: Common = COMMON) -> None:
    """Check that a grader can be used: its fields, templates, formula, source, metric and model.

    Parameters
    ----------
    grader
        A JSON file with the grader.
    """
    with common.client() as client:
        found = client.validate_grader(schema.ValidateGrader(grader=_object(grader)))
    name = found.grader["name"]
    common.output.show(found, identity=name, lines=[f"{name} ({found.grader['type']}) can be used."])


def _lines(found: schema.GraderRun) -> Iterator[str]:
    yield f"reward {found.reward:g}"
    for name, reward in found.sub_rewards.items():
        yield f"  {name} {reward:g}"
    for model, usage in found.model_grader_token_usage_per_model.items():
        yield f"tokens of {model}: {usage.prompt_tokens} read, {usage.completion_tokens} made"


def _faults(errors: dict[str, Any]) -> Iterator[str]:
    for name, value in errors.items():
        if value is True:
            details = errors.get(f"{name}_details") or errors.get(f"{name}_type")
            yield f"{name}: {details}" if details else name


def _item(given: str) -> dict[str, Any]:
    if given.lstrip()[:1] != "{":
        return _object(Path(given))
    return _decoded(given.encode(), "--item")


def _object(path: Path) -> dict[str, Any]:
    require_file(path)
    return _decoded(path.read_bytes(), str(path))


def _decoded(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{where} is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must hold a JSON object.", code="invalid_json")
    return value
