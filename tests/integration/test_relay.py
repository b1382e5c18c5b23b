"""The relay against a real Postgres and a real nats-server: sequence = position, whatever dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import anyio
import msgspec
import nats
import pytest
from nats.js.client import JetStreamContext

from projections.positions import Progress, alarms, list_projections
from rose import relay
from rose.bus import WRONG_LAST_SEQUENCE, Bus, BusRefused, BusUnavailable, StreamSettings
from rose.log.migrate import migrate
from rose.log.pool import Pool, open_pool
from rose.relay import Relay, rebuild_stream, stream_settings
from rose.settings import Settings
from rose.subjects import STREAM, CloudEvent, message
from tests.eventually import eventually
from tests.integration.events import append_file, append_files
from tests.services import NatsServer

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]

SETTINGS = Settings()


@pytest.fixture
def server(nats_server: Callable[[], NatsServer]) -> NatsServer:
    return nats_server()


@pytest.fixture
async def bus(server: NatsServer) -> AsyncIterator[Bus]:
    async with Bus(server.url, name="test") as bus:
        assert await bus.wait_connected(30)
        yield bus


@asynccontextmanager
async def relaying(pool: Pool, bus: Bus, settings: Settings = SETTINGS) -> AsyncIterator[None]:
    """Run a relay as the process `projections` does."""
    stop = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(relay.run, pool, bus, settings, stop)
        yield
        stop.set()


@asynccontextmanager
async def jetstream(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    """Give nats-py itself, for what ROSE never does."""
    client = await nats.connect(server.url)
    try:
        yield client.jetstream()
    finally:
        await client.close()


async def reaches(bus: Bus, position: int) -> None:
    """Wait until the stream ends at `position`."""

    async def there() -> bool:
        try:
            facts = await bus.stream(STREAM)
        except BusUnavailable:
            return False
        return facts is not None and facts.last_sequence == position

    await eventually(there)


async def reaches_at_least(bus: Bus, position: int) -> None:
    """Wait until the stream has come to `position`, through the absence of NATS."""

    async def there() -> bool:
        try:
            facts = await bus.stream(STREAM)
        except BusUnavailable:
            return False
        return facts is not None and facts.last_sequence >= position

    await eventually(there)


async def alarm(pool: Pool) -> Progress:
    """Wait for the relay's alarm."""
    (found,) = await eventually(lambda: alarms(pool))
    assert found.name == "relay"
    return found


async def assert_copy(pool: Pool, bus: Bus) -> None:
    """Prove that the stream holds each event of the log at its position, and nothing else."""
    rows = await pool.fetch("select position, event_id::text, stream_id, type from rose.events order by position")
    facts = await bus.stream(STREAM)
    assert facts is not None
    assert (facts.first_sequence, facts.last_sequence, facts.messages) == (1, len(rows), len(rows))
    for row in rows:
        stored = await bus.stored(STREAM, row["position"])
        assert stored is not None
        body = msgspec.json.decode(stored.body, type=CloudEvent)
        assert stored.headers["Nats-Msg-Id"] == stored.headers["ce-id"] == body.id == row["event_id"]
        assert (body.position, body.subject) == (row["position"], row["stream_id"])
        assert body.type == stored.headers["ce-type"] == f"rose.v2.{row['type']}"


async def test_a_message_is_a_cloud_event_on_the_subject_of_its_entity(pool: Pool, bus: Bus) -> None:
    async with relaying(pool, bus):
        await append_file(pool, file_id="file_abc", filename="größer.jsonl")
        await reaches(bus, 1)
    stored = await bus.stored(STREAM, 1)
    assert stored is not None
    assert stored.subject == "rose.v2.default.file.file_abc.uploaded"
    row = await pool.fetchrow("select *, (select log_id from rose.log_head) as log_id from rose.events")
    assert row is not None
    body = msgspec.json.decode(stored.body)
    assert body == {
        "specversion": "1.0",
        "id": str(row["event_id"]),
        "source": f"/rose/logs/{row['log_id']}",
        "type": "rose.v2.file.uploaded",
        "subject": "file/file_abc",
        "project": "default",
        "time": row["recorded_at"].isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "sequence": "00000000000000000001",
        "position": 1,
        "streamversion": 1,
        "schemaversion": 2,
        "data": msgspec.json.decode(row["data"]),
    }
    assert body["data"]["filename"] == "größer.jsonl"
    assert stored.headers == {
        "Nats-Expected-Last-Sequence": "0",
        "Nats-Msg-Id": str(row["event_id"]),
        "Content-Type": "application/cloudevents+json",
        "ce-id": str(row["event_id"]),
        "ce-type": "rose.v2.file.uploaded",
    }


