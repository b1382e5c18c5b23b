"""The connection to NATS: never in the way when it is absent, whole again when it comes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

import anyio
import nats
import pytest

from rose.bus import Bus, BusRefused, BusUnavailable, StreamSettings
from rose.errors import RoseError
from rose.subjects import JOB_QUEUED, Message
from tests.eventually import eventually
from tests.services import NatsServer

pytestmark = pytest.mark.anyio

STREAM = StreamSettings(name="TRY", subjects=("try.>",), max_bytes=1 << 20, max_age_seconds=60.0)


def message(number: int, *, last: int | None = None, subject: str = "try.x") -> Message:
    headers = {"Nats-Msg-Id": f"m{number}"}
    if last is not None:
        headers["Nats-Expected-Last-Sequence"] = str(last)
    return Message(subject=subject, body=str(number).encode(), headers=headers)


async def publish_core(server: NatsServer, subject: str) -> None:
    """Publish as anybody does who is not ROSE."""
    client = await nats.connect(server.url)
    await client.publish(subject, b"{}")
    await client.flush()
    await client.close()


async def test_without_a_server_everything_fails_at_once_and_the_end_is_quick(caplog: pytest.LogCaptureFixture) -> None:
    with anyio.fail_after(10):
        async with Bus("nats://127.0.0.1:1", token="t") as bus:
            assert bus.connected is False
            assert await bus.wait_connected(0.2) is False
            for call in (bus.stream("TRY"), bus.publish(message(1)), bus.stored("TRY", 1), bus.delete_stream("TRY")):
                with pytest.raises(BusUnavailable):
                    await call
            async with bus.consumer("TRY", "reader") as consumer:
                with pytest.raises(BusUnavailable):
                    await consumer.next()
            wake = bus.wake_on(JOB_QUEUED)
            assert await wake.wait(0.05) is False
    assert sum("127.0.0.1" in record.message for record in caplog.records if record.levelname == "WARNING") == 1


async def test_what_is_raised_inside_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with Bus("nats://127.0.0.1:1"):
            raise KeyError
    with anyio.move_on_after(0.1) as scope:
        async with Bus("nats://127.0.0.1:1"):
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_bus_without_an_address_stays_unconnected() -> None:
    async with Bus(None) as bus:
        assert await bus.wait_connected(0.05) is False


async def test_a_subscription_made_before_the_server_is_there_works_later(
    nats_server: Callable[[], NatsServer],
) -> None:
    server = nats_server()
    url = server.url
    server.stop()
    async with Bus(url) as bus:
        wake = bus.wake_on(JOB_QUEUED)
        for _ in range(2):  # and again after the server was killed
            await anyio.to_thread.run_sync(server.start)
            assert await bus.wait_connected(30)
            generation = bus.generation
            await publish_core(server, "rose.v2.default.job.ftjob_x.created")
            await publish_core(server, "rose.v2.default.job.ftjob_x.queued")
            assert await wake.wait(30) is True
            assert await wake.wait(0.05) is False
            await anyio.to_thread.run_sync(server.kill)
            await eventually(lambda: not bus.connected)
            assert bus.generation == generation
        assert bus.generation == 2


async def test_a_wake_up_between_two_waits_is_kept(nats_server: Callable[[], NatsServer]) -> None:
    server = nats_server()
    got: list[str] = []
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
        wake = bus.wake_on("wake.*")
        bus.subscribe("wake.*", lambda subject, _body: got.append(subject))
        await eventually(lambda: poked(server, got))
        assert await wake.wait(0) is True
        assert await wake.wait(0) is False


async def poked(server: NatsServer, got: list[str]) -> bool:
    await publish_core(server, "wake.up")
    return got != []


async def test_a_wrong_token_does_not_connect_and_does_not_block(nats_server: Callable[[], NatsServer]) -> None:
    server = nats_server()
    async with Bus(server.url.replace("rose:", "rose:wrong")) as bus:
        assert await bus.wait_connected(1.0) is False


async def test_publishing_in_order_and_what_is_refused(nats_server: Callable[[], NatsServer]) -> None:
    server = nats_server()
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
        assert await bus.stream("TRY") is None
        assert await bus.delete_stream("TRY") is False
        with pytest.raises(BusUnavailable, match="No JetStream stream"):
            await bus.publish(message(1))
        await bus.create_stream(STREAM, first_sequence=100, metadata={"a": "b"})
        facts = await bus.stream("TRY")
        assert facts is not None
        assert (facts.first_sequence, facts.last_sequence, facts.messages) == (100, 99, 0)
        assert facts.settings == STREAM
        assert facts.metadata["a"] == "b"

        batch = [message(number, last=number - 1) for number in range(100, 400)]
        assert await bus.publish_batch(batch, generation=bus.generation) == list(range(100, 400))
        with pytest.raises(BusRefused) as caught:
            await bus.publish(message(900, last=7))
        assert (caught.value.error_code, caught.value.content) == (10071, False)
        for refused in (
            Message(subject="try.x", body=b"x" * (1 << 20), headers={"Nats-Msg-Id": "large"}),
            Message(subject="try.with space", body=b"x", headers={}),
            Message(subject="try.x", body=b"x", headers={"bad name": "x"}),
        ):
            with pytest.raises(BusRefused) as caught:
                await bus.publish(refused)
            assert caught.value.content is True
        stored = await bus.stored("TRY", 101)
        assert stored is not None
        assert (stored.subject, stored.body, stored.headers["Nats-Msg-Id"]) == ("try.x", b"101", "m101")
        assert await bus.stored("TRY", 999) is None
        assert bus.generation == 1
        assert await bus.delete_stream("TRY") is True


async def test_nothing_is_sent_on_another_connection_than_the_one_that_was_meant(
    nats_server: Callable[[], NatsServer],
) -> None:
    server = nats_server()
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
        await bus.create_stream(STREAM, first_sequence=1, metadata={})
        before = bus.generation
        await anyio.to_thread.run_sync(server.kill)
        await anyio.to_thread.run_sync(server.start)
        await eventually(lambda: bus.connected and bus.generation > before)
        with pytest.raises(BusUnavailable, match="new one"):
            await bus.publish_batch([message(1)], generation=before)
        facts = await bus.stream("TRY")
        assert facts is not None
        assert facts.messages == 0


async def test_a_batch_ends_soon_after_the_server_stops_answering(nats_server: Callable[[], NatsServer]) -> None:
    server = nats_server()
    results: list[int | RoseError] = []
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
        await bus.create_stream(STREAM, first_sequence=1, metadata={})
        server.suspend()

        async def publish() -> None:
            results.extend(await bus.publish_batch([message(n) for n in range(1, 50)], generation=1))

        with anyio.fail_after(5):  # far less than the time that JetStream's answers are waited for
            async with anyio.create_task_group() as group:
                group.start_soon(publish)
                await anyio.to_thread.run_sync(server.kill)
    assert [type(result) for result in results] == [BusUnavailable] * 49


async def test_a_consumer_goes_on_where_it_was_and_repeats_what_was_not_acknowledged(
    nats_server: Callable[[], NatsServer],
) -> None:
    server = nats_server()
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
        await bus.create_stream(STREAM, first_sequence=1, metadata={})
        await bus.publish_batch([message(n, subject=f"try.{n % 2}") for n in range(1, 7)], generation=1)
        async with bus.consumer("TRY", "reader", ack_seconds=0.5) as consumer:
            first = await consumer.next()
            assert first is not None
            assert (first.sequence, first.subject, first.deliveries) == (1, "try.1", 1)
            assert await consumer.next(timeout_seconds=0.1) is None  # one at a time, so the order holds
            again = await consumer.next(timeout_seconds=5)
            assert again is not None
            assert (again.sequence, again.deliveries) == (1, 2)
            await again.ack()
        async with bus.consumer("TRY", "reader") as consumer:
            second = await consumer.next()
            assert second is not None
            assert (second.sequence, second.body) == (2, b"2")
        async with bus.consumer("TRY", "even", filter_subject="try.0") as consumer:
            sequences: list[int] = []
            while (received := await consumer.next(timeout_seconds=0.3)) is not None:
                sequences.append(received.sequence)
                await received.ack()
            assert sequences == [2, 4, 6]


async def test_in_compose_the_reader_follows_and_cannot_publish(
    nats_server: Callable[[], NatsServer], caplog: pytest.LogCaptureFixture
) -> None:
    """The users of compose.yaml, on a real server."""
    server = nats_server()
    address = server.url.rpartition("@")[2]
    server.stop()
    compose = await anyio.Path(__file__).parents[2].joinpath("compose.yaml").read_text()
    users = textwrap.dedent(compose[compose.index("      authorization {") : compose.index("\nvolumes:")])
    for name, value in (("$$NATS_RELAY_PASSWORD", "r1"), ("$$NATS_READER_PASSWORD", "r2"), ("$$", "$")):
        users = users.replace(name, value)
    configuration = anyio.Path(server.service.configuration)
    text = (await configuration.read_text()).replace("127.0.0.1:-1", address)
    await configuration.write_text(re.sub(r"^accounts \{.*?^\}$", "", text, flags=re.MULTILINE | re.DOTALL) + users)
    server.service.prepare = lambda: None  # the next start takes the file as it is
    await anyio.to_thread.run_sync(server.start)
    async with Bus(f"nats://relay:r1@{address}") as relay, Bus(f"nats://reader:r2@{address}") as reader:
        assert await relay.wait_connected(30)
        assert await reader.wait_connected(30)
        stream = StreamSettings(name="ROSE_EVENTS", subjects=("rose.v2.>",))
        await relay.create_stream(stream, first_sequence=1, metadata={})
        await relay.publish(message(1, subject="rose.v2.default.job.x.queued"))
        async with reader.consumer("ROSE_EVENTS", "finished-jobs") as consumer:
            received = await consumer.next()
            assert received is not None
            await received.ack()
        wake = reader.wake_on(JOB_QUEUED)
        sent: list[int | RoseError] = []

        async def publish() -> None:
            sent.extend(await reader.publish_batch([message(2, subject="rose.v2.default.job.x.queued")], generation=1))

        async with anyio.create_task_group() as group:
            group.start_soon(publish)
            await eventually(lambda: "permissions violation for publish" in caplog.text.lower())
            group.cancel_scope.cancel()
        assert await wake.wait(0) is False
        facts = await relay.stream("ROSE_EVENTS")
        assert facts is not None
        assert facts.messages == 1
