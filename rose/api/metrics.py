"""`/v1/fine_tuning/jobs/{id}/metrics`: what a job measured at each step, by columns; all of it or an outline."""

from __future__ import annotations

import msgspec
from litestar import Response
from litestar.params import FromPath

from projections import jobs as jobs_view
from projections import metrics as metrics_view
from rose.api import schema
from rose.api.decoding import read_query
from rose.api.errors import AnyRequest
from rose.api.principal import ThePrincipal
from rose.api.routes import get
from rose.api.services import TheServices
from rose.decoding import check_values
from rose.errors import InvalidRequest
from rose.missing import missing_job


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """JobMetrics with lists that are JSON already."""

    object: str
    job_id: str
    steps: msgspec.Raw
    series: dict[str, msgspec.Raw]
    has_more: bool
    downsampled_from: int | None


@get("/v1/fine_tuning/jobs/{job_id:str}/metrics", answer=schema.JobMetrics, query=schema.JobMetricsQuery)
async def job_metrics(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, job_id: FromPath[str]
) -> Response[bytes]:
    """Return what a job measured, step by step: its losses, accuracies, learning rate, speed."""
    query = read_query(request, schema.JobMetricsQuery)
    if query.points is not msgspec.UNSET and query.limit is not msgspec.UNSET:
        raise InvalidRequest(
            "points and limit cannot be given together: points is about all steps after `after`.",
            code="invalid_value",
            param="points",
        )
    check_values({"fine_tune_id": job_id})
    if await jobs_view.get(services.pool, principal.project, job_id) is None:
        raise missing_job(job_id)
    names = _names(query.metrics, await metrics_view.names_of(services.pool, job_id))
    points = _points(query.points, names)
    if points is None:
        count = schema.MAX_METRIC_STEPS if query.limit is msgspec.UNSET else query.limit
        found = await metrics_view.page(services.pool, job_id, names, after_step=query.after, limit=count)
    else:
        found = await metrics_view.outline(services.pool, job_id, names, after_step=query.after, points=points)
    answer = _Answer(
        object="fine_tuning.job.metrics",
        job_id=job_id,
        steps=found.steps,
        series=found.series,
        has_more=found.has_more,
        downsampled_from=found.reported if points is not None and (found.reported or 0) > points else None,
    )
    return Response(msgspec.json.encode(answer), media_type="application/json", status_code=200)


def _names(given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if not given:
        return known
    names = tuple(dict.fromkeys(one.strip() for one in given.split(",")))
    for name in names:
        if name not in known:
            raise InvalidRequest(
                f"metrics names {name[:40]!r}; the series are {', '.join(known)}.",
                code="invalid_value",
                param="metrics",
            )
    return names


def _points(given: int | msgspec.UnsetType, names: tuple[str, ...]) -> int | None:
    fewest = metrics_view.fewest_points(len(names))
    if given is msgspec.UNSET:
        return None
    if given < fewest:
        raise InvalidRequest(
            f"points is {given}; it must be a whole number from {fewest} to {schema.MAX_METRIC_STEPS}, because the "
            f"first and last step and the lowest and highest of {len(names)} series stay.",
            code="invalid_value",
            param="points",
        )
    return given


HANDLERS = (job_metrics,)