async def test_the_stream_is_kept_as_the_settings_say(pool: Pool, bus: Bus, server: NatsServer) -> None:
    async with relaying(pool, bus):
        await reaches(bus, 0)
    async with jetstream(server) as js:
        config = (await js.stream_info(STREAM)).config
    assert config.subjects == ["rose.v2.>"]
    assert (config.storage, config.retention, config.discard) == ("file", "limits", "old")
    assert (config.max_bytes, config.max_age, config.num_replicas) == (1 << 30, 30 * 86400, 1)
    assert config.deny_delete is True
    assert config.deny_purge is True
    assert config.metadata is not None
    identity = await pool.fetchrow(
        "select log_id::text, (select system_identifier::text from pg_control_system()) as system from rose.log_head"
    )
    assert identity is not None
    assert config.metadata["rose_log_id"] == identity["log_id"]
    assert config.metadata["rose_system_identifier"] == identity["system"]
    assert config.metadata["rose_timeline"] == "00000001"

    smaller = msgspec.structs.replace(SETTINGS, nats_max_bytes=1 << 20, nats_max_age_seconds=3600.0)
    await append_file(pool)
    async with relaying(pool, bus, smaller):
        await reaches(bus, 1)
    facts = await bus.stream(STREAM)
    assert facts is not None
    assert facts.settings == stream_settings(smaller)
    assert facts.metadata["rose_log_id"] == identity["log_id"]


async def test_racing_relays_that_are_killed_leave_an_exact_copy(
    pool: Pool, bus: Bus, server: NatsServer, database_dsn: str
) -> None:
    def start(lock: int) -> subprocess.Popen[bytes]:
        arguments = ["-m", "tests.integration.relaying", database_dsn, server.url, str(lock)]
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT)

    racers = {1001: start(1001), 1002: start(1002)}
    held = "select count(*) from pg_locks where locktype = 'advisory' and classid = $1 and objid in (1001, 1002)"
    total = 0
    try:
        for round_number in range(6):
            # Each holds a lock of its own, so both publish; one dies in the middle of it.
            await eventually(lambda: both_work(pool, held))
            async with anyio.create_task_group() as group:
                group.start_soon(append_files, pool, 150)
                await reaches_at_least(bus, total + 50)
                lock = 1001 + round_number % 2
                racers[lock].send_signal(signal.SIGKILL)
                racers[lock].wait(timeout=30)
            total += 150
            racers[lock] = start(lock)
        await reaches(bus, total)
    finally:
        for process in racers.values():
            process.kill()
            process.wait(timeout=30)
    await assert_copy(pool, bus)


async def both_work(pool: Pool, query: str) -> bool:
    return await pool.fetchval(query, 0x524F5345) == 2


@pytest.mark.parametrize("position", [3, 5, 7])
async def test_a_message_is_taken_only_at_its_own_position(pool: Pool, bus: Bus, position: int) -> None:
    """What a relay that slept for long would send, after JetStream has forgotten the ids: never twice, never a hole."""
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 5))
    late = message(
        log_id="l",
        position=position,
        event_id="forgotten",
        wire_name="file.uploaded",
        schema=2,
        project="default",
        stream_id="file/file_x",
        version=1,
        recorded_at=datetime.now(UTC),
        data=b"{}",
    )
    with pytest.raises(BusRefused) as caught:
        await bus.publish(late)
    assert caught.value.error_code == WRONG_LAST_SEQUENCE
    await assert_copy(pool, bus)


