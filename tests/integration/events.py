"""Appends small real events for the tests of those who follow the log."""

from __future__ import annotations

from uuid import uuid4

from projections import files, jobs
from rose.domain import jobs as job_domain
from rose.domain.artifacts import Artifact
from rose.domain.catalogue import Event
from rose.domain.files import FileUploaded, evolve, initial
from rose.domain.hyperparameter_requests import HyperparametersRequest
from rose.domain.job_events import CheckpointSaved, JobCreated, StepsReported
from rose.domain.job_values import BaseRequest, Checkpoint, PinnedFile, StepMetrics
from rose.ids import new_id
from rose.log.append import Actor, StreamWrite, append
from rose.log.pool import Pool

ACTOR = Actor(kind="system", name="test")
ARTIFACT = Artifact(path="files/x", bytes=1, sha256="0" * 64)


async def append_file(
    pool: Pool, *, filename: str = "data.jsonl", file_id: str | None = None, project: str = "default"
) -> int:
    """Append one file.uploaded with its row; return its position."""
    file_id = file_id or new_id("file_")
    event = FileUploaded(
        project=project,
        file_id=file_id,
        created_at=1,
        filename=filename,
        purpose="fine-tune",
        artifact=ARTIFACT,
        expires_at=None,
    )
    row = files.row(evolve(initial, event))
    write = StreamWrite(stream_id=f"file/{file_id}", expected_version=0, events=(event,), row=row)
    return (await append(pool, [write], command_id=str(uuid4()), actor=ACTOR)).position


async def append_files(pool: Pool, count: int) -> int:
    """Append `count` files; return the last position."""
    position = 0
    for _ in range(count):
        position = await append_file(pool)
    return position


class Job:
    """A job whose events a test appends."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.id = new_id("ftjob_")
        self.stream_id = f"job/{self.id}"
        self.state = job_domain.initial
        self.version = 0

    async def append(self, *events: Event) -> int:
        """Append events with the row that they make; return the last position."""
        for event in events:
            self.state = job_domain.evolve(self.state, event)  # pyright: ignore[reportArgumentType]
        write = StreamWrite(
            stream_id=self.stream_id, expected_version=self.version, events=events, row=jobs.row(self.state)
        )
        position = (await append(self.pool, [write], command_id=str(uuid4()), actor=ACTOR)).position
        self.version += len(events)
        return position

    async def create(self) -> int:
        """Append job.created."""
        file = PinnedFile(id="file_x", filename="data.jsonl", artifact=ARTIFACT)
        return await self.append(
            JobCreated(
                project="default",
                job_id=self.id,
                created_at=1,
                model="tiny",
                base_request=BaseRequest(source="tiny"),
                training_file=file,
                validation_file=None,
                suffix=None,
                seed=1,
                method="supervised",
                requested=HyperparametersRequest(),
                model_name=f"tiny-ft-{self.id}",
            )
        )

    async def steps(self, first: int, last: int) -> int:
        """Append one steps_reported with the steps first..last."""
        return await self.append(StepsReported(epoch=1, steps=tuple(step(n) for n in range(first, last + 1))))

    async def checkpoint(self, number: int) -> int:
        """Append one checkpoint_saved."""
        saved = Checkpoint(
            id=new_id("ftckpt_"),
            step=number,
            epoch_number=number,
            model_name=f"{self.state.model_name}:ckpt-step-{number}",
            artifact=ARTIFACT,
            metrics={"train_loss": 1.5},
        )
        return await self.append(CheckpointSaved(epoch=1, checkpoint=saved))


def step(number: int) -> StepMetrics:
    """Return metrics of one step."""
    return StepMetrics(
        step=number,
        total_steps=1000,
        epoch=number / 1000,
        train_loss=1 / number,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-5,
        gradient_norm=1.0,
        trained_tokens=100 * number,
    )
