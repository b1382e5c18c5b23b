"""Keys of NATS on a real server: whoever has one reads the events of its project, in order, and can do nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig
from nats.js.errors import ServiceUnavailableError

from projections import keys as keys_view
from rose import nats_readers, relay
from rose.bus import Bus, BusUnavailable
from rose.commands import Request
from rose.domain.keys import CreateKey, KeyState, ServiceAccount
from rose.domain.projects import ArchiveProject, CreateProject
from rose.ids import new_id
from rose.log.append import Actor
from rose.log.pool import Pool
from rose.nats_readers import API_PREFIX, inbox_prefix
from rose.settings import Settings
from rose.subjects import STREAM, Message
from rose.tenants import Tenants, new_secret
from tests.eventually import eventually
from tests.integration.events import append_file
from tests.local.rose_up import free_port
from tests.services import NatsServer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

DOCUMENT = Path(__file__).parents[2] / "docs" / "subjects.md"
REFUSALS_SECONDS = 1.0
HEAD = "select position from rose.log_head"


def asking() -> Request:
    return Request(actor=Actor(kind="system", name="test"))


class House:
    """A log, its relay, a NATS server and what lets readers in."""

    def __init__(self, pool: Pool, server: NatsServer) -> None:
        self.pool = pool
        self.server = server
        self.tenants = Tenants(pool)

    async def project(self, name: str) -> str:
        command = CreateProject(project=new_id("proj_"), at=1, name=name)
        return (await self.tenants.create_project(command, asking(), lambda _: b"")).state.project

    async def key(self, project: str, *, expires_at: int | None = None) -> tuple[KeyState, str]:
        secret = new_secret("nats")
        account = ServiceAccount(id=new_id("svc_acct_"), name="reader", created_at=1)
        command = CreateKey(
            key_id=new_id("key_"),
            project=project,
            at=1,
            name="reader",
            account=account,
            scope="read",
            hint=secret[-4:],
            expires_at=expires_at,
            kind="nats",
        )
        return await self.tenants.create_key(command, secret, asking()), secret

    async def connect(
        self, key: KeyState, secret: str, errors: list[str] | None = None, url: str | None = None
    ) -> Client:
        async def on_error(error: Exception) -> None:
            if errors is not None:
                errors.append(str(error))

        client = Client()
        try:
            await client.connect(
                url or f"nats://{self.server.url.rpartition('@')[2]}",
                user=key.id,
                password=secret,
                inbox_prefix=inbox_prefix(key.id).encode(),
                error_cb=on_error,
                allow_reconnect=False,  # nats-py leaves the socket of a lost connection to the garbage collector
                connect_timeout=5,
            )
        except (nats.errors.Error, OSError):
            await client.close()
            raise
        return client

    async def opens(self, key: KeyState, secret: str) -> bool:
        try:
            client = await self.connect(key, secret)
        except (nats.errors.Error, OSError):
            return False
        await client.close()
        return True

    async def may_read(self, key: KeyState, secret: str) -> Client:
        """Return a connection once the server knows the key and its consumer is there."""

        async def there() -> bool:
            async with Bus(self.server.url) as bus:
                return await bus.wait_connected(10) and key.id in await consumers(bus)

        await eventually(there)
        clients: list[Client] = []

        async def connected() -> bool:
            with contextlib.suppress(nats.errors.Error, OSError):  # who connects in the moment of a reload is refused
                clients.append(await self.connect(key, secret))
            return bool(clients)

        await eventually(connected)
        return clients[0]


@pytest.fixture
async def house(
    pool: Pool, nats_server: Callable[[], NatsServer], settings: Callable[..., Settings]
) -> AsyncIterator[House]:
    server = nats_server()
    stop = anyio.Event()
    async with Bus(server.url) as bus, anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run, pool, bus, settings(nats_url=server.url), stop)

        tasks.start_soon(nats_readers.run, pool, bus, stop, server.service.let_read)
        yield House(pool, server)
        stop.set()
        tasks.cancel_scope.cancel()


async def consumers(bus: Bus) -> set[str]:
    """Return the stream's consumers; none in the moment of a reload, when JetStream does not answer."""
    with contextlib.suppress(BusUnavailable):
        return set(await bus.consumers(STREAM) or ())
    return set()


