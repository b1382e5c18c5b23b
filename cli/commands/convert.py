"""`rose files convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from cli.options import COMMON, Common
from cli.output import size
from rose.errors import InvalidRequest

if TYPE_CHECKING:
    from rose.conversion.converting import Report

_MOST_SHOWN = 20
_ROLES = ("user", "assistant", "system")

Format = Literal[
    "chat",
    "dpo",
    "rft",
    "batch",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "preference",
    "kto",
    "anthropic",
    "gemini",
    "mistral",
    "text",
]


def convert(
    *inputs: Path,
    to_file: Annotated[Path, Parameter(name=["--output", "-o"], env_var="ROSE_CONVERTED")],
    from_format: Annotated[Format | None, Parameter(name="--from", env_var="ROSE_FROM_FORMAT")] = None,
    to: Annotated[Literal["chat"] | None, Parameter(env_var="ROSE_TO_FORMAT")] = None,
    columns: Annotated[str | None, Parameter(name="--map", env_var="ROSE_MAP")] = None,
    allow_drops: Annotated[bool, Parameter(env_var="ROSE_ALLOW_DROPS", negative="")] = False,
    dataset: Annotated[str | None, Parameter(env_var="ROSE_DATASET")] = None,
    common: Common = COMMON,
) -> None:
    """Convert data of other services and tools to chat JSONL; no server is needed.

    Parameters
    ----------
    inputs
        Files of one format, or a folder with a data set. Of a batch: requests and output.
    to_file
        The file to write; beside it, in the same name and `.source.json`, what it was made from.
    from_format
        The format, where the rows do not say it.
    to
        Take the preferred answers of preference pairs, and leave the others out.
    columns
        Which columns hold what: user=COLUMN,assistant=COLUMN and, where there is one, system=COLUMN.
    allow_drops
        Write the file also when more than 1 % of the rows are left out.
    dataset
        Name of the data set, where a folder has several.
    """
    from rose.conversion.converting import Request
    from rose.conversion.converting import convert as converted

    if not inputs:
        raise InvalidRequest("No file is named.", param="inputs", hint="rose files convert IN -o OUT.jsonl")
    report = converted(
        Request(
            inputs=inputs,
            target=to_file,
            format=from_format,
            to_chat=to == "chat",
            columns=_columns(columns),
            allow_drops=allow_drops,
            dataset=dataset,
        )
    )
    common.output.show(report, identity=report.output, lines=_lines(report))
    if report.kind == "preference":
        common.output.talk(
            "These are pairs to prefer by: `rose finetune create --method dpo`, or only what is preferred: --to chat"
        )


def _columns(given: str | None) -> dict[str, str]:
    """Read `user=question,assistant=answer`."""
    if given is None:
        return {}
    pairs = [piece.partition("=") for piece in given.split(",")]
    columns = {role.strip(): column.strip() for role, _, column in pairs}
    wrong = [role for role, column in columns.items() if role not in _ROLES or not column]
    if wrong or not {"user", "assistant"} <= set(columns) or len(columns) != len(pairs):
        raise InvalidRequest(
            f"--map is {given!r}; expected user=COLUMN,assistant=COLUMN and perhaps system=COLUMN.", param="map"
        )
    return columns


def _lines(report: Report) -> list[str]:
    lines = [f"{one.path}: {one.what}, {size(one.bytes)}" for one in report.sources]
    lines.append(f"read as {report.title}: {_counted(report.rows, 'row')}")
    lines += [f"  {text} ({_counted(count, 'row')})" for text, count in report.notes.items()]
    what = "conversation" if report.kind == "chat" else "pair"
    lines.append(f"{report.output}: {_counted(report.written, what)}, {size(report.bytes)}")
    if report.dropped:
        lines.append(f"left out: {_counted(report.dropped, 'row')}")
        lines += [f"  {one.place}  {one.reason}" for one in report.drops[:_MOST_SHOWN]]
        if report.dropped > _MOST_SHOWN:
            lines.append(f"  … and {report.dropped - _MOST_SHOWN} more; {report.output}.source.json names them")
    return lines


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
