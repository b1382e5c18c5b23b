"""`/v1/fine_tuning/jobs`: create, list, read, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

import time
from typing import Any

import anyio.to_thread
import msgspec
from litestar import Response
from litestar.params import FromPath
from litestar.response import Stream

from projections import checkpoints as checkpoints_view
from projections import job_events as job_events_view
from projections import jobs as jobs_view
from rose.api import schema, wire
from rose.api.asking import asked, stored_answer
from rose.api.creating import ELSEWHERE, job_command
from rose.api.decoding import read_body, read_query
from rose.api.errors import AnyRequest
from rose.api.event_stream import Cursor, frames, is_complete
from rose.api.principal import ThePrincipal
from rose.api.routes import get, post
from rose.api.services import Services, TheServices
from rose.api.waiting import waiting_for
from rose.decoding import check_values
from rose.domain.job_commands import CancelJob, PauseJob, ResumeJob
from rose.domain.jobs import JobState
from rose.domain.messages import parse_event_id
from rose.errors import InvalidRequest, NoSpace
from rose.log.read import end_of_stream
from rose.missing import missing_job

MAX_JOBS_LISTED = 100
MAX_EVENTS_LISTED = 1000
MAX_CHECKPOINTS_LISTED = 100
YES = ("true", "True", "1")


@post("/v1/fine_tuning/jobs", answer=schema.Job, body=schema.CreateJob)
async def create_job(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Create a job; it is validated and trained by whichever trainer claims it."""
    body = await read_body(request, schema.CreateJob, elsewhere=ELSEWHERE)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return stored_answer(answered)
    command = await job_command(services, principal.project, body)
    await _require_space(services)
    outcome = await services.commands.create_job(
        command, asking, respond=_encoded, most_unfinished=services.settings.max_project_jobs
    )
    if outcome.replayed and outcome.response is not None:
        return stored_answer(outcome.response)
    return await _answer(services, outcome.state)


