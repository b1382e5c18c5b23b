"""Deliveries to a real receiver: each event at least once, under one id, whatever happens to anybody."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from openai.types import webhooks as wire
from openai.types.webhooks import WebhookEndpointWithSecret
from standardwebhooks import Webhook

from projections import metrics, runner
from projections import webhooks as webhooks_view
from projections.verify import verify
from rose.log.pool import Pool
from rose.settings import Settings
from rose.webhooks.delivery import SCHEDULE, Deliverer
from rose.webhooks.sending import Sender
from rose.webhooks.signing import event_id
from tests.api.running import Running, Trainer, free_port
from tests.api.teams import House
from tests.eventually import eventually
from tests.webhook_receiver import Receiver

pytestmark = pytest.mark.anyio
AT_ONCE = (0.0,) * 3
ALL = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


@pytest.fixture
def api_settings(settings: Callable[..., Settings]) -> Settings:
    return settings(port=free_port(), webhook_private_targets=True)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver(free_port()).listening() as listening:
        yield listening


@asynccontextmanager
async def delivering(
    pool: Pool, schedule: Sequence[float] = SCHEDULE, *, private: bool = True, **options: Any
) -> AsyncGenerator[Deliverer]:
    """Deliver until the block ends."""
    async with Sender(private=private, **options) as sender:
        deliverer = Deliverer(pool, sender, schedule=schedule)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deliverer.deliver)
            yield deliverer
            tasks.cancel_scope.cancel()


async def endpoint(client: Any, url: str, *types: str) -> WebhookEndpointWithSecret:
    return await client.webhooks.create(event_types=types or ALL, name="ci", url=url)


async def cancelled(api: Running, path: Path) -> str:
    """End a job and return its id."""
    job = await api.job(path)
    await api.openai.fine_tuning.jobs.cancel(job.id)
    return job.id


async def row(pool: Pool, webhook_id: str) -> dict[str, Any]:
    """Return what is noted about an endpoint's only delivery; nothing before it is planned."""
    found = await pool.fetchrow(
        "select *, extract(epoch from next_at - clock_timestamp())::float8 as wait "
        "from rose.webhook_deliveries where webhook_id = $1",
        webhook_id,
    )
    return dict(found) if found else {}


async def state_is(pool: Pool, webhook_id: str, state: str) -> dict[str, Any]:
    async def reached() -> dict[str, Any] | None:
        found = await row(pool, webhook_id)
        return found if found.get("state") == state else None

    return await eventually(reached)


async def switched_off(api: Running, webhook_id: str) -> dict[str, Any]:
    async def off() -> dict[str, Any] | None:
        found = (await api.openai.webhooks.retrieve(webhook_id)).model_extra
        assert found is not None
        return found if found["status"] == "disabled" else None

    return await eventually(off)


async def test_each_end_of_a_job_arrives_signed(api: Running, pool: Pool, receiver: Receiver, seed_file: Path) -> None:
    before = await cancelled(api, seed_file)
    every = await endpoint(api.openai, receiver.url + "/all")
    await endpoint(api.openai, receiver.url + "/good", "fine_tuning.job.succeeded", "batch.completed")
    succeeded, failed = await api.job(seed_file), await api.job(seed_file)
    async with delivering(pool):
        await Trainer(api.services, succeeded.id).run_to_success()
        broken = Trainer(api.services, failed.id)
        await broken.validate()
        await broken.start()
        await broken.fail("training_diverged", "the loss is not a number")
        ended = await cancelled(api, seed_file)
        await receiver.wait(4)
    assert before not in str([one.body for one in receiver.received])
    kinds = {
        succeeded.id: wire.FineTuningJobSucceededWebhookEvent,
        failed.id: wire.FineTuningJobFailedWebhookEvent,
        ended: wire.FineTuningJobCancelledWebhookEvent,
    }
    events = [one.unwrap(every.signing_secret) for one in receiver.received if one.path == "/all"]
    assert {event.data.id: type(event) for event in events} == kinds
    for event in events:
        job = await api.openai.fine_tuning.jobs.retrieve(event.data.id)
        assert event.to_dict() == {
            "id": event.id,
            "object": "event",
            "created_at": job.finished_at,
            "type": f"fine_tuning.job.{job.status}",
            "data": {"id": job.id},
        }
    for one in receiver.received:
        if one.path == "/all":
            Webhook(every.signing_secret).verify(one.body, one.headers)
    assert [b"succeeded" in one.body for one in receiver.received if one.path == "/good"] == [True]
    assert len({one.id for one in receiver.received}) == 4
    assert await verify(pool) == []