async def test_one_relay_works_and_another_takes_over(pool: Pool, server: NatsServer) -> None:
    """The second relay never looks at NATS while the first holds the lock, and goes on where that one was killed."""
    async with (
        Bus(server.url) as first_bus,
        Bus(server.url) as second_bus,
    ):
        await first_bus.wait_connected(30)
        await second_bus.wait_connected(30)
        first, second = anyio.CancelScope(), anyio.CancelScope()

        async def relay_in(scope: anyio.CancelScope, bus: Bus) -> None:
            with scope:
                await Relay(pool, bus, stream_settings(SETTINGS)).relay()

        async with anyio.create_task_group() as group:
            group.start_soon(relay_in, first, first_bus)
            last = await append_files(pool, 20)
            await reaches(first_bus, last)
            group.start_soon(relay_in, second, second_bus)
            waiting = "select count(*) from pg_locks where locktype = 'advisory' and classid = $1 and objid = $2"
            assert await pool.fetchval(waiting, 0x524F5345, relay.LOCK) == 1
            first.cancel()
            last = await append_files(pool, 20)
            await reaches(second_bus, last)
            second.cancel()
        await assert_copy(pool, second_bus)


async def test_a_stream_that_lost_its_tail_is_filled_again(pool: Pool, bus: Bus, server: NatsServer) -> None:
    """As after a crash of a server without `sync_interval: always`: what was acknowledged is gone."""
    last = await append_files(pool, 300)
    async with relaying(pool, bus):
        await reaches(bus, last)
    facts = await bus.stream(STREAM)
    assert facts is not None
    messages = [await bus.stored(STREAM, sequence) for sequence in range(1, 201)]
    async with jetstream(server) as js:
        await js.delete_stream(STREAM)
        await bus.create_stream(stream_settings(SETTINGS), first_sequence=1, metadata=facts.metadata)
        for stored in messages:
            assert stored is not None
            await js.publish(stored.subject, stored.body, headers=dict(stored.headers))
    async with relaying(pool, bus):
        await reaches(bus, last)
    await assert_copy(pool, bus)


async def test_a_tail_that_is_lost_while_the_relay_runs_is_noticed(pool: Pool, bus: Bus) -> None:
    last = await append_files(pool, 30)
    async with relaying(pool, bus):
        await reaches(bus, last)
        await bus.delete_stream(STREAM)
        await reaches(bus, last)
    await assert_copy(pool, bus)


async def test_nats_away_for_a_while_then_everything_arrives(pool: Pool, bus: Bus, server: NatsServer) -> None:
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 100))
        for kill in (server.kill, server.stop):
            await anyio.to_thread.run_sync(kill)
            await eventually(lambda: not bus.connected)
            last = await append_files(pool, 300)  # appends do not wait for NATS
            await eventually(lambda: said(pool, "waiting"))
            await anyio.to_thread.run_sync(server.start)
            await reaches(bus, last)
        await eventually(lambda: said(pool, "running"))
    await assert_copy(pool, bus)


async def said(pool: Pool, status: str) -> bool:
    (progress,) = await list_projections(pool)
    assert progress.name == "relay"
    return progress.status == status and (progress.error is None) == (status == "running")


async def test_nats_killed_in_the_middle_of_publishing(pool: Pool, bus: Bus, server: NatsServer) -> None:
    total = 1500
    async with relaying(pool, bus), anyio.create_task_group() as group:
        group.start_soon(append_files, pool, total)
        for kill in range(3):
            await eventually(lambda: bus.connected)
            await reaches_at_least(bus, 300 * (kill + 1))
            await anyio.to_thread.run_sync(server.kill)
            await anyio.to_thread.run_sync(server.start)
        await reaches(bus, total)
    await assert_copy(pool, bus)


async def test_a_relay_started_before_nats_begins_when_it_comes(pool: Pool, server: NatsServer) -> None:
    url = server.url
    server.stop()
    last = await append_files(pool, 10)
    async with Bus(url) as bus:
        async with relaying(pool, bus):
            assert bus.connected is False
            await anyio.to_thread.run_sync(server.start)
            await reaches(bus, last)
        await assert_copy(pool, bus)


