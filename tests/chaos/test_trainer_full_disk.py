"""A run on a small file system that fills up: the job pauses with that reason, and goes on when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from rose.domain.job_events import JobPaused, JobQueued, JobWarned
from rose.log.pool import Pool
from rose.settings import Settings
from tests.checker import check_log
from tests.trainers import QUICK, House

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root"),
]

MEBIBYTE = 1 << 20
DISK_BYTES = 64 * MEBIBYTE
FLOOR_BYTES = 16 * MEBIBYTE


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
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


async def test_a_full_disk_pauses_the_job_and_room_continues_it(
    pool: Pool, database_dsn: str, settings: Callable[..., Settings], fixture_base: Path, small_disk: Path
) -> None:
    given = settings(**{**QUICK, "min_free_bytes": FLOOR_BYTES}, blob_dir=small_disk / "blobs", recovery_steps=5)
    house = House(pool, given, fixture_base)
    ballast = small_disk / "ballast"
    async with house.trainer():
        job_id = await house.create_queued(n_epochs=8, batch_size=1)
        await house.at_step(job_id, 6)
        fill(ballast, FLOOR_BYTES // 2)

        async def paused() -> bool:
            state = await house.state(job_id)
            return state.status == "paused" and state.run is None

        await house.until(job_id, paused)
        reason = (await house.state(job_id)).paused_because
        assert reason is not None
        assert reason.startswith("no_space: ")
        assert str(given.blobs) in reason
        ballast.unlink()
        assert (await house.ended(job_id, 120)).status == "succeeded"
    events = await house.events(job_id)
    assert sum(isinstance(event, JobPaused) for event in events) == 1
    assert [event.reason for event in events if isinstance(event, JobQueued)] == ["validated", "resumed"]
    warnings = [event.warning.code for event in events if isinstance(event, JobWarned)]
    assert "no_recovery_point" in warnings, "a recovery point that did not fit was only a warning"
    assert [step for step, _ in await house.steps(job_id)] == list(range(1, 65))
    assert await check_log(database_dsn) == []
