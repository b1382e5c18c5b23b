"""The one loop that changes anything: load the row, decide, append, and decide again when another writer was first."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

import anyio
import msgspec

from projections import files as files_view
from projections import jobs as jobs_view
from projections import models as models_view
from projections.damage import whole
from rose import quotas
from rose.domain import bases, files, job_commands, jobs, models
from rose.domain.catalogue import Event
from rose.domain.hyperparameters import LoraSettings
from rose.errors import Conflict, InvalidState, NotFound, StaleEpoch
from rose.log import read
from rose.log.append import (
    Actor,
    EntityRow,
    KeyReused,
    LeaseChange,
    ModelNameTaken,
    Quota,
    QuotaExceeded,
    StreamWrite,
    append,
)
from rose.missing import missing_file, missing_job

if TYPE_CHECKING:
    from rose.log.pool import Pool

State = TypeVar("State")

MAX_TRIES = 50
MAX_NAME_NUMBER = 1000
RETRY_WINDOW_SECONDS = 120.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, and how a repetition of the same request is recognised."""

    actor: Actor
    command_id: str = msgspec.field(default_factory=lambda: str(uuid4()))
    """The client's `Idempotency-Key`, an id derived by a trainer, or a fresh one."""
    request_hash: str | None = None
    """Hash of caller, path and body; the same command id with another hash is refused."""


class Outcome(msgspec.Struct, Generic[State], frozen=True, kw_only=True):
    """What a command led to."""

    state: State
    version: int
    events: tuple[Event, ...]
    position: int | None
    """Log position of the last event; None when nothing had to change."""
    replayed: bool = False
    """True when this request had been answered before; `response` is that answer."""
    response: bytes | None = None


Respond = Callable[[Any], bytes]
"""Makes the answer that is stored with the command, from the new state."""