async def test_the_relay_survives_the_loss_of_its_connection_to_postgres(pool: Pool, bus: Bus) -> None:
    async with relaying(pool, bus):
        for _ in range(3):
            await reaches(bus, await append_files(pool, 20))
            await pool.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where pid <> pg_backend_pid() and datname = current_database()"
            )
        await reaches(bus, await append_files(pool, 20))
    await assert_copy(pool, bus)


# --- the audit


async def test_nats_ahead_of_a_restored_postgres_halts_the_relay(
    pool: Pool, bus: Bus, database_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Postgres as it was before its last events: the log is the same, its end is not."""
    await append_files(pool, 50)
    await snapshot(pool)
    await append_files(pool, 50)
    async with relaying(pool, bus):
        await reaches(bus, 100)
    await restore(pool)
    async with relaying(pool, bus):
        halted = await alarm(pool)
        assert halted.error is not None
        assert "NATS is ahead of Postgres" in halted.error
        assert "ends at 100, the log at 50" in halted.error
        assert "rose events rebuild-stream" in halted.error
        assert "The relay is stopped" in caplog.text
        # Appends go on, but not to NATS: not even once the log has grown beyond the stream.
        await append_files(pool, 70)
        await relay_pause(pool, halted)
        facts = await bus.stream(STREAM)
        assert facts is not None
        assert facts.last_sequence == 100

        await rebuild_stream(pool, bus, SETTINGS)
        await reaches(bus, 120)
        await eventually(lambda: said(pool, "running"))
    await assert_copy(pool, bus)


async def relay_pause(pool: Pool, before: Progress) -> None:
    """Wait until the halted relay has audited again and found another reason: the log is longer than the stream now."""

    async def changed() -> bool:
        (now,) = await alarms(pool)
        return now.error != before.error

    await eventually(changed)
    (now,) = await alarms(pool)
    assert now.error is not None
    assert "different pasts" in now.error


async def snapshot(pool: Pool) -> None:
    """Keep a copy of the log, as a backup does."""
    await pool.execute("create schema kept")
    for table in ("events", "streams", "files", "commands", "log_head"):
        await pool.execute(f"create table kept.{table} as select * from rose.{table}")


async def restore(pool: Pool) -> None:
    """Put the log back to the copy."""
    await pool.execute("alter table rose.events disable trigger all")
    await pool.execute("delete from rose.events where position not in (select position from kept.events)")
    await pool.execute("alter table rose.events enable always trigger events_immutable")
    for table, key in (("streams", "stream_id"), ("files", "id"), ("commands", "command_id")):
        await pool.execute(f"delete from rose.{table} where {key} not in (select {key} from kept.{table})")
    await pool.execute("update rose.log_head set position = (select position from kept.log_head)")


async def test_a_restored_postgres_that_has_caught_up_is_known_by_the_event_id(pool: Pool, bus: Bus) -> None:
    await append_files(pool, 10)
    await snapshot(pool)
    await append_files(pool, 10)
    async with relaying(pool, bus):
        await reaches(bus, 20)
    await restore(pool)
    await append_files(pool, 10)  # as long as before, with other events
    async with relaying(pool, bus):
        halted = await alarm(pool)
    assert halted.error is not None
    assert "different pasts" in halted.error


@pytest.mark.parametrize("key", ["rose_log_id", "rose_system_identifier", "rose_timeline"])
async def test_the_stream_of_another_log_halts_the_relay(pool: Pool, bus: Bus, key: str) -> None:
    last = await append_files(pool, 5)
    async with relaying(pool, bus):
        await reaches(bus, last)
    facts = await bus.stream(STREAM)
    assert facts is not None
    await bus.update_stream(stream_settings(SETTINGS), metadata={**facts.metadata, key: "another"})
    await append_file(pool)
    async with relaying(pool, bus):
        halted = await alarm(pool)
        assert halted.error is not None
        assert f"{key} is another" in halted.error
        after = await bus.stream(STREAM)
        assert after is not None
        assert after.last_sequence == last


async def test_a_different_database_halts_the_relay(
    pool: Pool, bus: Bus, empty_database_dsn: str, anyio_backend: str
) -> None:
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 5))
    await migrate(empty_database_dsn)
    other = await open_pool(empty_database_dsn)
    try:
        await other.execute("update rose.log_head set log_id = gen_random_uuid()")
        await append_files(other, 8)
        async with relaying(other, bus):
            halted = await alarm(other)
        assert halted.error is not None
        assert "rose_log_id" in halted.error
    finally:
        await other.close()


async def test_the_audit_runs_again_after_each_reconnect_of_nats(
    pool: Pool, bus: Bus, server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    """While NATS is away, its stream becomes another one's: not one event is published into it."""
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 5))
        facts = await bus.stream(STREAM)
        assert facts is not None
        await bus.update_stream(stream_settings(SETTINGS), metadata={**facts.metadata, "rose_log_id": "another"})
        await anyio.to_thread.run_sync(server.kill)
        await eventually(lambda: not bus.connected)
        await append_files(pool, 5)
        await anyio.to_thread.run_sync(server.start)
        await alarm(pool)
        after = await bus.stream(STREAM)
        assert after is not None
        assert after.last_sequence == 5


