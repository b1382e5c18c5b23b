"""What projects use: tokens of answers by time in OpenAI's shape, and all of a project at once.

A key of the scope admin sees every project, any other one its own.
"""

from __future__ import annotations

import re
import time
from typing import Any, get_args

from litestar.params import FromPath

from projections import answers, runs, storage
from projections import jobs as jobs_view
from projections import projects as projects_view
from rose.api import schema
from rose.api.errors import AnyRequest
from rose.api.principal import Principal, ThePrincipal
from rose.api.routes import get
from rose.api.services import TheServices
from rose.decoding import check_values, convert
from rose.domain.job_values import Status
from rose.errors import InvalidRequest
from rose.tenants import missing_project
from rose.usage import HOUR_SECONDS

CURRENT = "current"
"""Stands in the address for the project that the caller's key works in."""
WIDTHS = {"1h": (HOUR_SECONDS, 24, 168), "1d": (24 * HOUR_SECONDS, 7, 31)}
"""Seconds of a bucket, and how many are on a page by default and at most: OpenAI's numbers."""
LISTS = ("group_by", "project_ids", "models")
_PAGE = re.compile(r"page_(\d{1,12})")


@get("/v1/organization/projects/{project_id:str}/usage")
async def project_usage(
    services: TheServices, principal: ThePrincipal, project_id: FromPath[str]
) -> schema.ProjectUsage:
    """Add up what a project has done and what it stores; `current` is the project that the key works in."""
    check_values({"project_id": project_id})
    project = principal.project if project_id == CURRENT else project_id
    if not _may_see(principal, project) or await projects_view.get(services.pool, project) is None:
        raise missing_project(project_id)
    await services.meter.flush()
    totals = await jobs_view.totals(services.pool, project)
    stored = await storage.of_project(services.pool, project)
    answered = await answers.total(services.pool, project)
    settings = services.settings
    return schema.ProjectUsage(
        project_id=project,
        jobs={status: totals.jobs.get(status, 0) for status in get_args(Status)},
        trained_tokens=totals.trained_tokens,
        training_seconds=round(await runs.training_seconds(services.pool, project), 3),
        stored_bytes=schema.StoredBytes(
            files=stored.files, uploads=stored.uploads, models=stored.models, total=stored.total
        ),
        completions=schema.AnsweredTokens(
            num_model_requests=answered.requests,
            input_tokens=answered.prompt_tokens,
            output_tokens=answered.completion_tokens,
        ),
        limits=schema.ProjectLimits(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            unfinished_jobs=settings.max_project_jobs,
            stored_bytes=settings.max_project_bytes,
            event_streams=settings.max_project_event_streams,
        ),
    )


@get("/v1/organization/usage/completions", query=schema.CompletionsUsageQuery)
async def completions_usage(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> schema.UsagePage:
    """Add up the tokens of answers by time, and by project and model where asked for."""
    query = _query(request)
    width, default, most = WIDTHS[query.bucket_width]
    start = (query.start_time if query.page is None else _page(query.page)) // width * width
    after_now = int(time.time()) + 1
    end = after_now if query.end_time is None else min(query.end_time, after_now)
    if query.end_time is not None and query.end_time <= query.start_time:
        raise InvalidRequest(
            f"end_time is {query.end_time}; it must lie behind start_time ({query.start_time}).",
            code="invalid_value",
            param="end_time",
        )
    buckets = max(-(-(end - start) // width), 0)
    shown = min(buckets, query.limit or default, most)
    until = start + shown * width
    projects = query.project_ids
    if "admin" not in principal.scopes:
        projects = [principal.project] if projects is None or principal.project in projects else []
    await services.meter.flush()
    found = await answers.buckets(
        services.pool,
        start,
        until,
        width,
        by_project="project_id" in (query.group_by or ()),
        by_model="model" in (query.group_by or ()),
        projects=projects,
        models=query.models,
    )
    results: dict[int, list[schema.CompletionsUsageResult]] = {}
    for one in found:
        result = schema.CompletionsUsageResult(
            project_id=one.project,
            model=one.model,
            num_model_requests=one.requests,
            input_tokens=one.prompt_tokens,
            output_tokens=one.completion_tokens,
        )
        results.setdefault(one.start, []).append(result)
    more = shown < buckets
    return schema.UsagePage(
        data=[
            schema.UsageBucket(start_time=at, end_time=at + width, results=results.get(at, []))
            for at in range(start, until, width)
        ],
        has_more=more,
        next_page=f"page_{until}" if more else None,
    )


def _may_see(principal: Principal, project: str) -> bool:
    return project == principal.project or "admin" in principal.scopes


def _query(request: AnyRequest) -> schema.CompletionsUsageQuery:
    """Read the address; the SDKs write lists as `group_by[]=model`, and several of them one behind the other."""
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        field = name.removesuffix("[]")
        if value == "":
            continue
        if field in LISTS:
            given.setdefault(field, []).append(value)
        else:
            given[name] = value
    check_values(given)
    return convert(given, schema.CompletionsUsageQuery, texts=True)


def _page(given: str) -> int:
    found = _PAGE.fullmatch(given)
    if found is None:
        raise InvalidRequest(
            f"page is {given[:40]!r}; it must be next_page of another page.", code="invalid_value", param="page"
        )
    return int(found[1])


HANDLERS = (project_usage, completions_usage)
