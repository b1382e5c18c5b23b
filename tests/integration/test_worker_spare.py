"""Training runs in a child that waited for them: like cold ones in all but the time, whatever happens to the child."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from rose.domain.job_events import RunReleased
from rose.local import launcher
from rose.log.pool import Pool
from rose.settings import Settings
from tests.eventually import eventually
from tests.trainers import QUICK, House, child_of
from trainer.spare import Spare

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]

SHORT: dict[str, Any] = {"n_epochs": 1, "batch_size": 2, "validation_split": 0}
LONG: dict[str, Any] = {"n_epochs": 50, "batch_size": 1, "validation_split": 0}


@pytest.fixture
def house(
    pool: Pool,
    database_dsn: str,
    settings: Callable[..., Settings],
    fixture_base: Path,
    caplog: pytest.LogCaptureFixture,
) -> House:
    """A house whose trainers keep a spare; what they say of it is in `caplog`."""
    caplog.set_level("INFO", logger="trainer")
    asked = {**QUICK, "warm_child": True, "recovery_steps": 5, "database_url": database_dsn}
    return House(pool, settings(**asked), fixture_base)


def ready(text: str) -> list[int]:
    """Return the spares that were ready, in order, by what a trainer said."""
    return [int(pid) for pid in re.findall(r"Child (\d+) waits for the next run", text)]


def used(text: str, job_id: str) -> list[tuple[str, int]]:
    """Return the children of a job, in order: whether they had waited, and their pids."""
    return [(kind, int(pid)) for kind, pid in re.findall(rf"{job_id}\S*: (waiting child|child) (\d+), log", text)]


async def spare(caplog: pytest.LogCaptureFixture, number: int = 1) -> int:
    """Wait until a trainer of this process had `number` spares ready; return the newest one's pid."""
    await eventually(lambda: len(ready(caplog.text)) >= number)
    return ready(caplog.text)[number - 1]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def log_of(house: House, job_id: str) -> str:
    return (house.settings.logs / "runs" / f"{job_id}-e1.log").read_text()


async def weights_of(house: House, job_id: str) -> bytes:
    state = await house.ended(job_id)
    assert state.status == "succeeded", state.error
    assert state.artifact is not None
    return (house.blobs.path(state.artifact.path) / "adapter_model.safetensors").read_bytes()


async def test_two_jobs_run_in_two_children_that_waited_and_learn_what_a_cold_one_learns(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    cold, first, second = [await house.create_queued(**SHORT) for _ in range(3)]
    await house.pause(first)
    await house.pause(second)
    async with house.trainer(warm_child=False):
        expected = await weights_of(house, cold)
    assert ready(caplog.text) == []
    [(kind, _)] = used(caplog.text, cold)
    assert kind == "child"

    async with house.trainer():
        one = await spare(caplog)
        await house.resume(first)
        assert await weights_of(house, first) == expected
        log = log_of(house, first)
        two = await spare(caplog, 2)
        await house.resume(second)
        assert await weights_of(house, second) == expected
    assert one != two
    assert used(caplog.text, first) == [("waiting child", one)]
    assert used(caplog.text, second) == [("waiting child", two)]
    assert await house.steps(first) == await house.steps(second) == await house.steps(cold)
    assert log_of(house, first) == log, "the second run wrote into its own log"
    assert log.count("trainable numbers") == log_of(house, second).count("trainable numbers") == 1
    assert not any(psutil.pid_exists(pid) for pid in ready(caplog.text)), "no spare outlives its trainer"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_spare_that_is_dead_or_does_not_answer_costs_a_job_nothing_but_time(
    house: House, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    async with house.trainer():
        process = psutil.Process(await spare(caplog))
        process.send_signal(number)
        job_id = await house.create_queued(**SHORT)
        await weights_of(house, job_id)
        assert is_gone(process)
        assert [kind for kind, _ in used(caplog.text, job_id)] == ["child"], "the first attempt succeeded, cold"
        await spare(caplog, 2)


async def test_a_run_that_wants_other_threads_gets_no_spare(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO", logger="trainer")
    kept = Spare(launcher.command, threads=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kept.run)
        pid = await spare(caplog)
        async with kept.begin(tmp_path / "spec.json", threads=2, log_path=tmp_path / "run.log") as child:
            assert child is None
        assert kept.pid == pid, "it still waits"
        assert kept.memory_bytes
        tasks.cancel_scope.cancel()
    assert not any(psutil.pid_exists(pid) for pid in ready(caplog.text))


async def test_a_pause_drains_a_child_that_waited_and_a_cancel_kills_it(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async with house.trainer():
        pid = await spare(caplog)
        job_id = await house.create_queued(**LONG)
        await house.at_step(job_id, 2)
        assert used(caplog.text, job_id) == [("waiting child", pid)]
        found = child_of(job_id, 1)
        assert found is not None
        assert found.pid == pid, "the process list names its run"
        await house.pause(job_id)

        async def released() -> list[RunReleased]:
            return [event for event in await house.events(job_id) if isinstance(event, RunReleased)]

        [release] = await eventually(released)
        assert release.reason == "paused"
        assert await house.newest_recovery_point(job_id) == (await house.state(job_id)).last_step
        await eventually(lambda: not psutil.pid_exists(pid))

        next_pid = await spare(caplog, 2)
        await house.resume(job_id)
        step = (await house.state(job_id)).last_step
        await house.at_step(job_id, step + 1)
        assert used(caplog.text, job_id)[1] == ("waiting child", next_pid)
        await house.cancel(job_id)
        await eventually(lambda: not psutil.pid_exists(next_pid))
    assert (await house.state(job_id)).status == "cancelled"


async def test_a_killed_trainer_takes_its_spare_and_its_run_along(house: House, database_dsn: str) -> None:
    log_path = house.settings.data_dir / "trainer.log"

    def text() -> str:
        return log_path.read_text() if log_path.exists() else ""

    with house.trainer_process(database_dsn) as trainer:
        await eventually(partial(_has, text, 1))
        job_id = await house.create_queued(**LONG)
        await eventually(partial(_has, text, 2))
        first, second = ready(text())
        assert used(text(), job_id) == [("waiting child", first)]
        children = [psutil.Process(first), psutil.Process(second)]
        os.kill(trainer.pid, signal.SIGKILL)
        await eventually(lambda: all(map(is_gone, children)))


def _has(text: Callable[[], str], number: int) -> bool:
    return len(ready(text())) >= number
