"""Keys for NATS: their holders read their project's events through their own consumer, and can do nothing else.

A real nats-server, the relay, the follower of the keys and the API; readers use nats-py alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import nats
import nats.errors
import pytest
from anyio.streams.text import TextReceiveStream
from nats.aio.client import Client

from projections.verify import verify
from rose import readers, relay
from rose.bus import Bus
from rose.local.nats import packaged_binary
from rose.log.pool import Pool
from rose.settings import Settings
from rose.subjects import STREAM
from tests.api.conftest import serving
from tests.api.running import SEED, Running, free_port
from tests.eventually import eventually
from tests.services import NatsServer

pytestmark = pytest.mark.anyio

PROJECTS = "/v1/organization/projects"


@asynccontextmanager
async def following(pool: Pool, given: Settings) -> AsyncIterator[Bus]:
    """Run what the process `projections` runs beside the views."""
    stop = anyio.Event()
    async with Bus(given.nats_url, name="test") as bus, anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run, pool, bus, given, stop)
        tasks.start_soon(readers.run, pool, bus, given, stop)
        yield bus
        stop.set()


def with_nats(settings: Callable[..., Settings], server: NatsServer) -> Settings:
    return settings(
        port=free_port(),
        nats_url=server.url,
        nats_readers_file=str(server.service.readers),
        nats_system_url=server.service.system_url,
    )


class Team:
    """A project, a client of its API, and the access that a key for NATS gave it."""

    def __init__(self, project: str, http: httpx2.AsyncClient, made: dict[str, Any]) -> None:
        self.project = project
        self.http = http
        self.account = made["id"]
        self.key: dict[str, Any] = made["api_key"]
        self.access: dict[str, Any] = made["api_key"]["nats"]
        self.errors: list[Exception] = []

    async def upload(self, name: str) -> None:
        sent = await self.http.post("/v1/files", files={"file": (name, SEED)}, data={"purpose": "fine-tune"})
        assert sent.status_code == 200, sent.text

    @asynccontextmanager
    async def connected(self, **options: Any) -> AsyncIterator[Client]:
        """Connect as docs/subjects.md says."""

        async def on_error(error: Exception) -> None:
            self.errors.append(error)

        client = Client()
        try:
            await client.connect(
                **{
                    "servers": self.access["url"],
                    "user": self.access["user"],
                    "password": self.key["value"],
                    "inbox_prefix": self.access["inbox_prefix"],
                    "error_cb": on_error,
                    "reconnect_time_wait": 0.1,
                    **options,
                }
            )
            yield client
        finally:
            with suppress(nats.errors.Error):
                await client.close()

    async def read(self, client: Client, count: int, *, batch: int = 1) -> list[dict[str, Any]]:
        """Take `count` events through the consumer, acknowledging each."""
        jetstream = client.jetstream(prefix=self.access["api_prefix"])
        subscription = await jetstream.pull_subscribe_bind(self.access["consumer"], stream=self.access["stream"])
        found: list[dict[str, Any]] = []
        with anyio.fail_after(30):
            while len(found) < count:
                await anyio.lowlevel.checkpoint()
                with suppress(nats.errors.Error):  # nothing there yet, or NATS or the consumer is just being made anew
                    for message in await subscription.fetch(batch, timeout=2, heartbeat=0.5):
                        found.append({**json.loads(message.data), "nats_subject": message.subject})
                        await message.ack_sync()
        await subscription.unsubscribe()
        return found


class Town:
    """A running API with NATS, its administrator, and the clients of its teams."""

    def __init__(self, api: Running, server: NatsServer, bus: Bus, admin: httpx2.AsyncClient) -> None:
        self.api = api
        self.server = server
        self.bus = bus
        self.admin = admin
        self.clients: list[httpx2.AsyncClient] = []

    async def team(self, name: str) -> Team:
        project = (await self.admin.post(PROJECTS, json={"name": name})).json()["id"]
        path = f"{PROJECTS}/{project}/service_accounts"
        key = (await self.admin.post(path, json={"name": name})).json()["api_key"]["value"]
        http = httpx2.AsyncClient(
            base_url=self.api.services.settings.url, headers={"authorization": f"Bearer {key}"}, timeout=60
        )
        self.clients.append(http)
        made = await self.admin.post(path, json={"name": f"{name} reader", "nats": True})
        assert made.status_code == 200, made.text
        return Team(project, http, made.json())

    async def consumers(self) -> set[str]:
        return await self.bus.readers(STREAM)


@pytest.fixture
async def town(
    settings: Callable[..., Settings], pool: Pool, nats_server: Callable[[], NatsServer]
) -> AsyncIterator[Town]:
    server = nats_server()
    given = with_nats(settings, server)
    async with following(pool, given) as bus, serving(given, pool) as api:
        made = await api.http.post(f"{PROJECTS}/default/service_accounts", json={"name": "admin", "scope": "admin"})
        headers = {"authorization": f"Bearer {made.json()['api_key']['value']}"}
        async with httpx2.AsyncClient(base_url=given.url, headers=headers, timeout=60) as admin:
            town = Town(api, server, bus, admin)
            yield town
            for client in town.clients:
                await client.aclose()


def subjects(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


async def test_two_projects_readers_see_exactly_their_own_events(town: Town) -> None:
    red, blue = await town.team("red"), await town.team("blue")
    for number in range(5):
        await red.upload(f"red{number}.jsonl")
        await blue.upload(f"blue{number}.jsonl")
    position = await town.api.services.pool.fetchval("select position from rose.log_head")
    for team in (red, blue):
        expected = await town.api.services.pool.fetch(
            "select events.position from rose.events join rose.streams using (stream_id) "
            "where project_id = $1 and events.position <= $2 order by 1",
            team.project,
            position,
        )
        async with team.connected() as client:
            events = await team.read(client, len(expected), batch=3)
            jetstream = client.jetstream(prefix=team.access["api_prefix"])
            info = await jetstream.consumer_info(team.access["stream"], team.access["consumer"])
        assert [event["position"] for event in events] == [row["position"] for row in expected]
        assert {event["project"] for event in events} == {team.project}
        assert all(event["nats_subject"].startswith(f"rose.v2.{team.project}.") for event in events)
        assert (info.num_pending, info.num_ack_pending) == (0, 0)
        assert team.errors == []


async def test_a_reader_goes_on_after_a_restart_of_nats_and_hears_core_messages_again(town: Town) -> None:
    red = await town.team("red")
    await red.upload("before.jsonl")
    async with red.connected(max_reconnect_attempts=-1) as client:
        heard = await client.subscribe(f"rose.v2.{red.project}.file.>")
        seen = {event["id"] for event in await red.read(client, 4)}
        await anyio.to_thread.run_sync(town.server.kill)
        await red.upload("meanwhile.jsonl")
        await anyio.to_thread.run_sync(town.server.start)
        (event,) = await red.read(client, 1)
        while event["id"] in seen:  # an acknowledgement that a killed NATS had not yet stored: at least once
            (event,) = await red.read(client, 1)
        assert event["data"]["filename"] == "meanwhile.jsonl"
        message = await heard.next_msg(timeout=10)
        assert message.subject.startswith(f"rose.v2.{red.project}.file.")


async def test_a_reader_may_do_nothing_else(town: Town) -> None:
    red, blue = await town.team("red"), await town.team("blue")
    await blue.upload("blue.jsonl")
    async with red.connected() as client, town_client(town) as own:
        before = (await own.jetstream().stream_info(STREAM)).state.last_seq
        for subject in (
            f"rose.v2.{blue.project}.>",
            "rose.v2.>",
            "rose.v2.*.file.>",
            ">",
            "_INBOX.>",
            f"_INBOX_{blue.key['id']}.>",
            "$SYS.>",
            "$JS.>",
        ):
            await client.subscribe(subject)
            assert await denied(red, client, "subscription"), subject
        for subject in (
            f"rose.v2.{red.project}.file.file_x.uploaded",
            f"rose.v2.{blue.project}.file.file_x.uploaded",
            f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{red.key['id']}",
            f"$JS.API.CONSUMER.CREATE.{STREAM}.mine.rose.v2.{red.project}.>",
            f"$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.mine",
            f"$JS.API.CONSUMER.DELETE.{STREAM}.{red.key['id']}",
            f"$JS.API.STREAM.INFO.{STREAM}",
            f"$JS.API.STREAM.MSG.GET.{STREAM}",
            f"$JS.API.DIRECT.GET.{STREAM}",
            f"$JS.API.STREAM.DELETE.{STREAM}",
            f"$JS.ACK.{STREAM}.{blue.key['id']}.1.1.1.1.1",
            f"ROSE.API.CONSUMER.INFO.{STREAM}.{blue.key['id']}",
            f"ROSE.API.CONSUMER.MSG.NEXT.{STREAM}.{blue.key['id']}",
            f"ROSE.API.CONSUMER.CREATE.{STREAM}.mine",
            f"ROSE.API.STREAM.INFO.{STREAM}",
            "$SYS.REQ.SERVER.PING",
        ):
            await client.publish(subject, b"{}", reply=client.new_inbox())
            assert await denied(red, client, "publish"), subject
        after = (await own.jetstream().stream_info(STREAM)).state
        assert after.last_seq == before
        assert await town.consumers() == {red.key["id"], blue.key["id"]}


async def test_a_reader_cannot_let_jetstream_publish_for_it(town: Town) -> None:
    """JetStream answers to the reply subject that a request names, whatever its sender may publish itself."""
    red, blue = await town.team("red"), await town.team("blue")
    await red.upload("red.jsonl")
    async with red.connected() as client, blue.connected() as other, town_client(town) as own:
        spied: list[str] = []

        async def spy(message: Any) -> None:
            spied.append(message.subject)

        await other.subscribe(f"rose.v2.{blue.project}.>", cb=spy)
        await other.flush()
        before = (await own.jetstream().stream_info(STREAM)).state.last_seq
        for reply in (
            f"rose.v2.{blue.project}.job.ftjob_x.succeeded",
            f"rose.v2.{red.project}.job.ftjob_x.succeeded",
            f"$JS.API.STREAM.DELETE.{STREAM}",
        ):
            for request, body in (
                (f"ROSE.API.CONSUMER.MSG.NEXT.{STREAM}.{red.key['id']}", b'{"batch": 1}'),
                (f"ROSE.API.CONSUMER.INFO.{STREAM}.{red.key['id']}", b""),
                (f"$JS.ACK.{STREAM}.{red.key['id']}.1.1.1.1.1", b""),
            ):
                await client.publish(request, body, reply=reply)
        await client.flush()
        await red.upload("again.jsonl")
        await eventually(lambda: fully_relayed(town))
        await other.flush()
        last = (await own.jetstream().stream_info(STREAM)).state.last_seq
        assert last == before + 1 == await town.api.services.pool.fetchval("select position from rose.log_head")
        assert spied == []


async def test_the_documented_program_reads(town: Town, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "subjects.md").read_text("utf-8")
    _, script = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    path = tmp_path / "reader.py"
    path.write_text(script)
    red, blue = await town.team("red"), await town.team("blue")
    await blue.upload("blue.jsonl")
    await red.upload("red.jsonl")
    environment = {
        **os.environ,
        "NATS_URL": red.access["url"],
        "NATS_USER": red.access["user"],
        "NATS_PASSWORD": red.key["value"],
    }
    async with await anyio.open_process([sys.executable, path], env=environment, stderr=None) as process:
        assert process.stdout is not None
        printed = ""
        with anyio.fail_after(60):
            async for text in TextReceiveStream(process.stdout):
                printed += text
                if "file.uploaded" in printed and printed.endswith("\n"):
                    break
        process.kill()
    kinds = [line.split()[1] for line in printed.splitlines()]
    assert kinds == ["rose.v2.project.created", "rose.v2.key.created", "rose.v2.key.created", "rose.v2.file.uploaded"]


async def test_the_documented_configuration_of_another_nats_works(
    settings: Callable[..., Settings], pool: Pool, private_folder: Path
) -> None:
    document = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    (text,) = re.findall(r"^```\n(accounts \{.*?)^```$", document, re.MULTILINE | re.DOTALL)
    port = free_port()
    configuration = private_folder / "nats.conf"
    configuration.write_text(f'listen: "127.0.0.1:{port}"\n' + text.replace("/data", str(private_folder / "data")))
    given = settings(
        port=free_port(),
        nats_url=f"nats://relay:secret@127.0.0.1:{port}",
        nats_readers_file=str(private_folder / "readers.conf"),
        nats_system_url=f"nats://system:hidden@127.0.0.1:{port}",
    )
    (private_folder / "readers.conf").write_text("")
    environment = {**os.environ, "NATS_RELAY_PASSWORD": "secret", "NATS_SYSTEM_PASSWORD": "hidden"}
    command = [str(packaged_binary()), "-c", str(configuration)]
    process = await anyio.open_process(command, env=environment, stdout=DEVNULL, stderr=DEVNULL)
    try:
        async with following(pool, given), serving(given, pool) as api:
            path = f"{PROJECTS}/default/service_accounts"
            made = (await api.http.post(path, json={"name": "reader", "nats": True})).json()
            assert made["api_key"]["nats"]["url"] == f"nats://127.0.0.1:{port}"
            team = Team("default", api.http, made)
            await eventually(lambda: opens(team))
            async with team.connected(allow_reconnect=False) as client:
                await team.read(client, 1)
                await api.http.delete(f"{PROJECTS}/default/api_keys/{team.key['id']}")
                await eventually(lambda: client.is_closed)
    finally:
        process.terminate()
        await process.wait()


async def test_a_key_that_was_revoked_while_nobody_followed_is_cut_off_at_the_start(
    settings: Callable[..., Settings], pool: Pool, nats_server: Callable[[], NatsServer]
) -> None:
    given = with_nats(settings, nats_server())
    async with serving(given, pool) as api:
        async with following(pool, given):
            made = await api.http.post(f"{PROJECTS}/default/service_accounts", json={"name": "reader", "nats": True})
        team = Team("default", api.http, made.json())
        async with team.connected(allow_reconnect=False) as client:
            await api.http.delete(f"{PROJECTS}/default/api_keys/{team.key['id']}")
            assert client.is_connected
            async with following(pool, given) as bus:
                await eventually(lambda: client.is_closed)
                await eventually(lambda: no_reader(bus))


async def test_a_revoked_key_is_cut_off_and_its_consumer_goes(town: Town) -> None:
    red, blue = await town.team("red"), await town.team("blue")
    async with red.connected(allow_reconnect=False) as client, blue.connected() as other:
        assert await town.consumers() == {red.key["id"], blue.key["id"]}
        listed = (await town.admin.get(f"{PROJECTS}/{red.project}/api_keys")).json()["data"]
        assert [(key["kind"], key["scope"], key["redacted_value"][:11]) for key in listed] == [
            ("nats", "read", "nats-rose-…"),
            ("api", "write", "sk-rose-…" + listed[1]["redacted_value"][9:11]),
        ]
        gone = await town.admin.delete(f"{PROJECTS}/{red.project}/api_keys/{red.key['id']}")
        assert gone.status_code == 200
        await eventually(lambda: client.is_closed)
        await eventually(lambda: consumers_are(town, {blue.key["id"]}))
        assert other.is_connected
        await blue.upload("blue.jsonl")
        assert "file.uploaded" in subjects(await blue.read(other, 4))[-1]
    with pytest.raises(nats.errors.Error, match="Authorization Violation"):
        async with red.connected(allow_reconnect=False):
            pass
    assert await verify(town.api.services.pool) == []


async def test_an_archived_projects_and_an_expired_reader_are_cut_off(town: Town) -> None:
    red, blue = await town.team("red"), await town.team("blue")
    async with red.connected(allow_reconnect=False) as one, blue.connected(allow_reconnect=False) as two:
        await town.admin.post(f"{PROJECTS}/{red.project}/archive")
        await eventually(lambda: one.is_closed)
        assert two.is_connected
        await town.api.services.pool.execute(
            "update rose.keys set doc = jsonb_set(doc, '{expires_at}', '1') where id = $1", blue.key["id"]
        )
        await eventually(lambda: two.is_closed)
    await eventually(lambda: consumers_are(town, set()))


async def test_neither_kind_of_key_opens_the_others_door(town: Town) -> None:
    red = await town.team("red")
    for secret in (red.key["value"], red.key["id"]):
        refused = await town.api.http.get("/v1/files", headers={"authorization": f"Bearer {secret}"})
        assert refused.status_code == 401
    key = red.http.headers["authorization"].removeprefix("Bearer ")
    listed = (await town.admin.get(f"{PROJECTS}/{red.project}/api_keys")).json()["data"]
    for user in (*(one["id"] for one in listed), "rose", "system"):
        with pytest.raises(nats.errors.Error, match="Authorization Violation"):
            async with red.connected(user=user, password=key, allow_reconnect=False):
                pass


async def test_nothing_tells_the_password(town: Town) -> None:
    red = await town.team("red")
    rows = await town.api.services.pool.fetch(
        "select data::text || metadata::text as text from rose.events "
        "union all select doc::text from rose.keys union all select nats_passwords::text from rose.nats_passwords"
    )
    secret = red.key["value"]
    assert not any(secret in row["text"] for row in rows)
    assert secret not in town.server.service.readers.read_text()


async def test_a_key_for_nats_is_not_the_first_key(
    settings: Callable[..., Settings], pool: Pool, nats_server: Callable[[], NatsServer]
) -> None:
    given = with_nats(settings, nats_server())
    async with following(pool, given), serving(given, pool) as api:
        made = await api.http.post(f"{PROJECTS}/default/service_accounts", json={"name": "reader", "nats": True})
        assert made.json()["api_key"]["nats"]["ready"] is True
        assert (await api.http.get("/v1/files")).status_code == 200, "without an API key everything is open, as before"


async def test_what_the_keys_say_is_written_again_at_a_start_and_after_a_new_stream(
    settings: Callable[..., Settings], pool: Pool, nats_server: Callable[[], NatsServer]
) -> None:
    server = nats_server()
    given = with_nats(settings, server)
    async with serving(given, pool) as api:
        async with following(pool, given):
            made = await api.http.post(f"{PROJECTS}/default/service_accounts", json={"name": "reader", "nats": True})
            team = Team("default", api.http, made.json())
            text = server.service.readers.read_text()
        await anyio.to_thread.run_sync(server.stop)
        server.service.readers.unlink()
        await anyio.to_thread.run_sync(server.start)
        async with following(pool, given) as bus:
            await eventually(lambda: server.service.readers.read_text() == text)
            await eventually(lambda: opens(team))
            async with team.connected() as client:
                await team.read(client, 1)
                await relay.rebuild_stream(pool, bus, given)
                await team.read(client, 1)


async def test_keys_for_nats_need_a_nats_that_rose_can_tell(api: Running, tmp_path: Path) -> None:
    path = f"{PROJECTS}/default/service_accounts"
    refused = (await api.http.post(path, json={"name": "reader", "nats": True})).json()["error"]
    assert (refused["code"], refused["param"]) == ("nats_not_managed", "nats")
    assert "ROSE_NATS_READERS_FILE" in refused["message"]
    wrong = (await api.http.post(path, json={"name": "reader", "nats": "yes"})).json()["error"]
    assert (wrong["param"], wrong["code"]) == ("nats", "invalid_type")


async def test_a_key_for_nats_only_reads(town: Town) -> None:
    body = {"name": "reader", "nats": True, "scope": "write"}
    refused = (await town.admin.post(f"{PROJECTS}/default/service_accounts", json=body)).json()["error"]
    assert (refused["param"], refused["code"]) == ("scope", "invalid_value")


@asynccontextmanager
async def town_client(town: Town) -> AsyncIterator[Client]:
    client = await nats.connect(town.server.url)
    try:
        yield client
    finally:
        await client.close()


async def denied(team: Team, client: Client, what: str) -> bool:
    """Return whether the server refuses what was just sent."""
    team.errors.clear()
    await client.flush()
    await eventually(lambda: team.errors != [])
    return f"permissions violation for {what}" in str(team.errors[0]).lower()


async def consumers_are(town: Town, wanted: set[str]) -> bool:
    return await town.consumers() == wanted


async def no_reader(bus: Bus) -> bool:
    return await bus.readers(STREAM) == set()


async def fully_relayed(town: Town) -> bool:
    facts = await town.bus.stream(STREAM)
    head = await town.api.services.pool.fetchval("select position from rose.log_head")
    return facts is not None and facts.last_sequence >= head


async def opens(team: Team) -> bool:
    with suppress(nats.errors.Error):
        async with team.connected(allow_reconnect=False):
            return True
    return False
