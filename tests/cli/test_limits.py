"""The command line at a project's limits: it waits where that helps, and says what is in the way where it does not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import SEED, Running, free_port
from tests.cli.conftest import Rose, _at

pytestmark = pytest.mark.anyio


@pytest.fixture
async def limited(settings: Callable[..., Settings], pool: Pool) -> AsyncIterator[Running]:
    given = settings(port=free_port(), requests_per_minute=60, max_project_jobs=1, max_project_bytes=3 * len(SEED))
    async with serving(given, pool) as running:
        yield running


@pytest.fixture
def rose(limited: Running) -> Rose:
    return _at(limited)


async def test_usage_and_limits_are_shown(rose: Rose, seed_file: Path) -> None:
    assert (await rose("upload", str(seed_file))).status == 0
    assert (await rose("finetune", "create", "last", "--model", "tiny")).status == 0
    shown = (await rose("projects", "usage")).out.splitlines()
    assert [line[:17].strip() for line in shown] == [
        "Project",
        "Jobs",
        "Unfinished jobs",
        "Trained",
        "Stored",
        "Answered",
        "Limit",
    ]
    assert [line[17:] for line in shown[:4]] == ["default", "1 validating_files", "1 of 1", "0 tokens in 0:00"]
    assert shown[4][17:].startswith(f"{len(SEED)} B of {3 * len(SEED)} B (files {len(SEED)} B, uploads 0 B")
    assert shown[5][17:] == "0 requests: 0 tokens in, 0 out"
    assert shown[6][17:] == "60 requests per minute"
    told = msgspec.json.decode((await rose("projects", "usage", "default", "--json")).out)
    assert told["object"] == "organization.project.usage"
    assert (await rose("projects", "usage", "-q")).out == "default\n"
    missing = await rose("projects", "usage", "proj_nobody")
    assert (missing.status, "There is no project proj_nobody" in missing.err) == (3, True)


async def test_what_is_in_the_way_is_said(rose: Rose, seed_file: Path) -> None:
    created = ("finetune", "create", "last", "--model", "tiny")
    assert (await rose("upload", str(seed_file))).status == 0
    assert (await rose(*created)).status == 0
    refused = await rose(*created)
    assert refused.status == 5
    assert "error[project_jobs_limit]: The project default has 1 unfinished jobs of 1 (ftjob_" in refused.err
    assert "Cancel one, or wait" in refused.err
    for _ in range(2):
        assert (await rose("upload", str(seed_file))).status == 0
    full = await rose("upload", str(seed_file))
    assert (full.status, "error[project_bytes_limit]" in full.err) == (5, True)


async def test_it_waits_for_its_turn(rose: Rose, limited: Running, seed_file: Path) -> None:
    limits = limited.services.limits
    for _ in range(60):
        limits.take_request("default", {"state": {}})  # type: ignore[arg-type,typeddict-item]
    uploaded = await rose("upload", str(seed_file), "-q")
    assert uploaded.status == 0, uploaded.err
    assert (await rose("files", "list", "-q")).out == uploaded.out
