"""Checkpoint permissions: another project uses a model, and only as long as it may."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI

from tests.api.running import Running, Trainer
from tests.api.teams import House

pytestmark = pytest.mark.anyio


async def tuned(api: Running, team: AsyncOpenAI, path: Path) -> str:
    """Make a fine-tuned model of the team's and return its name."""
    file = await team.files.create(file=path, purpose="fine-tune")
    job = await team.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="v1")
    await Trainer(api.services, job.id).run_to_success()
    name = (await team.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    assert name is not None
    return name


async def test_a_project_may_use_a_model_of_another_one_while_it_is_permitted(house: House, seed_file: Path) -> None:
    admin = await house.administrator()
    blue_id, blue = await house.team(admin, "blue")
    name = await tuned(house.api, admin, seed_file)
    checkpoint = f"{name}:ckpt-step-50"
    permissions = admin.fine_tuning.checkpoints.permissions
    for unknown in (name, checkpoint):
        with pytest.raises(openai.NotFoundError):
            await blue.models.retrieve(unknown)
    [granted] = (await permissions.create(name, project_ids=[blue_id])).data
    assert (granted.project_id, granted.object) == (blue_id, "checkpoint.permission")
    lent = await blue.models.retrieve(name)
    assert lent.model_extra is not None
    assert not {"folder", "artifact", "job_id"} & set(lent.model_extra)
    assert name in [one.id async for one in blue.models.list()]
    with pytest.raises(openai.NotFoundError):
        await blue.models.retrieve(checkpoint)
    with pytest.raises(openai.NotFoundError):
        await blue.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        await blue.get(f"/adapters/{name}", cast_to=object)
    file = await blue.files.create(file=seed_file, purpose="fine-tune")
    job = await blue.fine_tuning.jobs.create(model=name, training_file=file.id)
    assert job.model == name
    assert [one.id async for one in permissions.list(name)] == [granted.id]
    assert [one.id async for one in permissions.list(name, project_id="proj_nobody")] == []
    gone = await permissions.delete(granted.id, fine_tuned_model_checkpoint=name)
    assert gone.deleted
    with pytest.raises(openai.NotFoundError):
        await blue.models.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        await permissions.delete(granted.id, fine_tuned_model_checkpoint=name)
    assert (await blue.fine_tuning.jobs.retrieve(job.id)).status == "validating_files"


async def test_a_project_calls_its_own_model_by_a_name_that_a_lent_one_has_too(house: House, seed_file: Path) -> None:
    admin = await house.administrator()
    blue_id, blue = await house.team(admin, "blue")
    name = await tuned(house.api, admin, seed_file)
    own = await tuned(house.api, blue, seed_file)
    await house.api.services.pool.execute(
        "update rose.models set doc = jsonb_set(doc, '{name}', to_jsonb($1::text)) where project = $2", name, blue_id
    )
    await admin.fine_tuning.checkpoints.permissions.create(name, project_ids=[blue_id])
    found = await blue.models.retrieve(name)
    assert found.model_extra is not None
    assert "folder" in found.model_extra, f"it is blue's own, trained as {own}"
    assert [one.id async for one in blue.models.list()].count(name) == 1


async def test_only_an_administrator_permits(house: House, seed_file: Path) -> None:
    admin = await house.administrator()
    _, red = await house.team(admin, "red")
    blue_id, _ = await house.team(admin, "blue")
    name = await tuned(house.api, red, seed_file)
    with pytest.raises(openai.PermissionDeniedError):
        await red.fine_tuning.checkpoints.permissions.create(name, project_ids=[blue_id])


@pytest.mark.parametrize(
    ("wanted", "param"),
    [([], "project_ids"), (["proj_nobody"], "project_ids[0]"), (["default"], "project_ids[0]"), ("x", "project_ids")],
)
async def test_a_project_that_cannot_be_permitted_is_named(
    api: Running, seed_file: Path, wanted: object, param: str
) -> None:
    name = await tuned(api, api.openai, seed_file)
    path = f"/v1/fine_tuning/checkpoints/{name}/permissions"
    answer = await api.http.post(path, json={"project_ids": wanted})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