async def read(client: Client, key: KeyState, count: int) -> list[dict[str, object]]:
    """Take and acknowledge `count` messages of the key's consumer."""
    subscription = await client.jetstream(prefix=API_PREFIX).pull_subscribe_bind(consumer=key.id, stream=STREAM)
    taken: list[dict[str, object]] = []
    while len(taken) < count:
        messages: list[Msg] = []
        with contextlib.suppress(ServiceUnavailableError):
            messages = await subscription.fetch(count - len(taken), timeout=20)
        for message in messages:
            taken.append(json.loads(message.data))
            await message.ack_sync()
    await subscription.unsubscribe()
    return taken


async def test_a_reader_gets_the_events_of_its_project_in_order_and_no_others(house: House) -> None:
    ours, theirs = await house.project("ours"), await house.project("theirs")
    (key, secret), (other, other_secret) = await house.key(ours), await house.key(theirs)
    for _ in range(3):
        await append_file(house.pool, project=ours)
        await append_file(house.pool, project=theirs)
    for one, password, project in ((key, secret, ours), (other, other_secret, theirs)):
        client = await house.may_read(one, password)
        taken = await read(client, one, 5)
        assert {event["project"] for event in taken} == {project}
        names = [str(event["type"]).removeprefix("rose.v2.") for event in taken]
        assert names == ["project.created", "key.created", *["file.uploaded"] * 3]
        positions = [event["position"] for event in taken]
        assert positions == sorted(positions)  # type: ignore[type-var]
        await client.close()
    # What was acknowledged does not come again, also after a new connection; what is new does.
    await append_file(house.pool, project=theirs)
    await append_file(house.pool, project=ours)
    client = await house.connect(key, secret)
    [event] = await read(client, key, 1)
    assert (event["type"], event["project"]) == ("rose.v2.file.uploaded", ours)
    await client.close()


async def test_everything_else_is_refused(house: House) -> None:
    ours, theirs = await house.project("ours"), await house.project("theirs")
    (key, secret), (other, other_secret) = await house.key(ours), await house.key(theirs)
    await (await house.may_read(other, other_secret)).close()
    await (await house.may_read(key, secret)).close()
    errors: list[str] = []
    client = await house.connect(key, secret, errors)
    jetstream = client.jetstream(timeout=REFUSALS_SECONDS)
    heard: list[str] = []

    async def hear(message: object) -> None:
        heard.append(message.subject)  # type: ignore[attr-defined]

    for subject in (f"rose.v2.{theirs}.>", "rose.v2.>", ">", "$JS.>", "_INBOX.>", f"{inbox_prefix(other.id)}.>"):
        await client.subscribe(subject, cb=hear)
    attempts: dict[str, Callable[[], object]] = {
        "a consumer of its own": lambda: jetstream.add_consumer(STREAM, ConsumerConfig(durable_name="mine")),
        "its consumer with another filter": lambda: jetstream.add_consumer(
            STREAM, ConsumerConfig(durable_name=key.id, filter_subject="rose.v2.>")
        ),
        "another's consumer": lambda: jetstream.consumer_info(STREAM, other.id),
        "its consumer's end": lambda: jetstream.delete_consumer(STREAM, key.id),
        "the stream": lambda: jetstream.stream_info(STREAM),
        "a message by number": lambda: jetstream.get_msg(STREAM, 1),
        "a message by number, straight": lambda: jetstream.get_msg(STREAM, 1, direct=True),
        "the stream's end": lambda: jetstream.delete_stream(STREAM),
        "a purge": lambda: jetstream.purge_stream(STREAM),
        "a publication": lambda: jetstream.publish(f"rose.v2.{ours}.job.x.created", b"{}"),
    }
    with_answer: list[str] = []
    for name, attempt in attempts.items():
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await attempt()  # type: ignore[misc]
            with_answer.append(name)
    for prefix in ("$JS.API", API_PREFIX):
        for what in ("CONSUMER.MSG.NEXT", "CONSUMER.INFO"):
            await client.publish(f"{prefix}.{what}.{STREAM}.{other.id}", b"1", reply=f"{inbox_prefix(key.id)}.x")
        await client.publish(f"{prefix}.STREAM.INFO.{STREAM}", b"", reply=f"{inbox_prefix(key.id)}.x")
    await append_file(house.pool, project=theirs)
    await client.flush()
    await anyio.sleep(0.5)
    assert (with_answer, heard) == ([], [])
    refused = " ".join(errors).lower()
    assert refused.count("permissions violation") >= len(attempts) + 12
    await client.close()


