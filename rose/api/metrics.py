"""`/v1/fine_tuning/jobs/{id}/metrics`: what a job measured at each step, by columns; all of it or an outline."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Response
from litestar.openapi.spec import OpenAPIType, Parameter, Schema
from litestar.params import FromPath

from projections import jobs as jobs_view
from projections import metrics as metrics_view
from rose.api.body import check_values
from rose.api.errors import AnyRequest
from rose.api.principal import ThePrincipal
from rose.api.routes import get, text
from rose.api.services import TheServices
from rose.errors import InvalidRequest
from rose.missing import missing_job

MAX_STEPS = 10_000
"""Most steps of one answer."""
LAST_STEP = (1 << 31) - 1


class JobMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Series of a job. `steps` and every list in `series` are equally long."""

    object: str
    job_id: str
    steps: list[int]
    series: dict[str, list[float | None]]
    """By name; null at a step where that was not measured."""
    has_more: bool
    """There are later steps: ask again with `after`, the last step here."""
    downsampled_from: int | None
    """How many steps these stand for; null when none was left out."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """JobMetrics with lists that are JSON already."""

    object: str
    job_id: str
    steps: msgspec.Raw
    series: dict[str, msgspec.Raw]
    has_more: bool
    downsampled_from: int | None


def _number(name: str, lowest: int, highest: int, description: str) -> Parameter:
    schema = Schema(type=OpenAPIType.INTEGER, minimum=lowest, maximum=highest)
    return Parameter(name, "query", schema=schema, description=description)


QUERIES = (
    text("metrics", f"Names of series, with commas; all when absent: {', '.join(metrics_view.NAMES)}."),
    _number("after", 0, LAST_STEP, "The step to go on behind."),
    _number("limit", 0, MAX_STEPS, f"Steps of the answer, {MAX_STEPS} when absent. Not together with points."),
    _number(
        "points",
        metrics_view.fewest_points(1),
        MAX_STEPS,
        "Leave out steps, so that at most so many stay: the first, the last, and the lowest and highest of each series "
        "in each part of the run, others at even distances. At least 2, and 2 more for each series.",
    ),
)


@get("/v1/fine_tuning/jobs/{job_id:str}/metrics", answer=JobMetrics, queries=QUERIES)
async def job_metrics(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, job_id: FromPath[str]
) -> Response[bytes]:
    """Return what a job measured, step by step: its losses, accuracies, learning rate, speed."""
    names = _names(request.query_params.get("metrics"))
    after = _whole(request, "after", 0, LAST_STEP) or 0
    limit = _whole(request, "limit", 0, MAX_STEPS)
    points = _points(request, names)
    if points is not None and limit is not None:
        raise InvalidRequest(
            "points and limit cannot be given together: points is about all steps after `after`.",
            code="invalid_value",
            param="points",
        )
    check_values({"fine_tune_id": job_id})
    if await jobs_view.get(services.pool, principal.project, job_id) is None:
        raise missing_job(job_id)
    if points is None:
        count = MAX_STEPS if limit is None else limit
        found = await metrics_view.page(services.pool, job_id, names, after_step=after, limit=count)
    else:
        found = await metrics_view.outline(services.pool, job_id, names, after_step=after, points=points)
    answer = _Answer(
        object="fine_tuning.job.metrics",
        job_id=job_id,
        steps=found.steps,
        series=found.series,
        has_more=found.has_more,
        downsampled_from=found.reported if points is not None and (found.reported or 0) > points else None,
    )
    return Response(msgspec.json.encode(answer), media_type="application/json", status_code=200)


def _names(given: str | None) -> tuple[str, ...]:
    if not given:
        return metrics_view.NAMES
    names = tuple(dict.fromkeys(one.strip() for one in given.split(",")))
    for name in names:
        if name not in metrics_view.NAMES:
            raise InvalidRequest(
                f"metrics names {name[:40]!r}; the series are {', '.join(metrics_view.NAMES)}.",
                code="invalid_value",
                param="metrics",
            )
    return names


def _points(request: AnyRequest, names: tuple[str, ...]) -> int | None:
    fewest = metrics_view.fewest_points(len(names))
    why = f", because the first and last step and the lowest and highest of {len(names)} series stay"
    return _whole(request, "points", fewest, MAX_STEPS, why)


def _whole(request: AnyRequest, name: str, lowest: int, highest: int, why: str = "") -> int | None:
    """Return a whole number of the address, None when absent. Raises: InvalidRequest naming it."""
    given: Any = request.query_params.get(name)
    if given in (None, ""):
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 20 and lowest <= int(given) <= highest):
        raise InvalidRequest(
            f"{name} is {given[:40]!r}; it must be a whole number from {lowest} to {highest}{why}.",
            code="invalid_value",
            param=name,
        )
    return int(given)


HANDLERS = (job_metrics,)