class Commands:
    """Everything that can be asked of ROSE. Safe to share between tasks; holds no state of its own."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def job(
        self,
        job_id: str,
        command: job_commands.Command,
        request: Request,
        *,
        fenced: bool = False,
        lease: LeaseChange | None = None,
        respond: Respond | None = None,
    ) -> Outcome[jobs.JobState]:
        """Decide `command` on a job and append what follows.

        `lease` is written with the append; a job that ends loses its lease instead. `fenced` makes the append carry
        the command's epoch, so that it is refused once the lease is lost.

        Raises: NotFound, InvalidState, StaleEpoch, DamagedRow; Conflict when a claim meets a live lease.
        """
        epoch: int | None = getattr(command, "epoch") if fenced else None  # noqa: B009 - only run commands have one

        def write(state: jobs.JobState, version: int) -> tuple[jobs.JobState, list[StreamWrite]]:
            happened = jobs.decide(command, state)
            after = _fold(jobs.evolve, state, happened)
            if not happened and lease is None:
                return after, []
            change = _revoke(state) if after.is_terminal else lease
            return after, [_job_write(job_id, version, happened, after, epoch, change)]

        return await self._loop(lambda: self._load_job(job_id), write, request, respond)

    async def create_job(
        self,
        command: job_commands.CreateJob,
        request: Request,
        *,
        respond: Respond | None = None,
        most_unfinished: int | None = None,
    ) -> Outcome[jobs.JobState]:
        """Create a job; a model name that is taken gets `-2`, `-3`, …

        Raises: LimitReached when the project has `most_unfinished` jobs that have not ended.
        """
        for number in range(1, MAX_NAME_NUMBER):
            name = bases.fine_tuned_name(command.model, command.at, command.suffix, number=number)
            named = msgspec.structs.replace(command, model_name=name)
            happened = jobs.decide(named, jobs.initial)
            state = _fold(jobs.evolve, jobs.initial, happened)
            write = _job_write(command.job_id, 0, happened, state, None, None)
            if most_unfinished is not None:
                quota = Quota(of="jobs", project=command.project, adds=1, most=most_unfinished)
                write = msgspec.structs.replace(write, quota=quota)
            try:
                return await self._append(state, 0, happened, [write], request, respond)
            except ModelNameTaken:
                continue
            except QuotaExceeded:
                raise await quotas.too_many_jobs(self._pool, command.project, most_unfinished or 0) from None
        raise Conflict(f"No free name is left for {command.model} with suffix {command.suffix!r} in this second.")

    async def succeed(
        self,
        job_id: str,
        command: job_commands.Succeed,
        result_file: files.AddFile,
        request: Request,
    ) -> Outcome[jobs.JobState]:
        """End a job with its model: job, model and result file in one append, fenced by the epoch.

        Raises: StaleEpoch, InvalidState.
        """

        def write(state: jobs.JobState, version: int) -> tuple[jobs.JobState, list[StreamWrite]]:
            happened = jobs.decide(command, state)
            after = _fold(jobs.evolve, state, happened)
            if state.base is None or state.hyperparameters is None:
                raise StaleEpoch(f"The job {job_id} was never validated.")
            lora: LoraSettings | None = state.hyperparameters.lora_config if command.kind == "adapter" else None
            register = models.RegisterModel(
                project=state.project,
                job_id=job_id,
                name=state.model_name,
                at=command.at,
                kind=command.kind,
                artifact=command.artifact,
                base=state.base,
                lora=lora,
                step=command.step,
                thinking=state.hyperparameters.thinking,
            )
            registered = models.decide(register, models.initial)
            model = _fold(models.evolve, models.initial, registered)
            uploaded = files.decide(result_file, files.initial)
            file = _fold(files.evolve, files.initial, uploaded)
            return after, [
                _job_write(job_id, version, happened, after, command.epoch, _revoke(state)),
                StreamWrite(
                    stream_id=f"model/{job_id}", expected_version=0, events=registered, row=models_view.row(model)
                ),
                StreamWrite(stream_id=f"file/{file.id}", expected_version=0, events=uploaded, row=files_view.row(file)),
            ]

        return await self._loop(lambda: self._load_job(job_id), write, request, None)

    async def add_file(
        self,
        command: files.AddFile,
        request: Request,
        *,
        respond: Respond | None = None,
        most_bytes: int | None = None,
    ) -> Outcome[files.FileState]:
        """Register an uploaded file whose content lies in the blob folder already.

        Raises: LimitReached when the project would store more than `most_bytes`.
        """
        happened = files.decide(command, files.initial)
        state = _fold(files.evolve, files.initial, happened)
        size = command.artifact.bytes
        write = StreamWrite(
            stream_id=f"file/{command.file_id}",
            expected_version=0,
            events=happened,
            row=files_view.row(state),
            quota=quotas.of_bytes(command.project, size, most_bytes),
        )
        try:
            return await self._append(state, 0, happened, [write], request, respond)
        except QuotaExceeded:
            raise await quotas.too_many_bytes(self._pool, command.project, size, most_bytes or 0) from None

    async def delete_file(
        self, file_id: str, at: int, request: Request, *, respond: Respond | None = None
    ) -> Outcome[files.FileState]:
        """End a file's use. Raises: NotFound, DamagedRow."""

        async def load() -> tuple[files.FileState, int]:
            found = await read.load_row(self._pool, "files", file_id)
            if found is None:
                raise missing_file(file_id)
            return whole("files", file_id, found[0], files.initial), found[1]

        def write(state: files.FileState, version: int) -> tuple[files.FileState, list[StreamWrite]]:
            return _entity_write(files, files.DeleteFile(at=at), state, version, f"file/{file_id}", files_view.row)

        return await self._loop(load, write, request, respond)

    async def delete_model(
        self, job_id: str, at: int, request: Request, *, respond: Respond | None = None
    ) -> Outcome[models.ModelState]:
        """End the use of the model that a job made. Raises: NotFound, DamagedRow."""

        async def load() -> tuple[models.ModelState, int]:
            found = await read.load_row(self._pool, "models", job_id)
            if found is None:
                raise NotFound(f"The job {job_id} has no model", code="model_not_found", param="model")
            return whole("models", job_id, found[0], models.initial), found[1]

        def write(state: models.ModelState, version: int) -> tuple[models.ModelState, list[StreamWrite]]:
            return _entity_write(models, models.DeleteModel(at=at), state, version, f"model/{job_id}", models_view.row)

        return await self._loop(load, write, request, respond)

    async def change(
        self,
        load: Callable[[], Awaitable[tuple[State, int]]],
        write: Callable[[State, int], tuple[State, list[StreamWrite]]],
        request: Request,
        respond: Respond | None = None,
    ) -> Outcome[State]:
        """Change an entity whose commands stand elsewhere (rose/uploads.py) by the same loop.

        `load` returns state and version, `write` what shall be there afterwards, and is asked again on each conflict.

        Raises: what the two raise; Conflict after many conflicts in a row.
        """
        return await self._loop(load, write, request, respond)

    async def _load_job(self, job_id: str) -> tuple[jobs.JobState, int]:
        found = await read.load_row(self._pool, "jobs", job_id)
        if found is None:
            raise missing_job(job_id)
        return whole("jobs", job_id, found[0], jobs.initial), found[1]

    async def _loop(
        self,
        load: Callable[[], Any],
        write: Callable[[Any, int], tuple[Any, list[StreamWrite]]],
        request: Request,
        respond: Respond | None,
    ) -> Outcome[Any]:
        for attempt in range(MAX_TRIES):
            before, version = await load()
            try:
                state, writes = write(before, version)
            except (InvalidState, StaleEpoch, NotFound):
                replayed = await self._answered_before(before, version, request)
                if replayed is None:
                    raise
                return replayed
            if not writes:
                return Outcome(state=state, version=version, events=(), position=None)
            happened = writes[0].events
            try:
                return await self._append(state, version, happened, writes, request, respond)
            except StaleEpoch:
                raise
            except Conflict:
                if any(one.lease is not None and one.lease.action == "claim" for one in writes):
                    raise
                await anyio.sleep(random.uniform(0, 0.002 * (attempt + 1)))
        raise Conflict(f"Another writer was first {MAX_TRIES} times in a row.")

    async def _answered_before(self, state: Any, version: int, request: Request) -> Outcome[Any] | None:
        """Return the outcome of a command that was accepted before, or None.

        An append whose answer was lost is asked for again, and by then the state may refuse it: a job that has
        succeeded cannot succeed again.

        Raises: InvalidRequest when the command id belongs to another request.
        """
        known = await read.find_command(self._pool, request.command_id)
        if known is None:
            return None
        if known.request_hash != request.request_hash:
            raise KeyReused(f"The command id {request.command_id} belongs to another request.")
        return Outcome(state=state, version=version, events=(), position=None, replayed=True, response=known.response)

    async def _append(
        self,
        state: Any,
        version: int,
        happened: Sequence[Event],
        writes: list[StreamWrite],
        request: Request,
        respond: Respond | None,
    ) -> Outcome[Any]:
        appended = await append(
            self._pool,
            writes,
            command_id=request.command_id,
            request_hash=request.request_hash,
            response=respond(state) if respond else None,
            actor=request.actor,
        )
        return Outcome(
            state=state,
            version=version + len(happened),
            events=tuple(happened),
            position=appended.position,
            replayed=appended.replayed,
            response=appended.response,
        )


def _fold(evolve: Callable[[Any, Any], Any], state: Any, happened: Sequence[Any]) -> Any:
    for event in happened:
        state = evolve(state, event)
    return state


def _entity_write(
    entity: Any, command: Any, state: Any, version: int, stream_id: str, row: Callable[[Any], EntityRow]
) -> tuple[Any, list[StreamWrite]]:
    happened = entity.decide(command, state)
    after = _fold(entity.evolve, state, happened)
    return after, [StreamWrite(stream_id=stream_id, expected_version=version, events=happened, row=row(after))]


def _job_write(
    job_id: str,
    version: int,
    happened: tuple[Event, ...],
    state: jobs.JobState,
    epoch: int | None,
    lease: LeaseChange | None,
) -> StreamWrite:
    return StreamWrite(
        stream_id=f"job/{job_id}",
        expected_version=version,
        events=happened,
        row=jobs_view.row(state),
        epoch=epoch,
        lease=lease,
    )


def _revoke(state: jobs.JobState) -> LeaseChange | None:
    run = state.run
    if run is None:
        return None
    return LeaseChange(action="revoke", job_id=state.id, kind=run.kind, epoch=run.epoch, owner=run.owner)