async def test_a_key_that_is_revoked_is_cut_off_and_its_consumer_removed(house: House) -> None:
    project = await house.project("ours")
    (key, secret), (kept, kept_secret) = await house.key(project), await house.key(project)
    client, other = await house.may_read(key, secret), await house.may_read(kept, kept_secret)
    await house.tenants.revoke_keys([key], 2, asking())
    await eventually(lambda: client.is_closed)
    assert not await house.opens(key, secret)
    assert other.is_connected
    async with Bus(house.server.url) as bus:
        assert await bus.wait_connected(10)

        async def gone() -> bool:
            return await consumers(bus) == {kept.id}

        await eventually(gone)
    await client.close()
    await other.close()


async def test_a_key_ends_with_its_time_and_with_its_project(house: House) -> None:
    project = await house.project("ours")
    old, secret = await house.key(project, expires_at=int(time.time()) - 1)
    key, other_secret = await house.key(project)
    await (await house.may_read(key, other_secret)).close()
    assert not await house.opens(old, secret)
    await house.tenants.change_project(project, ArchiveProject(at=3), asking())

    async def ended() -> bool:
        return not await house.opens(key, other_secret)

    await eventually(ended)


async def test_readers_are_let_in_again_after_the_server_was_killed(house: House) -> None:
    key, secret = await house.key(await house.project("ours"))
    client = await house.may_read(key, secret)
    await anyio.to_thread.run_sync(house.server.kill)
    await eventually(lambda: not client.is_connected)
    await client.close()
    await anyio.to_thread.run_sync(house.server.start)
    client = await house.may_read(key, secret)
    assert len(await read(client, key, 2)) == 2
    await client.close()


async def test_an_api_key_opens_no_nats_and_a_nats_key_no_api(house: House) -> None:
    project = await house.project("ours")
    key, secret = await house.key(project)
    assert await keys_view.recognise(house.pool, secret) == (False, None)
    assert await keys_view.in_use(house.pool) == 0, "keys of NATS close no API that is open"
    api_secret = new_secret()
    account = ServiceAccount(id="svc_acct_x", name="a", created_at=1)
    command = CreateKey(key_id="key_api", project=project, at=1, name="a", account=account, scope="admin", hint="abcd")
    api_key = await house.tenants.create_key(command, api_secret, asking())
    await (await house.may_read(key, secret)).close()
    assert not await house.opens(api_key, api_secret)


async def test_the_reader_of_the_document(house: House, tmp_path: Path) -> None:
    text = DOCUMENT.read_text("utf-8")
    code = text.split("```python\n# reader.py\n")[1].split("```")[0]
    script = tmp_path / "reader.py"
    script.write_text(code)
    project = await house.project("ours")
    key, secret = await house.key(project)
    file_id = "file_of_the_document"
    await append_file(house.pool, project=project, file_id=file_id)
    await (await house.may_read(key, secret)).close()
    environment = {
        **os.environ,
        "NATS_URL": f"nats://{house.server.url.rpartition('@')[2]}",
        "NATS_USER": key.id,
        "NATS_PASSWORD": secret,
    }
    with (tmp_path / "printed").open("wb") as out:
        process = subprocess.Popen([sys.executable, script], env=environment, stdout=out)
    try:
        await eventually(lambda: f"file/{file_id}" in (tmp_path / "printed").read_text())
    finally:
        process.kill()
        process.wait()


