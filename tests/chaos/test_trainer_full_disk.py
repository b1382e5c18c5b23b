"""A run on a small file system that fills up: it pauses or waits, says why, and goes on when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from rose.domain.job_events import JobPaused, JobQueued, JobWarned, RecoveryPointSaved, RunStarted
from rose.errors import Unavailable
from rose.log.pool import Pool
from rose.settings import Settings
from tests.checker import check_log
from tests.scripted_child import STEADY_STEPS
from tests.trainers import QUICK, House, own_postgres
from trainer import supervision

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root"),
]

MEBIBYTE = 1 << 20
DISK_BYTES = 96 * MEBIBYTE
FLOOR_BYTES = 16 * MEBIBYTE


@pytest.fixture
def small_disk(private_folder: Path) -> Generator[Path]:
    """A file system of 96 MiB: room for blobs, or for a cluster of Postgres."""
    private_folder.chmod(0o711)  # Postgres runs as another account
    folder = private_folder / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "rose-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path: Path, leave_bytes: int) -> None:
    """Write a file until its disk has no more than so much room, whoever else writes meanwhile."""
    with path.open("wb", buffering=0) as file:
        while (facts := os.statvfs(path.parent)).f_bavail * facts.f_frsize > leave_bytes:
            file.write(bytes(MEBIBYTE))


async def create_for_ever(house: House) -> None:
    """Create jobs until that fails: pages that are there already take some more rows."""
    while True:
        await house.create()


async def test_a_full_disk_pauses_the_job_and_room_continues_it(
    pool: Pool, database_dsn: str, settings: Callable[..., Settings], fixture_base: Path, small_disk: Path
) -> None:
    """Full before the first step, so that the order is sure: the recovery point of step 5, then the checkpoint of 8."""
    given = settings(**{**QUICK, "min_free_bytes": FLOOR_BYTES}, blob_dir=small_disk / "blobs", recovery_steps=5)
    house = House(pool, given, fixture_base)
    ballast = small_disk / "ballast"
    job_id = await house.create_queued(n_epochs=8, batch_size=1)
    fill(ballast, FLOOR_BYTES // 2)
    async with house.trainer():

        async def paused() -> bool:
            state = await house.state(job_id)
            return state.status == "paused" and state.run is None

        await house.until(job_id, paused)
        state = await house.state(job_id)
        assert state.paused_because == "no_space"
        assert str(given.blobs) in state.pause_detail
        assert [step for step, _ in await house.steps(job_id)] == list(range(1, 9))
        ballast.unlink()
        assert (await house.ended(job_id, 120)).status == "succeeded"
    events = await house.events(job_id)
    assert sum(isinstance(event, JobPaused) for event in events) == 1
    assert [event.reason for event in events if isinstance(event, JobQueued)] == ["validated", "resumed"]
    warnings = [event.warning.code for event in events if isinstance(event, JobWarned)]
    assert warnings == ["no_recovery_point"], "a recovery point that did not fit was only a warning, given once"
    saved = [event.step for event in events if isinstance(event, RecoveryPointSaved)]
    assert saved[:2] == [5, 8], "with room again every recovery point is made"
    assert [step for step, _ in await house.steps(job_id)] == list(range(1, 65))
    assert await check_log(database_dsn) == []


async def test_a_full_disk_of_the_database_makes_everybody_wait_and_ends_nothing(
    settings: Callable[..., Settings], fixture_base: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "TRAINING_MODULE", "tests.scripted_child")
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "steps steadily")
    given = settings(**QUICK)
    ballast = small_disk / "ballast"
    async with own_postgres(small_disk / "cluster") as (server, pool):
        house = House(pool, given, fixture_base)
        async with house.trainer():
            job_id = await house.create_queued()
            await house.at_step(job_id, 50)
            fill(ballast, 0)
            with pytest.raises(Unavailable, match="disk of the database is full") as caught:
                await create_for_ever(house)
            assert caught.value.code == "database_full"
            ballast.unlink()
            assert (await house.ended(job_id)).status == "succeeded"
        events = await house.events(job_id)
        assert sum(isinstance(event, RunStarted) for event in events) == 1
        assert [step for step, _ in await house.steps(job_id)] == list(range(1, STEADY_STEPS + 1))
        assert await check_log(server.service.dsn()) == []
