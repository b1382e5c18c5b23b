"""`rose finetune metrics`: a job's series at a glance, or step by step for a spreadsheet or a program."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from cli.options import COMMON, Common
from rose.errors import InvalidRequest

if TYPE_CHECKING:
    from rose.api import schema

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Characters of a sparkline."""
GLANCE = 500
"""Steps that a look at a whole job fetches."""

Column = list[float | None]


def metrics(
    job: str,
    /,
    *,
    points: Annotated[int | None, Parameter(env_var="ROSE_POINTS", validator=Number(gte=1))] = None,
    metrics: Annotated[str | None, Parameter(env_var="ROSE_METRICS")] = None,
    csv: Annotated[bool, Parameter(env_var="ROSE_CSV", negative="")] = False,
    common: Common = COMMON,
) -> None:
    """Show what a job measured: each series' course, first and last value, lowest and highest.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    points
        Leave out steps, so that at most so many stay; the ends and the extremes of each series do.
    metrics
        Names of series, with commas, for example `train_loss,valid_loss`; default: all.
    csv
        Print a line for each step, and a heading, for a spreadsheet.
    """
    if csv and common.json:
        raise InvalidRequest("--csv and --json are two forms of the same; choose one.", code="invalid_option")
    with common.client() as client:
        job_id = client.resolve(job, "ftjob_")
        wanted = {"metrics": metrics} if metrics else {}
        outline = {"points": points} if points else {}
        if csv:
            for line in _csv(client.job_metrics(job_id, **wanted, **outline)):
                common.output.piece(f"{line}\n")
            return
        whole = common.json and not points
        found = _joined(client.job_metrics(job_id, **wanted, **({} if whole else outline or {"points": GLANCE})))
    rows = [_row(name, found.steps, column) for name, column in found.series.items() if _numbers(column)]
    if sys.stdout.isatty():
        headings = ("series", "course", "first", "last", "lowest", "highest")
        rows = [(row[0], sparkline(found.series[row[0]]), *row[1:]) for row in rows]
    else:
        headings = ("series", "first", "last", "lowest", "highest")
    common.output.table(headings, rows, things=found, empty="Nothing has been measured yet.")


def sparkline(column: Column, width: int = WIDTH) -> str:
    """Return a column's course in one line: the mean of each part between the column's lowest and highest value."""
    numbers = _numbers(column)
    if not numbers:
        return ""
    count = min(width, len(numbers))
    cuts = [round(len(numbers) * place / count) for place in range(count + 1)]
    means = [sum(numbers[start:end]) / (end - start) for start, end in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def _row(name: str, steps: Sequence[int], column: Column) -> tuple[str, ...]:
    measured = [(value, step) for value, step in zip(column, steps, strict=True) if value is not None]
    low, high = min(measured), max(measured)
    first, last = measured[0][0], measured[-1][0]
    return (name, _short(first), _short(last), *(f"{_short(value)} at step {step}" for value, step in (low, high)))


def _csv(pages: Iterator[schema.JobMetrics]) -> Iterator[str]:
    heading = True
    for page in pages:
        if heading:
            yield ",".join(("step", *page.series))
            heading = False
        for cells in zip(page.steps, *page.series.values(), strict=True):
            yield ",".join("" if cell is None else str(cell) for cell in cells)


def _joined(pages: Iterator[schema.JobMetrics]) -> schema.JobMetrics:
    """Return all pages as one, in the API's shape."""
    found = next(pages)
    for page in pages:
        series = {name: column + page.series[name] for name, column in found.series.items()}
        found = msgspec.structs.replace(found, steps=found.steps + page.steps, series=series, has_more=page.has_more)
    return found


def _numbers(column: Column) -> list[float]:
    return [value for value in column if value is not None]


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