async def test_the_audit_runs_again_after_each_reconnect_of_postgres(pool: Pool, bus: Bus) -> None:
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 5))
        facts = await bus.stream(STREAM)
        assert facts is not None
        await bus.update_stream(stream_settings(SETTINGS), metadata={**facts.metadata, "rose_log_id": "another"})
        await pool.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where pid <> pg_backend_pid() and datname = current_database()"
        )
        await append_files(pool, 5)
        await alarm(pool)
        after = await bus.stream(STREAM)
        assert after is not None
        assert after.last_sequence == 5


async def test_the_audit_runs_each_minute(pool: Pool, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "AUDIT_SECONDS", 0.1)  # the minute
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 5))
        facts = await bus.stream(STREAM)
        assert facts is not None
        await bus.update_stream(stream_settings(SETTINGS), metadata={**facts.metadata, "rose_log_id": "another"})
        await alarm(pool)  # nothing was appended, nothing was reconnected
        await bus.update_stream(stream_settings(SETTINGS), metadata=facts.metadata)
        await eventually(lambda: said(pool, "running"))


# --- content that NATS refuses


async def test_what_is_too_large_goes_out_without_data(pool: Pool, bus: Bus, server: NatsServer) -> None:
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 3))
        async with jetstream(server) as js:
            config = (await js.stream_info(STREAM)).config
            await js.update_stream(config, max_msg_size=4000)
        await append_file(pool, filename="x" * 10_000)
        await append_file(pool)
        await append_file(pool, filename="y" * 10_000)
        last = await append_files(pool, 3)
        await reaches(bus, last)
    stored = await bus.stored(STREAM, 4)
    assert stored is not None
    assert stored.subject == "rose.v2.default.event.oversize"
    body = msgspec.json.decode(stored.body)
    assert "data" not in body
    assert body["dataref"] == f"{body['source']}/events/4"
    assert (body["type"], body["position"]) == ("rose.v2.file.uploaded", 4)
    await assert_copy(pool, bus)


async def test_what_is_larger_than_the_server_takes_goes_out_without_data(pool: Pool, server: NatsServer) -> None:
    """The server would close the connection; also when only body and headers together are too large."""
    url = server.url
    server.stop()
    text = await anyio.Path(server.service.configuration).read_text()
    text = text.replace("127.0.0.1:-1", url.rpartition("@")[2]) + "max_payload: 3000\n"
    await anyio.Path(server.service.configuration).write_text(text)
    server.service.prepare = lambda: None  # the next start takes the file as it is
    await anyio.to_thread.run_sync(server.start)
    async with Bus(url) as bus, relaying(pool, bus):
        await append_files(pool, 2)
        for length in (2000, 2050, 2100, 2150, 2200, 2250, 2300, 2350, 2400, 2450, 2500, 9000):
            await append_file(pool, filename="x" * length)
        last = await append_files(pool, 2)
        await reaches(bus, last)
        await assert_copy(pool, bus)
        subjects = [stored.subject for n in range(1, last + 1) if (stored := await bus.stored(STREAM, n))]
        assert 0 < subjects.count("rose.v2.default.event.oversize") < 12
        assert bus.generation == 1


