"""Everything at once, by a seeded chance: two trainers and their children are killed and stopped while jobs run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime

import anyio
import psutil
import pytest

from rose.domain.job_events import JobSucceeded, LeaseExpired, RecoveryPointSaved, RunReleased, RunResumed
from rose.errors import InvalidState
from tests.trainers import House, child_of

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(580)]

SEED = int(os.environ.get("ROSE_TEST_STORM_SEED", "3"))
FAULTS = int(os.environ.get("ROSE_TEST_STORM_FAULTS", "8"))
EPOCHS = 15
STEPS = 8 * EPOCHS


class Trainers:
    """Two trainers as processes; a killed one is replaced."""

    def __init__(self, house: House, dsn: str, stack: ExitStack) -> None:
        self._start = lambda: stack.enter_context(house.trainer_process(dsn))
        self.processes: list[subprocess.Popen[bytes]] = [self._start(), self._start()]

    def replace(self, index: int) -> None:
        self.processes[index].wait(timeout=30)
        self.processes[index] = self._start()


class Storm:
    """Faults against trainers and running jobs, drawn by a seeded chance."""

    def __init__(self, house: House, trainers: Trainers, jobs: list[str], chance: random.Random) -> None:
        self.house = house
        self.trainers = trainers
        self.jobs = jobs
        self.chance = chance
        self.done: Counter[str] = Counter()
        self.notes: list[str] = []

    async def strike(self) -> None:
        """Do one thing; nothing when its victim is not there just now."""
        faults: dict[str, Callable[[], object]] = {
            "child killed": lambda: self.signal_child(signal.SIGKILL),
            "child stopped": lambda: self.signal_child(signal.SIGSTOP),
            "trainer killed": self.kill_trainer,
            "trainer stopped": self.stop_trainer,
            "job paused": self.pause_and_resume,
        }
        name = self.chance.choice(list(faults))
        happened = faults[name]()
        if not isinstance(happened, bool):
            happened = await happened  # type: ignore[misc]
        if happened:
            self.done[name] += 1

    def signal_child(self, number: signal.Signals) -> bool:
        children = {job_id: child for job_id in self.jobs if (child := child_of(job_id)) is not None}
        if not children:
            return False
        try:
            job_id = self.chance.choice(list(children))
            children[job_id].send_signal(number)
            self.notes.append(f"{datetime.now(UTC):%H:%M:%S} {number.name} {job_id} {children[job_id].pid}")
        except psutil.NoSuchProcess:
            return False
        return True

    def kill_trainer(self) -> bool:
        index = self.chance.randrange(2)
        self.trainers.processes[index].kill()
        self.trainers.replace(index)
        return True

    async def stop_trainer(self) -> bool:
        process = self.chance.choice(self.trainers.processes)
        process.send_signal(signal.SIGSTOP)
        await anyio.sleep(self.chance.uniform(0.5, 1.5) * self.house.settings.lease_seconds)
        process.send_signal(signal.SIGCONT)
        return True

    async def pause_and_resume(self) -> bool:
        job_id = self.chance.choice(self.jobs)
        try:
            await self.house.pause(job_id)
        except InvalidState:
            return False
        await anyio.sleep(self.chance.uniform(0, 2))
        await self.house.resume(job_id)
        return True


async def test_whatever_happens_every_job_succeeds_once_with_the_same_losses(house: House, database_dsn: str) -> None:
    leases = {"lease_seconds": 3.0, "abandon_seconds": 2.2}  # so short that a slow trainer loses its run, too
    house.reset(**leases, stall_seconds=2.0, phase_seconds=40.0, max_attempts=1000, log_level="INFO")
    chance = random.Random(SEED)
    with ExitStack() as stack:
        jobs = [await house.create_queued(n_epochs=EPOCHS, batch_size=1) for _ in range(2)]
        trainers = Trainers(house, database_dsn, stack)
        await house.at_step(jobs[0], 1)
        storm = Storm(house, trainers, jobs, chance)
        for _ in range(FAULTS):
            await storm.strike()
            await anyio.sleep(chance.uniform(0.5, 4))
        for job_id in jobs:
            state = await house.ended(job_id, 300)
            assert state.status == "succeeded", state.error
    curves = [await house.steps(job_id) for job_id in jobs]
    assert [step for step, _ in curves[0]] == list(range(1, STEPS + 1))
    assert curves[1] == curves[0], "the same seed and data: the same losses, whatever happened to the runs"
    interruptions = 0
    for job_id in jobs:
        newest = 0
        events = await house.events(job_id)
        assert sum(isinstance(event, JobSucceeded) for event in events) == 1
        interruptions += sum(isinstance(event, RunReleased | LeaseExpired) for event in events)
        for event in events:
            if isinstance(event, RecoveryPointSaved):
                newest = max(newest, event.step)
            elif isinstance(event, RunResumed):
                assert event.from_step == newest
        assert child_of(job_id) is None, "no child is left over"
    assert interruptions >= 2, f"the storm was none: {storm.done} {storm.notes}"
