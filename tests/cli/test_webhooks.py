"""`rose webhooks` against a running API and a real receiver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from rose.settings import Settings
from tests.api.running import free_port
from tests.cli.conftest import Rose
from tests.webhook_receiver import Receiver

pytestmark = pytest.mark.anyio


@pytest.fixture
def api_settings(settings: Callable[..., Settings]) -> Settings:
    return settings(port=free_port(), webhook_private_targets=True)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver(free_port()).listening() as listening:
        yield listening


async def test_an_endpoint_from_its_creation_to_its_end(rose: Rose, receiver: Receiver) -> None:
    assert (await rose("webhooks", "list")).err == "No webhook endpoints.\n"
    made = await rose("webhooks", "create", receiver.url, "--name", "ci", "-e", "failed", "-e", "succeeded")
    heading, secret, advice = made.out.splitlines()
    webhook_id = heading.removeprefix("Webhook endpoint created: ")
    assert (secret[:6], "not shown again" in advice) == ("whsec_", True)
    [listed] = (await rose("webhooks", "list")).out.splitlines()
    assert listed.split("\t")[:5] == [webhook_id, "ci", receiver.url, "failed,succeeded", "enabled"]
    assert secret not in (await rose("webhooks", "get", "ci", "--json")).out
    for given in (webhook_id, webhook_id[:9], webhook_id[4:9], "ci", "last"):
        assert (await rose("webhooks", "get", given, "-q")).out == f"{webhook_id}\n"

    tried = await rose("webhooks", "test", "ci", "--event", "failed")
    assert (tried.status, tried.out) == (0, "The receiver answered 200 to fine_tuning.job.failed.\n")
    assert receiver.received[0].unwrap(secret).type == "fine_tuning.job.failed"
    receiver.reply = (500, {})
    assert (await rose("webhooks", "test", "ci", "-q")).status == 1

    fresh = (await rose("webhooks", "rotate-secret", "ci", "--keep-old", "-q")).out.strip()
    await rose("webhooks", "test", "ci")
    for one in (fresh, secret):
        receiver.received[-1].unwrap(one)

    off = await rose("webhooks", "update", "ci", "--disable", "--name", "other", "-e", "cancelled")
    assert "status   disabled" in off.out
    assert "because  requested: It was switched off on request." in off.out
    assert f"rose webhooks update {webhook_id} --enable" in off.out
    on = msgspec.json.decode((await rose("webhooks", "update", "other", "--enable", "--json")).out)
    assert (on["status"], on["event_types"]) == ("enabled", ["fine_tuning.job.cancelled"])
    assert (await rose("webhooks", "delete", "other")).out == f"Webhook endpoint deleted: {webhook_id}\n"
    gone = await rose("webhooks", "get", webhook_id)
    assert (gone.status, "rose webhooks list" in gone.err) == (3, True)


async def test_what_cannot_be_is_said_and_where(rose: Rose) -> None:
    bad = await rose("webhooks", "create", "https://me:secret@example.com")
    assert (bad.status, bad.err.startswith("error[invalid_webhook_url]: url holds a user")) == (2, True)
    assert (await rose("webhooks", "create", "https://127.0.0.1:1", "--name", "same", "-q")).out.startswith("whsec_")
    await rose("webhooks", "create", "https://127.0.0.1:1", "--name", "same")
    assert (await rose("webhooks", "get", "same")).status == 2
    nobody = await rose("webhooks", "test", "last")
    assert (nobody.status, "error[webhook_not_delivered]" in nobody.err) == (2, True)
