"""Jobs and trainers for tests: a job made by its command, a supervisor in this process or as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import psutil

from projections import jobs as jobs_view
from rose import leases
from rose.blobs import Blobs
from rose.bus import Bus
from rose.commands import Commands, Request
from rose.domain import jobs
from rose.domain.catalogue import Event
from rose.domain.files import AddFile
from rose.domain.hyperparameters import DataFacts, resolve
from rose.domain.job_commands import CancelJob, CreateJob, PauseJob, ResumeJob
from rose.domain.job_events import FilesValidated, JobQueued, RecoveryPointSaved, StepsReported
from rose.domain.job_values import BaseRequest, PinnedFile
from rose.domain.jobs import JobState
from rose.domain.projects import DEFAULT_PROJECT
from rose.ids import new_id
from rose.language_models.locate import locate
from rose.local import launcher
from rose.local.postgres import Postgres
from rose.log.append import Actor, StreamWrite, append
from rose.log.migrate import migrate
from rose.log.pool import Pool, open_pool
from rose.log.read import read_stream
from rose.settings import Settings, to_environment
from tests.eventually import eventually
from tests.hyperparameters import parse
from tests.services import Server, private_folder
from trainer import worker

REPOSITORY = Path(__file__).parents[1]
CLIENT = Actor(kind="client", name="tests")

QUICK: dict[str, Any] = {
    "lease_seconds": 60.0,
    "renew_seconds": 0.3,
    "abandon_seconds": 45.0,
    "poll_seconds": 0.2,
    "drain_seconds": 20.0,
    "device": "cpu",
    "torch_threads": 1,
    "warm_child": False,
    "hub_offline": True,
    "min_free_bytes": 0,
}
"""Settings under which what is asked of a trainer happens at once, and no lease is lost on a busy machine. No
child waits: a trainer that lives for one job would only import torch once more, for nobody."""

LOSABLE: dict[str, Any] = {"lease_seconds": 8.0, "abandon_seconds": 6.0}
"""Beside QUICK: a lost supervisor is noticed within seconds, a slow one is not lost yet."""

EXAMPLES = tuple((f"What is the colour of thing {n}?", f"Thing {n} is {'red' if n % 2 else 'blue'}.") for n in range(8))


def jsonl(examples: Iterable[tuple[str, str]] = EXAMPLES) -> bytes:
    """Return a training file of questions and answers."""
    return b"".join(
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}).encode() + b"\n"
        for q, a in examples
    )


class House:
    """What a test asks of ROSE: the same commands that the API gives."""

    def __init__(self, pool: Pool, settings: Settings, base: Path) -> None:
        self.pool = pool
        self.settings = settings
        self.base = base
        self.blobs = Blobs(settings.blobs)
        self.commands = Commands(pool)
        self._bus: Bus | None = None

    def reset(self, **settings: Any) -> None:
        """Change settings for trainers that start from now on."""
        self.settings = msgspec.structs.replace(self.settings, **settings)

    async def upload(self, content: bytes, filename: str = "training_data.jsonl") -> PinnedFile:
        """Put a file where an upload puts it."""
        file_id = new_id("file_")
        with self.blobs.open_temporary() as file:
            file.write(content)
            artifact = file.commit(f"files/{file_id}")
        add = AddFile(
            project=DEFAULT_PROJECT,
            file_id=file_id,
            at=int(time.time()),
            filename=filename,
            purpose="fine-tune",
            artifact=artifact,
        )
        await self.commands.add_file(add, Request(actor=CLIENT))
        return PinnedFile(id=file_id, filename=filename, artifact=artifact)

    async def create(self, content: bytes | None = None, *, base: str | None = None, **hyperparameters: Any) -> str:
        """Create a job and return its id."""
        command = await self._create_command(jsonl() if content is None else content, base, hyperparameters)
        return (await self.commands.create_job(command, Request(actor=CLIENT))).state.id

    async def create_queued(
        self,
        *,
        needs: dict[str, int | str] | None = None,
        integrations: tuple[dict[str, Any], ...] | None = None,
        **hyperparameters: Any,
    ) -> str:
        """Create a job over EXAMPLES that is validated and queued in the same append; return its id."""
        create = await self._create_command(jsonl(), None, hyperparameters)
        create = msgspec.structs.replace(
            create, model_name=f"{create.model}-{create.job_id}", integrations=integrations
        )
        located = locate(str(self.base), models_dir=self.settings.models, offline=True)
        facts = DataFacts(
            examples=len(EXAMPLES),
            validation_file_examples=None,
            hidden_size=located.hidden_size,
            model_type=located.model_type,
            context_tokens=located.context_tokens,
            base_learning_rate=located.base_learning_rate,
        )
        validated = FilesValidated(
            epoch=0,  # nobody claimed the job for it
            base=located.base_model(),
            hyperparameters=resolve(create.requested, facts, seed=create.seed),
            tokens=1,
            validation_tokens=0,
            needs=needs or {},
        )
        events = (*jobs.decide(create, jobs.initial), validated, JobQueued(reason="validated"))
        state = reduce(jobs.evolve, events, jobs.initial)
        write = StreamWrite(stream_id=f"job/{state.id}", expected_version=0, events=events, row=jobs_view.row(state))
        await append(self.pool, [write], command_id=f"{state.id}:queued", actor=CLIENT)
        return state.id

    async def _create_command(self, content: bytes, base: str | None, hyperparameters: dict[str, Any]) -> CreateJob:
        return CreateJob(
            job_id=new_id("ftjob_"),
            at=int(time.time()),
            project=DEFAULT_PROJECT,
            model="fixture",
            base_request=BaseRequest(source=base or str(self.base)),
            training_file=await self.upload(content),
            validation_file=None,
            suffix=None,
            seed=1,
            method="supervised",
            requested=parse(hyperparameters),
            model_name="",
        )

    async def cancel(self, job_id: str) -> JobState:
        return (await self.commands.job(job_id, CancelJob(at=int(time.time())), Request(actor=CLIENT))).state

    async def pause(self, job_id: str) -> JobState:
        return (await self.commands.job(job_id, PauseJob(at=int(time.time())), Request(actor=CLIENT))).state

    async def resume(self, job_id: str) -> JobState:
        return (await self.commands.job(job_id, ResumeJob(at=int(time.time())), Request(actor=CLIENT))).state

    async def state(self, job_id: str) -> JobState:
        state = await jobs_view.find(self.pool, job_id)
        assert state is not None
        return state

    async def events(self, job_id: str) -> list[Event]:
        return [found.event for found in await read_stream(self.pool, f"job/{job_id}")]

    async def ended(self, job_id: str, seconds: float = 300.0) -> JobState:
        """Wait until the job is terminal."""

        async def terminal() -> JobState | None:
            state = await self.state(job_id)
            return state if state.is_terminal else None

        return await self.until(job_id, terminal, seconds)

    async def at_step(self, job_id: str, step: int, seconds: float = 300.0) -> JobState:
        """Wait until the log holds the metrics of `step`."""

        async def reached() -> JobState | None:
            state = await self.state(job_id)
            assert not state.is_terminal, f"the job ended before step {step}: {state.status}, {state.error}"
            return state if state.last_step >= step else None

        return await self.until(job_id, reached, seconds)

    async def until(self, job_id: str, condition: Any, seconds: float = 300.0) -> JobState:
        """Wait for a condition; on a timeout say what the job did."""
        try:
            return await eventually(condition, seconds)
        except TimeoutError:
            state = await self.state(job_id)
            events = [type(event).__name__ for event in await self.events(job_id)]
            raise AssertionError(f"{job_id} is {state.status} at step {state.last_step}: {events}") from None

    async def steps(self, job_id: str) -> list[tuple[int, float]]:
        """Return step and loss of everything reported, in the log's order."""
        return [
            (step.step, step.train_loss)
            for event in await self.events(job_id)
            if isinstance(event, StepsReported)
            for step in event.steps
        ]

    async def newest_recovery_point(self, job_id: str) -> int | None:
        steps = [event.step for event in await self.events(job_id) if isinstance(event, RecoveryPointSaved)]
        return steps[-1] if steps else None

    async def trainer_is_connected(self) -> bool:
        """Tell whether a trainer of this process works and hears NATS."""
        workers = await leases.workers(self.pool, "trainer")
        return self._bus is not None and self._bus.connected and bool(workers)

    @asynccontextmanager
    async def trainer(self, **overrides: Any) -> AsyncGenerator[anyio.Event]:
        """Run a trainer in this process; it drains at the end of the block."""
        stop = anyio.Event()
        settings = msgspec.structs.replace(self.settings, **overrides)
        async with (
            Bus(settings.nats_url, token=settings.nats_token, name="test trainer") as self._bus,
            anyio.create_task_group() as tasks,
        ):
            run = partial(worker.run, launch=launcher.command)
            tasks.start_soon(run, settings, self.pool, self._bus, self.blobs, stop)
            yield stop
            stop.set()

    @contextmanager
    def trainer_process(self, dsn: str, **overrides: Any) -> Generator[subprocess.Popen[bytes]]:
        """Run a trainer as `rose serve trainer` does; it is killed at the end of the block if it still lives."""
        settings = msgspec.structs.replace(self.settings, database_url=dsn, **overrides)
        log_path = self.settings.data_dir / "trainer.log"
        command, fds = launcher.command([sys.executable, "-m", "rose.app", "trainer"])
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command,
                pass_fds=fds,
                env={**os.environ, **to_environment(settings)},
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)


@asynccontextmanager
async def own_postgres(cluster: Path | None = None) -> AsyncGenerator[tuple[Server, Pool]]:
    """Give a Postgres of the test's own, which it may kill and start again; `cluster` is where its data lies."""
    with nullcontext(cluster) if cluster else private_folder() as folder:
        server = Server(Postgres(folder))
        try:
            await anyio.to_thread.run_sync(server.start)
            dsn = Postgres(folder).dsn()
            await migrate(dsn)
            pool = await open_pool(dsn, min_size=1, max_size=4)
            try:
                yield server, pool
            finally:
                await pool.close()
        finally:
            await anyio.to_thread.run_sync(server.stop)


def child_of(job_id: str, epoch: int | None = None, module: str = "trainer.run") -> psutil.Process | None:
    """Return the living child process of a run, found by its command line."""
    wanted = f"/{job_id}-e{'' if epoch is None else f'{epoch}.json'}"
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if module in command and wanted in command[-1] and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None