async def test_an_id_that_makes_no_subject_goes_out_without_data(pool: Pool, bus: Bus) -> None:
    await append_file(pool, file_id="file_with.dot and space")
    last = await append_file(pool)
    async with relaying(pool, bus):
        await reaches(bus, last)
    stored = await bus.stored(STREAM, 1)
    assert stored is not None
    assert stored.subject == "rose.v2.default.event.oversize"
    assert msgspec.json.decode(stored.body)["subject"] == "file/file_with.dot and space"


# --- rebuilding and consuming


async def test_a_rebuilt_stream_can_begin_later(pool: Pool, bus: Bus) -> None:
    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, 20))
        await rebuild_stream(pool, bus, SETTINGS, first_position=11)
        await reaches(bus, 20)
    facts = await bus.stream(STREAM)
    assert facts is not None
    assert (facts.first_sequence, facts.messages) == (11, 10)
    stored = await bus.stored(STREAM, 11)
    assert stored is not None
    assert stored.headers["Nats-Msg-Id"] == str(
        await pool.fetchval("select event_id from rose.events where position = 11")
    )


async def test_a_durable_consumer_sees_every_event_in_order_through_kills(
    pool: Pool, bus: Bus, server: NatsServer
) -> None:
    """The consumer dedups by event id, as docs/subjects.md says; each event then counts once, in order."""
    total = 200
    seen: dict[str, int] = {}
    order: list[int] = []

    async def consume(until: int) -> None:
        """Take messages until that position; leave the last one unacknowledged, as a crash does."""
        async with bus.consumer(STREAM, "reader", ack_seconds=1.0) as consumer:
            while not order or order[-1] < until:
                try:
                    message = await consumer.next(timeout_seconds=2.0)
                except BusUnavailable:
                    await bus.wait_connected(5)
                    continue
                if message is None:
                    continue
                identity = message.headers["ce-id"]
                if identity not in seen:
                    seen[identity] = message.sequence
                    order.append(message.sequence)
                if message.sequence == until and until != total:
                    return
                try:
                    await message.ack()
                except BusUnavailable:
                    continue  # comes again, and is known

    async with relaying(pool, bus):
        await reaches(bus, await append_files(pool, total))
        await consume(40)
        await consume(80)
        await anyio.to_thread.run_sync(server.kill)
        await anyio.to_thread.run_sync(server.start)
        with anyio.fail_after(60):
            await consume(total)
    assert order == list(range(1, total + 1))


async def test_settings_name_the_stream() -> None:
    settings = msgspec.structs.replace(SETTINGS, nats_replicas=3, nats_max_bytes=5, nats_max_age_seconds=6.0)
    assert stream_settings(settings) == StreamSettings(
        name="ROSE_EVENTS", subjects=("rose.v2.>",), replicas=3, max_bytes=5, max_age_seconds=6.0
    )


async def test_a_stream_with_the_subjects_of_an_older_version_is_made_anew_and_filled(
    pool: Pool, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    await append_files(pool, 3)
    old = StreamSettings(name=STREAM, subjects=("rose.v1.>",), replicas=1, max_bytes=1 << 30, max_age_seconds=3600.0)
    await bus.create_stream(old, first_sequence=1, metadata={})
    async with relaying(pool, bus):
        await reaches(bus, 3)
    await assert_copy(pool, bus)
    stored = await bus.stored(STREAM, 3)
    assert stored is not None
    assert stored.subject.startswith("rose.v2.default.file.")
    assert "had the subjects rose.v1.> of an older ROSE; it is made anew" in caplog.text