async def test_the_users_for_a_server_that_somebody_else_runs(house: House, tmp_path: Path) -> None:
    """What `rose keys nats-users` prints, pasted into a configuration by hand."""
    key, secret = await house.key(await house.project("ours"))
    readers = await keys_view.nats_readers(house.pool, 1)
    users = "\n".join(nats_readers.accounts(readers))
    assert json.dumps(key.id) in users
    assert secret not in users
    (documented,) = re.findall(r"^```\n(accounts \{.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "readers.conf").write_text(users)
    configuration = tmp_path / "nats.conf"
    port = free_port()
    configuration.write_text(f'listen: "127.0.0.1:{port}"\n' + documented.replace("/data", str(tmp_path / "data")))
    command = [str(house.server.service.binary), "-c", str(configuration)]
    environment = {**os.environ, "NATS_RELAY_PASSWORD": "pw"}
    process = await anyio.open_process(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        async with Bus(f"nats://relay:pw@127.0.0.1:{port}") as bus:
            assert await bus.wait_connected(30)
            await bus.create_stream(relay.stream_settings(Settings()), first_sequence=1, metadata={})
            await nats_readers.keep_consumers(bus, readers)
            body = Message(subject=f"rose.v2.{readers[0].project}.job.x.created", body=b'{"position": 1}', headers={})
            await bus.publish(body)
            client = await house.connect(key, secret, url=f"nats://127.0.0.1:{port}")
            assert await read(client, key, 1) == [{"position": 1}]
            await client.close()
    finally:
        process.terminate()
        await process.wait()


async def test_a_reader_cannot_let_jetstream_publish_for_it(house: House) -> None:
    """JetStream answers to whatever reply subject a request names, also one that its sender may not publish on."""
    ours, theirs = await house.project("ours"), await house.project("theirs")
    (key, secret), (other, other_secret) = await house.key(ours), await house.key(theirs)
    client, neighbour = await house.may_read(key, secret), await house.may_read(other, other_secret)
    heard: list[str] = []

    async def hear(message: object) -> None:
        heard.append(message.subject)  # type: ignore[attr-defined]

    await neighbour.subscribe(f"rose.v2.{theirs}.>", cb=hear)
    await neighbour.flush()
    async with Bus(house.server.url) as bus:
        assert await bus.wait_connected(10)

        async def relayed() -> bool:
            facts = None
            with contextlib.suppress(BusUnavailable):
                facts = await bus.stream(STREAM)
            return facts is not None and facts.last_sequence >= await house.pool.fetchval(HEAD)

        await eventually(relayed)
        for reply in (f"rose.v2.{theirs}.job.x.succeeded", f"rose.v2.{ours}.job.x.succeeded"):
            for subject in (
                f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{key.id}",
                f"$JS.API.CONSUMER.INFO.{STREAM}.{key.id}",
                f"{API_PREFIX}.CONSUMER.MSG.NEXT.{STREAM}.{key.id}",
                f"{API_PREFIX}.CONSUMER.INFO.{STREAM}.{key.id}",
                f"$JS.ACK.{STREAM}.{key.id}.1.1.1.1.1",
            ):
                await client.publish(subject, b"", reply=reply)
        await client.flush()
        await client.close()
        await append_file(house.pool, project=ours)
        await eventually(relayed)
        await neighbour.flush()
        facts = await bus.stream(STREAM)
    assert facts is not None
    assert facts.last_sequence == await house.pool.fetchval(HEAD)
    assert heard == []
    await neighbour.close()


async def test_a_reader_that_waits_is_not_disturbed_by_other_keys(house: House) -> None:
    project = await house.project("ours")
    key, secret = await house.key(project)
    client = await house.may_read(key, secret)
    await read(client, key, 2)
    subscription = await client.jetstream(prefix=API_PREFIX).pull_subscribe_bind(consumer=key.id, stream=STREAM)
    other = await house.project("theirs")
    got: list[str] = []

    async def wait() -> None:
        (message,) = await subscription.fetch(1, timeout=20)
        got.append(json.loads(message.data)["type"])
        await message.ack_sync()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        for _ in range(3):
            another, password = await house.key(other)
            await (await house.may_read(another, password)).close()
        await append_file(house.pool, project=project)
        await eventually(lambda: got, seconds=10)
    assert got == ["rose.v2.file.uploaded"]
    await client.close()
