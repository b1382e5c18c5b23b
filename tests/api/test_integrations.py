"""Integrations of a job: refused where nobody who could run the job has them, echoed in OpenAI's shape else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from rose import leases
from rose.leases import Worker
from tests.api.running import Running

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"
WANDB = {"type": "wandb", "wandb": {"project": "roses"}}


async def connect(api: Running, name: str, **capabilities: Any) -> None:
    """Let a trainer say that it is there."""
    worker = Worker(id=name, kind="trainer", host="here", url=None, capabilities=capabilities, pid=1)
    await leases.announce(api.services.pool, worker)


async def create(api: Running, seed_file: Path, integrations: Any) -> httpx2.Response:
    body = {"model": "tiny", "training_file": await api.upload(seed_file), "integrations": integrations}
    return await api.http.post(JOBS, json=body)


async def test_without_a_trainer_that_has_it_the_job_is_refused(api: Running, seed_file: Path) -> None:
    await connect(api, "trainer_a", device="cpu")
    await connect(api, "trainer_b", device="cpu", integrations=[])
    answer = await create(api, seed_file, [WANDB])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("integrations[0].type", "unsupported_integration")
    assert "pip install 'rose[wandb]'" in error["message"]
    assert (await api.http.get(JOBS)).json()["data"] == []
    await connect(api, "trainer_c", device="cpu", integrations=["wandb"])
    assert (await create(api, seed_file, [WANDB])).status_code == 200


async def test_without_any_trainer_what_is_installed_here_decides(api: Running, seed_file: Path) -> None:
    answer = await create(api, seed_file, [WANDB])
    assert answer.status_code == 200, answer.text
    wandb = {"project": "roses", "name": None, "entity": None, "tags": []}
    assert answer.json()["integrations"] == [{"type": "wandb", "wandb": wandb}]


@pytest.mark.parametrize("integrations", [[], None])
async def test_none_are_legal_everywhere(api: Running, seed_file: Path, integrations: Any) -> None:
    await connect(api, "trainer_a", device="cpu")
    answer = await create(api, seed_file, integrations)
    assert answer.status_code == 200, answer.text
    assert answer.json()["integrations"] == integrations


@pytest.mark.parametrize(
    ("wandb", "param"),
    [
        ({"project": "a/b"}, "project"),
        ({"project": "x" * 129}, "project"),
        ({"project": "roses", "name": ["a"]}, "name"),
        ({"project": "roses", "entity": "x" * 513}, "entity"),
        ({"project": "roses", "tags": [""]}, "tags[0]"),
        ({"project": "roses", "tags": "red"}, "tags"),
    ],
)
async def test_what_weights_and_biases_would_refuse_is_refused(
    api: Running, seed_file: Path, wandb: dict[str, Any], param: str
) -> None:
    answer = await create(api, seed_file, [{"type": "wandb", "wandb": wandb}])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == f"integrations[0].wandb.{param}"
