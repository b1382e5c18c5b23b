"""Everything that `rose up` runs is killed in the middle of a job, singly and all at once; the job ends whole."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil
import pytest

from rose.domain.job_events import JobSucceeded, RunResumed, StepsReported
from rose.local import state
from rose.log.pool import open_pool
from rose.log.read import Recorded, read_stream
from tests import services
from tests.checker import check_log
from tests.eventually import eventually
from tests.in_own_loop import in_own_loop
from tests.local.rose_up import KINDS, RoseUp, assert_all_end, command_of, rose_up
from tests.trainers import EXAMPLES, jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG, SHORT = 50, 20
"""Epochs of a job that outlasts nine kills, and of one that outlasts two."""
SECONDS = 240
QUICK = {
    "ROSE_LEASE_SECONDS": "4",
    "ROSE_RENEW_SECONDS": "0.5",
    "ROSE_ABANDON_SECONDS": "3",
    "ROSE_POLL_SECONDS": "0.2",
    "ROSE_RECOVERY_STEPS": "10",
    "ROSE_MAX_ATTEMPTS": "10",
}
Value = TypeVar("Value")


@pytest.fixture(scope="module")
def up(fixture_base: Path) -> Iterator[RoseUp]:
    aliases = {"ROSE_MODEL_ALIASES": f"small={fixture_base}"}
    with services.private_folder() as folder, rose_up(folder, {**QUICK, **aliases}) as started:
        yield started


@pytest.fixture
def job(up: RoseUp) -> Iterator[Job]:
    with httpx2.Client(base_url=f"{up.settings.url}/v1", trust_env=False, timeout=30) as http:
        yield Job(up, http, SHORT)


@pytest.fixture
def long_job(up: RoseUp) -> Iterator[Job]:
    with httpx2.Client(base_url=f"{up.settings.url}/v1", trust_env=False, timeout=30) as http:
        yield Job(up, http, LONG)


def wait_for(condition: Callable[[], Value]) -> Value:
    return in_own_loop(eventually(condition, SECONDS))


class Job:
    """A long job, seen through whatever still answers."""

    def __init__(self, up: RoseUp, http: httpx2.Client, epochs: int) -> None:
        self.steps = epochs * len(EXAMPLES)
        self.up = up
        self.http = http
        file = self._post("/files", files={"file": ("data.jsonl", jsonl())}, data={"purpose": "fine-tune"})
        chosen = {"n_epochs": epochs, "batch_size": 1, "validation_split": 0}
        body = {"training_file": file["id"], "model": "small", "hyperparameters": chosen}
        self.id: str = self._post("/fine_tuning/jobs", json=body)["id"]

    def _post(self, path: str, **content: Any) -> dict[str, Any]:
        answer = self.http.post(path, **content)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self) -> dict[str, Any]:
        """Return the job; empty while the API or Postgres is away."""
        try:
            answer = self.http.get(f"/fine_tuning/jobs/{self.id}")
        except httpx2.TransportError:
            return {}
        return answer.json() if answer.status_code == 200 else {}

    def step(self) -> int:
        """Return the last step that the job shows, -1 while nobody answers."""
        found = self.get()
        assert found.get("status") != "failed", found
        return (found.get("progress") or {}).get("step") or 0 if found else -1

    def events(self) -> list[Recorded]:
        """Return the job's events, all of them."""

        async def read() -> list[Recorded]:
            pool = await open_pool(state.connection(self.up.settings), min_size=1, max_size=1)
            try:
                return await read_stream(pool, f"job/{self.id}")
            finally:
                await pool.close()

        return in_own_loop(read())

    def assert_whole(self) -> None:
        """Wait for the job's end; fail unless it succeeded once, with each step reported exactly once, in order."""
        wait_for(lambda: self.get().get("status") in ("succeeded", "failed", "cancelled"))
        assert self.get()["status"] == "succeeded", self.get()["error"]
        events = [recorded.event for recorded in self.events()]
        assert Counter(isinstance(event, JobSucceeded) for event in events)[True] == 1
        steps = [one.step for event in events if isinstance(event, StepsReported) for one in event.steps]
        assert steps == list(range(1, self.steps + 1))
        address = state.connection(self.up.settings).database_url
        assert address is not None
        assert in_own_loop(check_log(address)) == []


def training_child(up: RoseUp) -> psutil.Process | None:
    pid = up.pid_of("trainer")
    try:
        below = psutil.Process(pid).children(recursive=True) if pid else []
    except psutil.NoSuchProcess:
        return None
    return next((one for one in below if "trainer.run" in command_of(one)), None)


def trains_on(job: Job) -> None:
    """Wait for a step that the job has not made yet."""
    now = wait_for(lambda: 1 + job.step()) - 1
    wait_for(lambda: job.step() > now)


def resumed(job: Job) -> int:
    return sum(isinstance(recorded.event, RunResumed) for recorded in job.events())


def end_of_kill_9(up: RoseUp, family: list[psutil.Process]) -> None:
    """Wait for the end of `rose up` and of everything below it."""
    assert up.process is not None
    assert up.process.stdout is not None
    with up.process.stdout:
        assert up.process.wait(timeout=30) == -signal.SIGKILL
    assert_all_end(family)


def test_each_alone_then_rose_up_itself_then_all_at_once(up: RoseUp, long_job: Job) -> None:
    job = long_job
    wait_for(lambda: job.step() >= 12)
    family = up.family()
    for kind in KINDS:
        pid = up.pid_of(kind)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda kind=kind, pid=pid: up.pid_of(kind) not in (None, pid))
        trains_on(job)
    child = wait_for(lambda: training_child(up))
    child.kill()
    wait_for(lambda: getattr(training_child(up), "pid", child.pid) != child.pid)
    trains_on(job)
    now = {process.pid for process in up.family()}
    assert_all_end([process for process in family if process.pid not in now])

    family = up.family()
    family[0].kill()
    end_of_kill_9(up, family)
    up.start()
    trains_on(job)

    family = up.family()
    assert job.step() < job.steps, "the job was over before the last kill: make it longer"
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # the first kill alone ends many
            process.kill()
    end_of_kill_9(up, family)
    up.start()
    job.assert_whole()
    assert resumed(job) >= 4, "trainer, its child, their supervisor and everything were killed in the middle"


def test_ctrl_c_drains_and_a_second_one_does_not_wait(up: RoseUp, job: Job) -> None:
    wait_for(lambda: job.step() >= 3)
    family = up.family()
    assert up.end() == 0
    assert_all_end(family, 0)
    assert not (up.settings.data_dir / "connection.json").exists()
    up.start()
    trains_on(job)
    events = [recorded.event for recorded in job.events()]
    [continued] = [event for event in events if isinstance(event, RunResumed)]
    reported = [event for event in events[: events.index(continued)] if isinstance(event, StepsReported)]
    assert continued.from_step == reported[-1].steps[-1].step, "the run was drained: nothing is computed twice"

    family = up.family()
    child = training_child(up)
    assert child is not None, "the job was over before the second Ctrl-C: make it longer"
    child.suspend()  # a run that hangs cannot make a recovery point
    assert up.process is not None
    up.process.send_signal(signal.SIGINT)
    assert up.process.stdout is not None
    assert "makes its recovery point first" in up.process.stdout.readline()
    assert up.end(seconds=20) == 130
    assert_all_end(family, 10)
    up.start()
    job.assert_whole()
