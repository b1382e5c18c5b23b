"""Makes appends for the tests of the log: files, and jobs whose states the real decide and evolve make."""

from __future__ import annotations

from uuid import uuid4

import msgspec

from projections import files as files_view
from projections import jobs as jobs_view
from rose.domain import files, job_commands, jobs
from rose.domain.artifacts import Artifact
from rose.domain.hyperparameter_requests import HyperparametersRequest
from rose.domain.hyperparameters import DataFacts, resolve
from rose.domain.job_values import BaseModel, BaseRequest, PinnedFile, StepMetrics
from rose.ids import new_id
from rose.leases import Kind, Lease
from rose.log.append import Actor, Appended, LeaseChange, StreamWrite, append
from rose.log.pool import Pool
from rose.log.read import load_row

ACTOR = Actor(kind="system", name="test", request_id="req_1")
ARTIFACT = Artifact(path="files/content", bytes=3, sha256="0" * 64)
BASE = BaseModel(source="tiny", revision=None, fingerprint="f" * 64, hidden_size=64, model_type="qwen3")
HYPERPARAMETERS = resolve(
    HyperparametersRequest(),
    DataFacts(examples=20, validation_file_examples=None, hidden_size=64, model_type="qwen3", context_tokens=512),
    seed=1,
)


def file_write(file_id: str | None = None) -> StreamWrite:
    """Return the birth of a file."""
    command = files.AddFile(
        project="default",
        file_id=file_id or new_id("file_"),
        at=1,
        filename="a.jsonl",
        purpose="fine-tune",
        artifact=ARTIFACT,
    )
    state, events = files.initial, files.decide(command, files.initial)
    for event in events:
        state = files.evolve(state, event)
    return StreamWrite(stream_id=f"file/{state.id}", expected_version=0, events=events, row=files_view.row(state))


def create_command(job_id: str, model_name: str | None = None) -> job_commands.CreateJob:
    """Return the command that creates a job."""
    return job_commands.CreateJob(
        job_id=job_id,
        at=1,
        project="default",
        model="tiny",
        base_request=BaseRequest(source="tiny"),
        training_file=PinnedFile(id="file_a", filename="a.jsonl", artifact=ARTIFACT),
        validation_file=None,
        suffix=None,
        seed=1,
        method="supervised",
        requested=HyperparametersRequest(),
        model_name=model_name or f"tiny-ft-{job_id}",
    )


def job_write(
    job_id: str,
    state: jobs.JobState,
    version: int,
    command: job_commands.Command,
    *,
    epoch: int | None = None,
    lease: LeaseChange | None = None,
) -> tuple[StreamWrite, jobs.JobState]:
    """Return the write that `command` leads to at `version`, and the state after it."""
    events = jobs.decide(command, state)
    for event in events:
        state = jobs.evolve(state, event)
    write = StreamWrite(
        stream_id=f"job/{job_id}",
        expected_version=version,
        events=events,
        row=jobs_view.row(state),
        epoch=epoch,
        lease=lease,
    )
    return write, state


async def tell(
    pool: Pool,
    job_id: str,
    command: job_commands.Command,
    *,
    epoch: int | None = None,
    lease: LeaseChange | None = None,
) -> Appended:
    """Load the job, decide, append once."""
    found = await load_row(pool, "jobs", job_id)
    state, version = (msgspec.json.decode(found[0], type=jobs.JobState), found[1]) if found else (jobs.initial, 0)
    write, _ = job_write(job_id, state, version, command, epoch=epoch, lease=lease)
    return await append(pool, [write], command_id=str(uuid4()), actor=ACTOR)


async def load_job(pool: Pool, job_id: str) -> jobs.JobState:
    """Return the job's state."""
    found = await load_row(pool, "jobs", job_id)
    assert found is not None
    return msgspec.json.decode(found[0], type=jobs.JobState)


async def created_job(pool: Pool) -> str:
    """Create a job whose files nobody has looked at; returns its id."""
    job_id = new_id("ftjob_")
    await tell(pool, job_id, create_command(job_id))
    return job_id


async def claim(
    pool: Pool, job_id: str, kind: Kind = "training", *, owner: str = "trainer-1", seconds: float = 60.0
) -> Lease:
    """Claim the job as a trainer does: the event and the lease in one append."""
    epoch = (await load_job(pool, job_id)).epoch + 1
    command = (
        job_commands.StartRun(owner=owner, host="host", epoch=epoch, at=2)
        if kind == "training"
        else job_commands.StartValidation(owner=owner, epoch=epoch, at=2)
    )
    change = LeaseChange(action="claim", job_id=job_id, kind=kind, epoch=epoch, owner=owner, lease_seconds=seconds)
    await tell(pool, job_id, command, lease=change)
    return Lease(job_id=job_id, kind=kind, epoch=epoch, owner=owner)


def lease_change(action: str, lease: Lease, *, not_before_seconds: float = 0.0) -> LeaseChange:
    """Return a release or revocation of `lease`."""
    return msgspec.convert(
        {**msgspec.structs.asdict(lease), "action": action, "not_before_seconds": not_before_seconds}, LeaseChange
    )


def validated(epoch: int) -> job_commands.FinishValidation:
    """Return the command that ends a validation well."""
    return job_commands.FinishValidation(
        epoch=epoch,
        at=2,
        base=BASE,
        hyperparameters=HYPERPARAMETERS,
        tokens=100,
        validation_tokens=0,
        needs={},
    )


async def queued_job(pool: Pool) -> str:
    """Create a job and validate it; returns its id."""
    job_id = await created_job(pool)
    lease = await claim(pool, job_id, "validation", owner="validator")
    await tell(pool, job_id, validated(lease.epoch), epoch=lease.epoch, lease=lease_change("release", lease))
    return job_id


def steps(first: int, count: int = 1) -> tuple[StepMetrics, ...]:
    """Return metrics of consecutive steps."""
    return tuple(
        StepMetrics(
            step=step,
            total_steps=100,
            epoch=step / 100,
            train_loss=1 / step,
            train_mean_token_accuracy=0.5,
            learning_rate=1e-05,
            gradient_norm=0.1,
            trained_tokens=step * 10,
        )
        for step in range(first, first + count)
    )


async def expire(pool: Pool, job_id: str) -> None:
    """Let the job's lease be over, as if its owner had not renewed it."""
    await pool.execute(
        "update rose.leases set lease_until = clock_timestamp() - interval '1 millisecond' where job_id = $1", job_id
    )