async def test_an_event_goes_to_its_project_only(house: House, pool: Pool, receiver: Receiver, seed_file: Path) -> None:
    admin = await house.administrator()
    _, red = await house.team(admin, "red")
    _, blue = await house.team(admin, "blue")
    for name, team in (("/red", red), ("/blue", blue)):
        await endpoint(team, receiver.url + name)
    async with delivering(pool):
        for team in (blue, red):
            file = await team.files.create(file=seed_file, purpose="fine-tune")
            job = await team.fine_tuning.jobs.create(model="tiny", training_file=file.id)
            await team.fine_tuning.jobs.cancel(job.id)
        await receiver.wait(2)
    assert sorted(one.path for one in receiver.received) == ["/blue", "/red"]
    assert len({one.body for one in receiver.received}) == 2


async def test_it_comes_again_with_the_same_id_until_it_is_taken(
    api: Running, pool: Pool, receiver: Receiver, seed_file: Path
) -> None:
    made = await endpoint(api.openai, receiver.url)
    receiver.replies = [(500, {}), (302, {"location": receiver.url + "/elsewhere"}), (404, {})]
    async with delivering(pool, AT_ONCE):
        await cancelled(api, seed_file)
        noted = await state_is(pool, made.id, "delivered")
    assert (noted["attempts"], noted["last_status"], noted["last_error"]) == (4, 200, None)
    assert {one.id for one in receiver.received} == {event_id(made.id, noted["position"])}
    assert len({one.body for one in receiver.received}) == 1
    assert {one.path for one in receiver.received} == {"/"}, "no redirect is followed"
    for one in receiver.received:
        one.unwrap(made.signing_secret)


async def test_a_receiver_that_is_down_gets_it_once_it_is_up(api: Running, pool: Pool, seed_file: Path) -> None:
    receiver = Receiver(free_port())
    made = await endpoint(api.openai, receiver.url)
    async with delivering(pool, (0.2,) * 200):
        await cancelled(api, seed_file)

        async def tried() -> bool:
            return (await row(pool, made.id)).get("attempts", 0) >= 2

        await eventually(tried)
        assert "ConnectError" in (await row(pool, made.id))["last_error"]
        async with receiver.listening():
            await receiver.wait(1)
            await state_is(pool, made.id, "delivered")


async def test_waits_grow_and_a_receiver_can_ask_for_more(
    api: Running, pool: Pool, receiver: Receiver, seed_file: Path
) -> None:
    """The real schedule: a second attempt after five seconds, or when the receiver wants it."""
    soon = await endpoint(api.openai, receiver.url + "/soon")
    later = await endpoint(api.openai, receiver.url + "/later")
    receiver.reply = (503, {"retry-after": "3600"})
    async with delivering(pool):
        await cancelled(api, seed_file)

        async def both() -> bool:
            return all([(await row(pool, one.id)).get("attempts") for one in (soon, later)])

        await eventually(both)
    assert 3000 < (await row(pool, later.id))["wait"] <= 3600
    assert (await row(pool, later.id))["last_error"] == "the receiver answered 503"
    deliverer = Deliverer(pool, Sender(private=True))
    for attempts, seconds in enumerate(SCHEDULE):
        delivery = type("Delivery", (), {"attempts": attempts})
        answer = type("Answer", (), {"retry_after_seconds": 0.0})
        wait = deliverer._wait(delivery, answer)  # type: ignore[arg-type]
        assert wait is not None
        assert 0.9 * seconds <= wait <= 1.1 * seconds


