"""Webhook endpoints as the official client manages them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import openai
import pytest
from openai.types import webhooks as wire
from pydantic import TypeAdapter
from standardwebhooks import Webhook

from projections.verify import verify
from rose.domain.webhooks import EVENT_TYPES, SENT_TYPES
from rose.log.pool import Pool
from rose.settings import Settings
from rose.webhooks.samples import sample
from tests.api.conftest import serving
from tests.api.running import Running, free_port
from tests.api.teams import House
from tests.webhook_receiver import Receiver

pytestmark = pytest.mark.anyio
URL = "https://127.0.0.1:1/hook"


@pytest.fixture
def api_settings(settings: Callable[..., Settings]) -> Settings:
    return settings(port=free_port(), webhook_private_targets=True)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver(free_port()).listening() as listening:
        yield listening


async def test_an_endpoint_lives_and_ends_as_the_client_says(api: Running) -> None:
    webhooks = api.openai.webhooks
    made = await webhooks.create(event_types=["fine_tuning.job.succeeded"], name="ci", url=URL)
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_…{made.signing_secret[-4:]}"
    assert made.updated_at == made.created_at
    found = await webhooks.retrieve(made.id)
    assert "signing_secret" not in found.to_dict()
    assert found.to_dict() == {
        "id": made.id,
        "object": "webhook_endpoint",
        "created_at": made.created_at,
        "updated_at": made.created_at,
        "event_types": ["fine_tuning.job.succeeded"],
        "name": "ci",
        "url": URL,
        "signing_secret_hint": made.signing_secret_hint,
        "status": "enabled",
        "disabled_reason": None,
        "disabled_detail": None,
    }
    changed = await webhooks.update(made.id, name="other", event_types=["fine_tuning.job.failed", "batch.completed"])
    assert (changed.name, changed.event_types) == ("other", ["fine_tuning.job.failed", "batch.completed"])
    assert changed.url == URL
    gone = await webhooks.delete(made.id)
    assert gone.to_dict() == {"id": made.id, "object": "webhook_endpoint.deleted", "deleted": True}
    for call in (webhooks.retrieve, webhooks.delete, webhooks.update, webhooks.rotate_secret):
        with pytest.raises(openai.NotFoundError) as missing:
            await call(made.id)
        assert (missing.value.code, missing.value.param) == ("webhook_endpoint_not_found", "webhook_endpoint_id")
    assert await verify(api.services.pool) == []


async def test_lists_are_newest_first_and_paged(api: Running) -> None:
    webhooks = api.openai.webhooks
    ids = [
        (await webhooks.create(event_types=["fine_tuning.job.failed"], name=str(number), url=URL)).id
        for number in range(5)
    ]
    assert [one.id async for one in webhooks.list(limit=2)] == ids[::-1]
    page = await webhooks.list(limit=2, after=ids[2])
    assert ([one.id for one in page.data], page.has_more) == ([ids[1], ids[0]], False)
    assert (await webhooks.list(limit=0)).data == []
    assert (await webhooks.list(after="after")).data == []
    await webhooks.delete(ids[2])
    assert [one.id async for one in webhooks.list()] == [ids[4], ids[3], ids[1], ids[0]]


async def test_an_update_that_changes_nothing_is_no_event(api: Running, pool: Pool) -> None:
    webhooks = api.openai.webhooks
    made = await webhooks.create(event_types=["fine_tuning.job.failed"], name="a", url=URL)
    same = await webhooks.update(made.id, name="a", url=URL, event_types=["fine_tuning.job.failed"])
    assert same.to_dict() == (await webhooks.retrieve(made.id)).to_dict()
    assert await pool.fetchval("select version from rose.streams where stream_id = $1", f"webhook/{made.id}") == 1


async def test_an_endpoint_is_switched_off_and_on_again(api: Running) -> None:
    webhooks = api.openai.webhooks
    made = await webhooks.create(event_types=["fine_tuning.job.failed"], name="a", url=URL)
    for status, reason in (("disabled", "requested"), ("enabled", None), ("disabled", "requested")):
        await webhooks.update(made.id, extra_body={"status": status})
        found = (await webhooks.retrieve(made.id)).model_extra
        assert found is not None
        assert (found["status"], found["disabled_reason"]) == (status, reason)
    renamed = await webhooks.update(made.id, name="b")
    assert renamed.model_extra is not None
    assert renamed.model_extra["status"] == "disabled"
    moved = await webhooks.update(made.id, url=URL + "/new")
    assert moved.model_extra is not None
    assert moved.model_extra["status"] == "enabled"


async def test_the_same_request_again_tells_the_same_secret(api: Running, pool: Pool) -> None:
    webhooks = api.openai.webhooks
    key = {"Idempotency-Key": "one"}
    asked = {"event_types": ["fine_tuning.job.failed"], "name": "a", "url": URL}
    made = await webhooks.create(**asked, extra_headers=key)  # type: ignore[arg-type]
    again = await webhooks.create(**asked, extra_headers=key)  # type: ignore[arg-type]
    assert again.to_dict() == made.to_dict()
    assert len((await webhooks.list()).data) == 1
    rotated = await webhooks.rotate_secret(made.id, extra_headers={"Idempotency-Key": "two"})
    repeated = await webhooks.rotate_secret(made.id, extra_headers={"Idempotency-Key": "two"})
    assert repeated.signing_secret == rotated.signing_secret != made.signing_secret
    stored = await pool.fetch("select encode(response, 'escape') as text from rose.commands where response is not null")
    events = await pool.fetch("select data::text as text from rose.events")
    for row in (*stored, *events):
        assert made.signing_secret.removeprefix("whsec_") not in row["text"], "no secret lies where it is never removed"


async def test_a_test_tells_what_the_receiver_answers(api: Running, receiver: Receiver) -> None:
    webhooks = api.openai.webhooks
    made = await webhooks.create(event_types=["fine_tuning.job.failed"], name="a", url=receiver.url + "/x?y=1")
    receiver.replies = [(204, {}), (500, {}), (302, {"location": "/elsewhere"})]
    for status in (204, 500, 302):
        done = await webhooks.test(made.id, event_type="fine_tuning.job.succeeded")
        assert done.to_dict() == {
            "event_type": "fine_tuning.job.succeeded",
            "object": "webhook_endpoint.test",
            "status_code": status,
            "success": True,
            "webhook_endpoint_id": made.id,
        }
    assert {one.path for one in receiver.received} == {"/x"}, "no redirect is followed"
    event = receiver.received[0].unwrap(made.signing_secret)
    assert isinstance(event, wire.FineTuningJobSucceededWebhookEvent)
    assert event.id == receiver.received[0].id
    Webhook(made.signing_secret).verify(receiver.received[0].body, receiver.received[0].headers)
    assert receiver.received[0].headers["host"] == f"127.0.0.1:{receiver.port}"
    assert (await webhooks.retrieve(made.id)).updated_at == made.updated_at


async def test_a_test_that_reaches_nobody_says_why(api: Running) -> None:
    made = await api.openai.webhooks.create(
        event_types=["fine_tuning.job.failed"], name="a", url=f"http://127.0.0.1:{free_port()}"
    )
    with pytest.raises(openai.BadRequestError) as refused:
        await api.openai.webhooks.test(made.id, event_type="fine_tuning.job.succeeded")
    assert refused.value.code == "webhook_not_delivered"
    assert "ConnectError" in str(refused.value)


@pytest.mark.parametrize("event_type", [one for one in EVENT_TYPES if not one.startswith("video.")])
def test_made_up_events_are_what_the_client_expects(event_type: str) -> None:
    """Of videos the client has no type."""
    event = {"id": "evt_1", "object": "event", "created_at": 1, "type": event_type, "data": sample(event_type)}
    assert TypeAdapter(wire.UnwrapWebhookEvent).validate_python(event).type == event_type


async def test_rotation_ends_the_old_secret_or_keeps_it_for_a_day(api: Running, receiver: Receiver) -> None:
    webhooks = api.openai.webhooks
    first = await webhooks.create(event_types=["fine_tuning.job.failed"], name="a", url=receiver.url)
    second = await webhooks.rotate_secret(first.id, keep_old_secret_active_for_24_hours=True)
    await webhooks.test(first.id, event_type="fine_tuning.job.failed")
    third = await webhooks.rotate_secret(first.id)
    await webhooks.test(first.id, event_type="fine_tuning.job.failed")
    both, only = receiver.received
    assert len(both.headers["webhook-signature"].split(" ")) == 2
    for secret in (first.signing_secret, second.signing_secret):
        both.unwrap(secret)
        Webhook(secret).verify(both.body, both.headers)
    only.unwrap(third.signing_secret)
    for secret in (first.signing_secret, second.signing_secret):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            only.unwrap(secret)
    for _ in range(4):
        await webhooks.rotate_secret(first.id, keep_old_secret_active_for_24_hours=True)
    with pytest.raises(openai.BadRequestError, match="4 old secrets"):
        await webhooks.rotate_secret(first.id, keep_old_secret_active_for_24_hours=True)
    await webhooks.rotate_secret(first.id)


async def test_another_project_has_other_endpoints(house: House) -> None:
    admin = await house.administrator()
    _, red = await house.team(admin, "red")
    _, blue = await house.team(admin, "blue")
    made = await red.webhooks.create(event_types=["fine_tuning.job.failed"], name="a", url=URL)
    assert (await blue.webhooks.list()).data == []
    assert (await blue.webhooks.list(after=made.id)).data == []
    with pytest.raises(openai.NotFoundError):
        await blue.webhooks.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await blue.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    with pytest.raises(openai.NotFoundError):
        await blue.webhooks.update(made.id, name="mine")
    assert (await red.webhooks.retrieve(made.id)).name == "a"


async def test_the_event_types_are_those_that_happen(api: Running) -> None:
    found = await api.openai.webhooks.event_types.list()
    assert (found.object, tuple(found.data)) == ("list", SENT_TYPES)


GOOD = {"event_types": ["fine_tuning.job.failed"], "name": "a", "url": URL}


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"name": None}, "name", "name must be a string; it is null"),
        ({"name": 7}, "name", "name must be a string; it is a number"),
        ({"name": ""}, "name", "name must have 1 to 256 characters; it has 0"),
        ({"name": "a\0"}, "name", "name contains a NUL"),
        ({"url": None}, "url", "url must be a string; it is null"),
        ({"url": "https://"}, "url", "url has no host"),
        ({"url": "ftp://example.com"}, "url", "it must begin with https:// or http://"),
        ({"url": "https://me:you@example.com"}, "url", "holds a user"),
        ({"url": "https://example.com/#x"}, "url", "fragment"),
        ({"url": "https://exa mple.com"}, "url", "no valid host"),
        ({"url": "https://a:99999"}, "url", "port 99999"),
        ({"url": "https://a/" + "x" * 2050}, "url", "at most 2048"),
        ({"event_types": []}, "event_types", "must have at least 1 entry"),
        ({"event_types": "all"}, "event_types", "event_types must be a list; it is a string"),
        ({"event_types": [None]}, "event_types[0]", "event_types[0] must be a string; it is null"),
        ({"event_types": ["fine_tuning.job.failed", "x"]}, "event_types[1]", "must be one of fine_tuning.job.succ"),
        ({"status": "off"}, "status", "it must be disabled or enabled"),
    ],
)
async def test_bad_input_names_the_field(api: Running, change: dict[str, object], param: str, text: str) -> None:
    made = (await api.http.post("/v1/webhook_endpoints", json=GOOD)).json()
    paths = [f"/v1/webhook_endpoints/{made['id']}"]
    if "status" not in change:
        paths.append("/v1/webhook_endpoints")
    for path in paths:
        answer = await api.http.post(path, json={**(GOOD if path == paths[-1] else {}), **change})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize("missing", sorted(GOOD))
async def test_what_is_missing_is_named(api: Running, missing: str) -> None:
    body = {name: value for name, value in GOOD.items() if name != missing}
    answer = await api.http.post("/v1/webhook_endpoints", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, missing)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"],
)
async def test_private_targets_are_refused_unless_allowed(
    settings: Callable[..., Settings], pool: Pool, host: str
) -> None:
    async with serving(settings(port=free_port()), pool) as strict:
        for scheme, text in (("https", "not a public address"), ("http", "must begin with https://")):
            body = {**GOOD, "url": f"{scheme}://{host}/hook"}
            answer = await strict.http.post("/v1/webhook_endpoints", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url")
            assert text in answer.json()["error"]["message"]
