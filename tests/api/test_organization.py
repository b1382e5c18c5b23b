"""Projects, service accounts and keys as an administrator meets them, through the official client where it has them."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from projections.verify import verify
from tests.api.running import SEED, Running
from tests.api.teams import House

pytestmark = pytest.mark.anyio


async def test_the_first_key_administers_and_from_then_on_every_call_needs_one(house: House) -> None:
    path = "/v1/organization/projects/default/service_accounts"
    refused = await house.api.http.post(path, json={"name": "bot", "scope": "write"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "first_key")
    assert (await house.api.http.get("/v1/files")).status_code == 200
    admin = await house.administrator()
    assert (await house.api.http.get("/v1/files")).status_code == 401
    assert [one async for one in admin.files.list()] == []


async def test_a_key_works_in_its_project_with_its_scope(house: House, seed_file: Path) -> None:
    admin = await house.administrator()
    _, red = await house.team(admin, "red")
    blue_id, blue = await house.team(admin, "blue")
    file = await red.files.create(file=seed_file, purpose="fine-tune")
    job = await red.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert [one.id async for one in red.files.list()] == [file.id]
    assert [one.id async for one in blue.files.list()] == []
    for call in (
        blue.files.retrieve(file.id),
        blue.files.content(file.id),
        blue.files.delete(file.id),
        blue.fine_tuning.jobs.retrieve(job.id),
        blue.fine_tuning.jobs.cancel(job.id),
        blue.fine_tuning.jobs.list_events(job.id),
        blue.fine_tuning.jobs.checkpoints.list(job.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await call
    with pytest.raises(openai.BadRequestError, match="does not exist"):
        await blue.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    with pytest.raises(openai.PermissionDeniedError):
        await blue.admin.organization.projects.list()
    reader = await admin.admin.organization.projects.service_accounts.create(
        blue_id, name="reader", extra_body={"scope": "read"}
    )
    assert reader.api_key is not None
    reading = house.client(reader.api_key.value)
    assert [one.id async for one in reading.files.list()] == []
    with pytest.raises(openai.PermissionDeniedError, match="This key has the scope read"):
        await reading.files.create(file=("a.jsonl", SEED), purpose="fine-tune")


async def test_a_revoked_key_and_one_of_an_archived_project_open_nothing(house: House) -> None:
    admin = await house.administrator()
    red_id, red = await house.team(admin, "red")
    keys = [one async for one in admin.admin.organization.projects.api_keys.list(red_id)]
    assert [key.redacted_value[:9] for key in keys] == ["sk-rose-…"]
    await red.files.list()
    await admin.admin.organization.projects.api_keys.delete(keys[0].id, project_id=red_id)
    with pytest.raises(openai.AuthenticationError):
        await red.files.list()
    blue_id, blue = await house.team(admin, "blue")
    await admin.admin.organization.projects.archive(blue_id)
    with pytest.raises(openai.AuthenticationError):
        await blue.files.list()
    assert [one.name async for one in admin.admin.organization.projects.list()] == ["red", "Default"]
    everything = admin.admin.organization.projects.list(include_archived=True)
    assert [one.status async for one in everything] == ["archived", "active", "active"]


async def test_the_last_administrator_stays_while_there_are_other_keys(house: House) -> None:
    admin = await house.administrator()
    await house.team(admin, "red")
    [key] = [one async for one in admin.admin.organization.projects.api_keys.list("default")]
    with pytest.raises(openai.BadRequestError, match="last key that may administer"):
        await admin.admin.organization.projects.api_keys.delete(key.id, project_id="default")


async def test_a_key_that_expires_opens_nothing_afterwards(house: House) -> None:
    admin = await house.administrator()
    made = await admin.admin.organization.projects.service_accounts.create(
        "default", name="short", expires_in_seconds=3600
    )
    assert made.api_key is not None
    assert made.api_key.expires_at == made.api_key.created_at + 3600
    short = house.client(made.api_key.value)
    await short.files.list()
    pool = house.api.services.pool
    await pool.execute("update rose.keys set doc = jsonb_set(doc, '{expires_at}', '1') where id = $1", made.api_key.id)
    with pytest.raises(openai.AuthenticationError):
        await short.files.list()


async def test_projects_and_keys_are_events_without_a_secret(house: House) -> None:
    admin = await house.administrator()
    red_id, red = await house.team(admin, "red")
    await admin.admin.organization.projects.update(red_id, name="crimson")
    assert (await admin.admin.organization.projects.retrieve(red_id)).name == "crimson"
    rows = await house.api.services.pool.fetch(
        "select type, data::text, metadata::text from rose.events order by position"
    )
    assert [row["type"] for row in rows] == ["key.created", "project.created", "key.created", "project.renamed"]
    for secret in (admin.api_key, red.api_key):
        assert not any(secret in row["data"] + row["metadata"] for row in rows)
    assert await verify(house.api.services.pool) == []


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "", {}, "name"),
        ("POST", "", {"name": ""}, "name"),
        ("POST", "", {"name": 5}, "name"),
        ("GET", "/proj_nobody", None, "project_id"),
        ("POST", "/proj_nobody/archive", None, "project_id"),
        ("POST", "/proj_nobody/service_accounts", {"name": "a"}, "project_id"),
        ("POST", "/default/service_accounts", {"name": "a", "scope": "all"}, "scope"),
        ("POST", "/default/service_accounts", {"name": "a", "expires_in_seconds": 0}, "expires_in_seconds"),
        ("DELETE", "/default/api_keys/key_nobody", None, "key_id"),
    ],
)
async def test_what_cannot_be_is_named(api: Running, method: str, path: str, body: object, param: str) -> None:
    answer = await api.http.request(method, f"/v1/organization/projects{path}", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


async def test_a_project_that_is_created_again_with_the_same_key_is_the_same_one(api: Running) -> None:
    headers = {"Idempotency-Key": "once"}
    first, again = [
        (await api.http.post("/v1/organization/projects", json={"name": "red"}, headers=headers)).json()
        for _ in range(2)
    ]
    assert again == first
    assert (await api.http.get(f"/v1/organization/projects/{first['id']}")).json() == first


async def test_a_repeated_creation_of_a_key_makes_no_second_one_and_says_that_the_secret_is_gone(house: House) -> None:
    admin = await house.administrator()
    accounts = admin.admin.organization.projects.service_accounts
    headers = {"Idempotency-Key": "one-key"}
    made = await accounts.create("default", name="bot", extra_headers=headers)
    assert made.api_key is not None
    with pytest.raises(openai.BadRequestError, match="was shown then") as refused:
        await accounts.create("default", name="bot", extra_headers=headers)
    assert refused.value.code == "secret_gone"
    known = [one.name async for one in admin.admin.organization.projects.api_keys.list("default")]
    assert known.count("bot") == 1
    assert (await house.client(made.api_key.value).files.list()).data == []


async def test_a_key_of_nats_opens_no_api_and_shows_its_kind(house: House) -> None:
    admin = await house.administrator()
    accounts = admin.admin.organization.projects.service_accounts
    made = await accounts.create("default", name="reader", extra_body={"kind": "nats"})
    assert made.api_key is not None
    assert made.api_key.value.startswith("nk-rose-")
    [listed] = [one async for one in admin.admin.organization.projects.api_keys.list("default") if one.name == "reader"]
    assert (listed.model_extra or {})["kind"] == "nats"
    assert listed.id == made.api_key.id
    with pytest.raises(openai.AuthenticationError):
        await house.client(made.api_key.value).files.list()
    with pytest.raises(openai.BadRequestError, match="of the kind nats has the scope read"):
        await accounts.create("default", name="x", extra_body={"kind": "nats", "scope": "write"})