async def test_gone_switches_the_endpoint_off(api: Running, pool: Pool, receiver: Receiver, seed_file: Path) -> None:
    made = await endpoint(api.openai, receiver.url)
    receiver.reply = (410, {})
    async with delivering(pool):
        await cancelled(api, seed_file)
        found = await switched_off(api, made.id)
        assert (found["disabled_reason"], found["disabled_detail"]) == ("gone", "The receiver answered 410 Gone.")
        assert (await state_is(pool, made.id, "failed"))["last_status"] == 410
        unsent = await cancelled(api, seed_file)
        receiver.reply = (200, {})
        other = await endpoint(api.openai, receiver.url + "/other")
        sent = await cancelled(api, seed_file)
        await state_is(pool, other.id, "delivered")
        await api.openai.webhooks.update(made.id, extra_body={"status": "enabled"})
        again = await cancelled(api, seed_file)
        await receiver.wait(4)
    paths = {one.path: [] for one in receiver.received}
    for one in receiver.received[1:]:
        paths[one.path].append(one.body.decode())
    assert len(receiver.received) == 4
    assert again in paths["/"][0]
    assert unsent not in str(paths), "what happens while it is off is not sent"
    assert sent in str(paths["/other"])


async def test_a_dead_endpoint_is_switched_off_and_says_why(api: Running, pool: Pool, seed_file: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    made = await endpoint(api.openai, dead)
    async with delivering(pool, AT_ONCE):
        await cancelled(api, seed_file)
        found = await switched_off(api, made.id)
        assert (await state_is(pool, made.id, "failed"))["attempts"] == 4
    assert found["disabled_reason"] == "failing"
    assert found["disabled_detail"].startswith("4 attempts to deliver evt_")
    assert "ConnectError" in found["disabled_detail"]
    events = await pool.fetch(
        "select type from rose.events where stream_id = $1 order by version", f"webhook/{made.id}"
    )
    assert [event["type"] for event in events] == ["webhook.created", "webhook.disabled"]


async def test_one_event_that_is_never_taken_kills_no_endpoint_that_takes_others(
    api: Running, pool: Pool, receiver: Receiver, seed_file: Path
) -> None:
    made = await endpoint(api.openai, receiver.url)
    held = anyio.Event()
    bad = await api.job(seed_file)

    def hold(one: Any) -> anyio.Event | None:
        third = len([1 for other in receiver.received if other.id == one.id]) == 3
        return held if bad.id.encode() in one.body and third else None

    receiver.hold = hold
    receiver.replies = [(500, {}), (500, {})]
    async with delivering(pool, AT_ONCE):
        await api.openai.fine_tuning.jobs.cancel(bad.id)
        await receiver.wait(3)
        await cancelled(api, seed_file)
        await receiver.wait(4)

        async def arrived() -> int:
            return await pool.fetchval("select count(*) from rose.webhook_deliveries where state = 'delivered'")

        assert await eventually(arrived) == 1
        receiver.reply = (500, {})
        held.set()

        async def failed() -> int:
            return await pool.fetchval("select count(*) from rose.webhook_deliveries where state = 'failed'")

        assert await eventually(failed) == 1
    found = (await api.openai.webhooks.retrieve(made.id)).model_extra
    assert found is not None
    assert found["status"] == "enabled"


async def test_a_slow_endpoint_delays_no_other(api: Running, pool: Pool, receiver: Receiver, seed_file: Path) -> None:
    held = anyio.Event()
    receiver.hold = lambda one: held if one.path == "/slow" else None
    await endpoint(api.openai, receiver.url + "/slow")
    async with delivering(pool):
        jobs = [await cancelled(api, seed_file) for _ in range(8)]
        await receiver.wait(4)
        await endpoint(api.openai, receiver.url + "/fast")
        last = await cancelled(api, seed_file)
        await receiver.wait(5)
        assert [one.path for one in receiver.received] == ["/slow"] * 4 + ["/fast"], "four wait; the rest is not begun"
        assert last.encode() in receiver.received[4].body
        held.set()
        await receiver.wait(10)
    assert sorted(one.path for one in receiver.received) == ["/fast"] + ["/slow"] * 9
    assert all(any(job.encode() in one.body for one in receiver.received) for job in jobs)


async def test_of_two_deliverers_one_works_and_the_other_takes_over(
    api: Running, pool: Pool, receiver: Receiver, seed_file: Path
) -> None:
    await endpoint(api.openai, receiver.url)
    async with delivering(pool):
        async with delivering(pool):
            for _ in range(5):
                await cancelled(api, seed_file)
            await receiver.wait(5)

            async def noted() -> int:
                return await pool.fetchval("select count(*) from rose.webhook_deliveries where state = 'delivered'")

            await eventually(lambda: noted())
        await cancelled(api, seed_file)
        await receiver.wait(6)
    assert len({one.id for one in receiver.received}) == len(receiver.received) == 6


async def test_what_was_delivered_is_not_sent_again(
    api: Running, pool: Pool, receiver: Receiver, seed_file: Path
) -> None:
    """Neither after a restart nor after a rebuild of the views."""
    made = await endpoint(api.openai, receiver.url)
    async with delivering(pool):
        await cancelled(api, seed_file)
        await state_is(pool, made.id, "delivered")
    await runner.rebuild(pool, metrics.VIEW.name)
    async with delivering(pool):
        other = await endpoint(api.openai, receiver.url + "/other")
        await cancelled(api, seed_file)
        await state_is(pool, other.id, "delivered")
        await receiver.wait(3)
    assert len({one.id for one in receiver.received}) == len(receiver.received) == 3


async def test_it_lasts_through_lost_connections(api: Running, pool: Pool, receiver: Receiver, seed_file: Path) -> None:
    await endpoint(api.openai, receiver.url)
    async with delivering(pool):
        await cancelled(api, seed_file)
        await receiver.wait(1)
        await pool.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        last = await cancelled(api, seed_file)
        with anyio.fail_after(60):
            while not any(last.encode() in one.body for one in receiver.received):
                await receiver.wait(len(receiver.received) + 1)


async def test_a_damaged_row_stops_no_other_endpoint(
    api: Running, pool: Pool, receiver: Receiver, seed_file: Path
) -> None:
    damaged = await endpoint(api.openai, receiver.url + "/damaged")
    await endpoint(api.openai, receiver.url + "/whole")
    await pool.execute("update rose.webhooks set doc = doc || '{\"url\": 7}' where id = $1", damaged.id)
    async with delivering(pool):
        await cancelled(api, seed_file)
        await receiver.wait(1)
    assert [one.path for one in receiver.received] == ["/whole"]


async def test_a_deleted_endpoint_gets_nothing_that_waits(
    api: Running, pool: Pool, receiver: Receiver, seed_file: Path
) -> None:
    receiver.reply = (500, {})
    made = await endpoint(api.openai, receiver.url)
    async with delivering(pool):
        await cancelled(api, seed_file)
        await receiver.wait(1)
        await api.openai.webhooks.delete(made.id)
        await state_is(pool, made.id, "given_up")


async def test_secrets_that_sign_nothing_are_forgotten(api: Running, pool: Pool) -> None:
    kept, gone = await endpoint(api.openai, "http://127.0.0.1:1"), await endpoint(api.openai, "http://127.0.0.1:1")
    await api.openai.webhooks.rotate_secret(kept.id)
    newest = await api.openai.webhooks.rotate_secret(kept.id, keep_old_secret_active_for_24_hours=True)
    await api.openai.webhooks.delete(gone.id)
    now = newest.created_at

    async def left() -> int:
        return await pool.fetchval("select count(*) from rose.webhook_secrets")

    await webhooks_view.forget_secrets(pool, now)
    assert await left() == 4, "a fresh one may be waiting for its event"
    await pool.execute("update rose.webhook_secrets set created_at = created_at - interval '2 days'")
    await webhooks_view.forget_secrets(pool, now)
    assert await left() == 2
    await webhooks_view.forget_secrets(pool, now + 86400 + 600)
    assert await pool.fetchval("select secret from rose.webhook_secrets") == newest.signing_secret


# --- sending


async def test_nobody_waits_longer_than_the_timeout(receiver: Receiver) -> None:
    receiver.hold = lambda _: anyio.Event()
    async with Sender(private=True, timeout_seconds=0.3) as sender:
        answer = await sender.send(receiver.url, {}, b"{}")
    assert (answer.status, answer.error) == (None, "there was no answer within 0.3 s")


async def test_a_name_that_turns_private_is_not_reached(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, settings: Callable[..., Settings]
) -> None:
    """DNS rebinding: the name is public when the endpoint is made, and leads to this machine afterwards."""
    look_up = Names(monkeypatch, {"hook.example": ["1.1.1.1", "127.0.0.1"]})
    async with Sender(private=False) as sender:
        answer = await sender.send(f"https://hook.example:{receiver.port}/", {}, b"{}")
    assert answer.error == "The host hook.example is 127.0.0.1, which is not a public address."
    assert receiver.received == []
    assert look_up.asked == ["hook.example"]


async def test_the_checked_address_is_the_one_that_is_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is looked up once; the receiver sees it all the same."""
    look_up = Names(monkeypatch, {"hook.example": ["127.0.0.1"]})
    async with Sender(private=True) as sender:
        assert (await sender.send(f"http://hook.example:{receiver.port}/x", {}, b"{}")).status == 200
    assert look_up.asked == ["hook.example"]
    assert receiver.received[0].headers["host"] == f"hook.example:{receiver.port}"


async def test_the_next_address_is_tried_when_one_takes_no_connection(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    Names(monkeypatch, {"hook.example": ["127.0.0.2", "127.0.0.1"]})
    async with Sender(private=True) as sender:
        assert (await sender.send(f"http://hook.example:{receiver.port}/", {}, b"{}")).status == 200
    assert len(receiver.received) == 1


async def test_a_certificate_must_be_that_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Names(monkeypatch, {"hook.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]})
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hook.example"),
            *("-addext", "subjectAltName=DNS:hook.example", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    trust = ssl.create_default_context(cafile=certificate)
    receiver = Receiver(free_port())
    async with (
        receiver.listening(ssl_keyfile=str(key), ssl_certfile=str(certificate)),
        Sender(private=True, trust=trust) as sender,
        Sender(private=True) as suspicious,
    ):
        assert (await sender.send(f"https://hook.example:{receiver.port}/", {}, b"{}")).status == 200
        other = await sender.send(f"https://other.example:{receiver.port}/", {}, b"{}")
        assert "Hostname mismatch" in (other.error or "")
        unknown = await suspicious.send(f"https://hook.example:{receiver.port}/", {}, b"{}")
        assert "self-signed certificate" in (unknown.error or "")
    assert len(receiver.received) == 1


class Names:
    """Answers for some names what a test says, as the resolver of this machine."""

    def __init__(self, patch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> None:
        self.asked: list[str] = []
        self._known = known
        self._system = socket.getaddrinfo
        patch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: Any, port: Any, *more: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in self._known:
            return self._system(host, port, *more, **options)
        self.asked.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in self._known[name]]