@get("/v1/fine_tuning/jobs", query=schema.JobsQuery)
async def list_jobs(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> schema.Listing[schema.Job]:
    """List jobs, newest first; `metadata[key]=value` selects, `metadata=null` selects those without metadata."""
    query = read_query(request, schema.JobsQuery)
    wanted = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if query.metadata not in ("", "null"):
        raise InvalidRequest(
            "metadata takes only null; metadata[KEY]=VALUE selects by a pair.", code="invalid_value", param="metadata"
        )
    found = await jobs_view.newest_first(
        services.pool,
        principal.project,
        limit=min(query.limit, MAX_JOBS_LISTED),
        after=query.after or None,
        metadata=wanted or None,
        without_metadata=query.metadata == "null",
    )
    waits = await waiting_for(services, principal.project, found.entries)
    now = time.time()
    data = [wire.job(state, now=now, waiting_for=waits.get(state.id)) for state in found.entries]
    return wire.listing(data, has_more=found.has_more)


@get("/v1/fine_tuning/jobs/{job_id:str}")
async def get_job(services: TheServices, principal: ThePrincipal, job_id: FromPath[str]) -> schema.Job:
    """Describe one job."""
    return await _described(services, await _existing(services, principal.project, job_id))


@post("/v1/fine_tuning/jobs/{job_id:str}/cancel", answer=schema.Job)
async def cancel_job(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, job_id: FromPath[str]
) -> Response[Any]:
    """End a job, at once from every state that is not final."""
    return await _change(request, services, principal.project, job_id, CancelJob(at=int(time.time())))


@post("/v1/fine_tuning/jobs/{job_id:str}/pause", answer=schema.Job)
async def pause_job(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, job_id: FromPath[str]
) -> Response[Any]:
    """Hold a queued or running job; a running one makes a recovery point first."""
    return await _change(request, services, principal.project, job_id, PauseJob(at=int(time.time())))


@post("/v1/fine_tuning/jobs/{job_id:str}/resume", answer=schema.Job)
async def resume_job(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, job_id: FromPath[str]
) -> Response[Any]:
    """Queue a paused job again; it goes on from its newest recovery point."""
    return await _change(request, services, principal.project, job_id, ResumeJob(at=int(time.time())))


@get(
    "/v1/fine_tuning/jobs/{job_id:str}/events",
    answer=schema.Listing[schema.JobEvent],
    other="text/event-stream",
    query=schema.JobEventsQuery,
)
async def list_events(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, job_id: FromPath[str]
) -> Response[Any] | Stream:
    """List a job's events, newest first, or stream them with `?stream=true` or `Accept: text/event-stream`."""
    query = read_query(request, schema.JobEventsQuery)
    state = await _existing(services, principal.project, job_id)
    if query.stream in YES or (
        query.stream is msgspec.UNSET and "text/event-stream" in request.headers.get("accept", "")
    ):
        return await _stream_events(request, services, state, query.after)
    try:
        after = await _cursor(services, job_id, query.after) if query.after else None
    except InvalidRequest:
        return Response(wire.listing(list[schema.JobEvent](), has_more=False), status_code=200)
    found = await job_events_view.newest_first(
        services.pool, job_id, limit=min(query.limit, MAX_EVENTS_LISTED), after=after
    )
    data = [wire.job_event(one.message, int(one.recorded_at.timestamp())) for one in found.entries]
    return Response(wire.listing(data, has_more=found.has_more), status_code=200)


@get("/v1/fine_tuning/jobs/{job_id:str}/checkpoints", query=schema.JobCheckpointsQuery)
async def list_checkpoints(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, job_id: FromPath[str]
) -> schema.Listing[schema.JobCheckpoint]:
    """List a job's checkpoints, newest first."""
    query = read_query(request, schema.JobCheckpointsQuery)
    await _existing(services, principal.project, job_id)
    limit = min(query.limit, MAX_CHECKPOINTS_LISTED)
    made = await checkpoints_view.newest_first(services.pool, job_id, limit=limit + 1, after=query.after or None)
    data = [wire.checkpoint(one) for one in made[:limit]]
    return wire.listing(data, has_more=len(made) > limit)


async def _change(
    request: AnyRequest, services: Services, project: str, job_id: str, command: CancelJob | PauseJob | ResumeJob
) -> Response[Any]:
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    await _existing(services, project, job_id)
    outcome = await services.commands.job(job_id, command, asking, respond=_encoded)
    if outcome.replayed and outcome.response is not None:
        return stored_answer(outcome.response)
    return await _answer(services, outcome.state)


async def _stream_events(
    request: AnyRequest, services: Services, state: JobState, after: str
) -> Response[Any] | Stream:
    cursor = await _resumed_from(request, services, state.id, after)
    if await is_complete(services, state, cursor):
        return Response(None, status_code=204)
    return Stream(
        frames(services, state.id, cursor, services.limits.take_stream(state.project)),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _cursor(services: Services, job_id: str, event_id: str) -> Cursor:
    """Return the place of a job event in the log. Raises: InvalidRequest when the job has no event there or later."""
    cursor = parse_event_id(event_id)
    if cursor[0] > await end_of_stream(services.pool, f"job/{job_id}"):
        raise InvalidRequest(f"{event_id!r} is no event of {job_id}.", code="invalid_value", param="after")
    return cursor


async def _resumed_from(request: AnyRequest, services: Services, job_id: str, after: str) -> Cursor | None:
    """Return where to go on. `Last-Event-ID` wins: a browser sends it on reconnect to an address with `after`."""
    last = request.headers.get("last-event-id")
    given = last or after
    if not given:
        return None
    try:
        return await _cursor(services, job_id, given)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, code=error.code, param="Last-Event-ID" if last else "after") from None


async def _existing(services: Services, project: str, job_id: str) -> JobState:
    check_values({"fine_tune_id": job_id})
    state = await jobs_view.get(services.pool, project, job_id)
    if state is None:
        raise missing_job(job_id)
    return state


async def _described(services: Services, state: JobState) -> schema.Job:
    waits = await waiting_for(services, state.project, [state])
    return wire.job(state, now=time.time(), waiting_for=waits.get(state.id))


async def _answer(services: Services, state: JobState) -> Response[Any]:
    return Response(await _described(services, state), status_code=200)


def _encoded(state: JobState) -> bytes:
    """Return the answer that is stored with the command, for repetitions of the request."""
    return msgspec.json.encode(wire.job(state, now=time.time()))


async def _require_space(services: Services) -> None:
    free = await anyio.to_thread.run_sync(services.blobs.free_bytes)
    if free < services.settings.min_free_bytes:
        raise NoSpace(
            f"Only {free >> 20} MB of disk are free; a job needs {services.settings.min_free_bytes >> 20} MB.",
            hint="Make room on that disk; `rose models delete` and `rose files delete` free theirs a day later.",
        )


HANDLERS = (
    create_job,
    list_jobs,
    get_job,
    cancel_job,
    pause_job,
    resume_job,
    list_events,
    list_checkpoints,
)
