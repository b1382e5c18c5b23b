"""A running API and a trainer's side of a job, played through the real log."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from openai import AsyncOpenAI
from openai.types.fine_tuning import FineTuningJob

from rose import leases
from rose.api.services import Services
from rose.commands import Request
from rose.domain import job_commands as ask
from rose.domain.artifacts import Artifact
from rose.domain.files import AddFile
from rose.domain.hyperparameters import DataFacts, resolve
from rose.domain.job_values import BaseModel, JobError, ServedAsTrained, StepMetrics, Warning
from rose.domain.jobs import JobState
from rose.ids import new_id
from rose.log.append import Actor, LeaseChange
from rose.log.read import load_row

SEED = (
    b'{"messages": [{"role": "user", "content": "Write a Python function for factorial"}, '
    b'{"role": "assistant", "content": "def factorial(n): ..."}]}\n'
    b'{"messages": [{"role": "user", "content": "What is recursion?"}, '
    b'{"role": "assistant", "content": "A function that calls itself."}]}\n'
)
"""docs/workflow.md's two examples."""
BASE = BaseModel(source="tiny", revision=None, fingerprint="f" * 64, hidden_size=128, model_type="qwen3")


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """An API that answers, with clients for it."""

    services: Services
    http: httpx2.AsyncClient
    openai: AsyncOpenAI

    async def upload(self, path: Path) -> str:
        """Upload a training file and return its id."""
        return (await self.openai.files.create(file=path, purpose="fine-tune")).id

    async def job(self, path: Path, **more: Any) -> FineTuningJob:
        """Create a job on a fresh upload of `path`."""
        body = {"model": "tiny", "training_file": await self.upload(path), **more}
        return await self.openai.fine_tuning.jobs.create(**body)


class Trainer:
    """Reports a job's run as a trainer does: claims, leases and fenced appends, all through the real log."""

    def __init__(self, services: Services, job_id: str, base: BaseModel = BASE) -> None:
        self._services = services
        self._base = base
        self._job_id = job_id
        self._owner = new_id("trainer_")
        self.epoch = 0

    def on(self, services: Services) -> Trainer:
        """Return the same trainer, in the same run, working through other services."""
        again = Trainer(services, self._job_id, self._base)
        again.epoch, again._owner = self.epoch, self._owner
        return again

    async def announce(self, **capabilities: Any) -> None:
        """Appear among the workers."""
        worker = leases.Worker(id=self._owner, kind="trainer", host="here", url=None, capabilities=capabilities, pid=1)
        await leases.announce(self._services.pool, worker)

    async def validate(self, examples: int = 2) -> None:
        """Claim the validation and pass it."""
        state = await self._state()
        await self._claim("validation", ask.StartValidation(owner=self._owner, epoch=state.epoch + 1, at=_now()))
        facts = DataFacts(
            examples=examples, validation_file_examples=None, hidden_size=128, model_type="qwen3", context_tokens=512
        )
        await self._report(
            ask.FinishValidation(
                epoch=self.epoch,
                at=_now(),
                base=self._base,
                hyperparameters=resolve(state.requested, facts, state.seed),
                tokens=40,
                validation_tokens=0,
                needs={"device": "any"},
                warnings=(Warning(code="few_examples", message=f"{examples} examples are few"),),
            ),
            release="validation",
        )

    async def start(self, *, seconds_ago: int = 0) -> None:
        """Claim the run."""
        state = await self._state()
        at = _now() - seconds_ago
        command = ask.StartRun(owner=self._owner, host="here", epoch=state.epoch + 1, at=at)
        await self._claim("training", command)
        await self._report(ask.ChangePhase(epoch=self.epoch, phase="train"))

    async def steps(self, first: int, last: int, **more: Callable[[int], float | None]) -> None:
        """Report steps `first` to `last` in one append; `more` says what else, or else than usual, a step measures."""
        state = await self._state()
        assert state.hyperparameters is not None
        metrics = tuple(
            StepMetrics(
                step=number,
                total_steps=state.hyperparameters.total_steps,
                **{
                    "epoch": number / 2,
                    "train_loss": 1 / number,
                    "train_mean_token_accuracy": 0.5,
                    "learning_rate": 1e-3,
                    "gradient_norm": 0.1,
                    "trained_tokens": 10 * number,
                    **{name: measured(number) for name, measured in more.items()},
                },
            )
            for number in range(first, last + 1)
        )
        await self._report(ask.ReportSteps(epoch=self.epoch, steps=metrics))

    async def checkpoint(self, step: int, artifact: Artifact | None = None) -> None:
        """Save and report a checkpoint."""
        artifact = artifact or self._publish(
            f"jobs/{self._job_id}/e{self.epoch}/step-{step}", f"weights of step {step}"
        )
        await self._report(
            ask.SaveCheckpoint(
                epoch=self.epoch,
                at=_now(),
                checkpoint_id=new_id("ftckpt_"),
                step=step,
                epoch_number=step,
                artifact=artifact,
                metrics={"train_loss": 0.5, "train_mean_token_accuracy": 0.75},
            )
        )

    async def succeed(
        self,
        step: int = 2,
        artifact: Artifact | None = None,
        kind: str = "adapter",
        served_as_trained: ServedAsTrained | None = None,
    ) -> None:
        """Save the model and the result file, and end the job."""
        artifact = artifact or self._publish(f"jobs/{self._job_id}/e{self.epoch}/model", "final weights")
        file_id = new_id("file_")
        with self._services.blobs.open_temporary() as blob:
            blob.write(b"step,train_loss\n1,1.0\n")
            content = blob.commit(f"files/{file_id}")
        result = AddFile(
            project="default",
            file_id=file_id,
            at=_now(),
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            artifact=content,
            job_id=self._job_id,
        )
        done = ask.Succeed(
            epoch=self.epoch,
            at=_now(),
            artifact=artifact,
            kind=kind,
            step=step,
            trained_tokens=40,
            result_file=file_id,
            served_as_trained=served_as_trained,
        )
        await self._services.commands.succeed(self._job_id, done, result, self._request())

    async def fail(self, code: str, message: str) -> None:
        """End the job with an error."""
        error = JobError(code=code, message=message, param="training_file", log="/logs/run.log")
        await self._report(ask.Fail(epoch=self.epoch, at=_now(), error=error))

    async def run_to_success(self, steps: int = 50) -> None:
        """Everything from validation to the model."""
        await self.validate()
        await self.start()
        await self.steps(1, steps)
        await self.checkpoint(steps)
        await self.succeed(steps)

    async def _claim(self, kind: Any, command: Any) -> None:
        self.epoch = command.epoch
        claim = LeaseChange(action="claim", job_id=self._job_id, kind=kind, epoch=self.epoch, owner=self._owner)
        await self._services.commands.job(self._job_id, command, self._request(), lease=claim)

    async def _report(self, command: Any, *, release: Any = None) -> None:
        given_back = release and LeaseChange(
            action="release", job_id=self._job_id, kind=release, epoch=self.epoch, owner=self._owner
        )
        await self._services.commands.job(self._job_id, command, self._request(), fenced=True, lease=given_back)

    def _publish(self, path: str, weights: str) -> Any:
        folder = self._services.blobs.temporary_folder()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(weights)
        return self._services.blobs.publish_folder(folder, path)

    async def _state(self) -> JobState:
        found = await load_row(self._services.pool, "jobs", self._job_id)
        assert found is not None
        return msgspec.json.decode(found[0], type=JobState)

    def _request(self) -> Request:
        return Request(actor=Actor(kind="trainer", name=self._owner))


def _now() -> int:
    return int(time.time())
