"""Relayed events per second beside bare pipelined JetStream publish of the same bodies to the same server.

The server syncs every message to disk (`sync_interval: always`) for both. The relay also reads the log, makes the
CloudEvents, and says at which sequence each belongs.
"""

from __future__ import annotations

import statistics
import time

import anyio
import nats

from benchmarks.record import record
from rose import relay
from rose.bus import Bus
from rose.log.migrate import migrate
from rose.log.pool import Pool, open_pool
from rose.settings import Settings
from rose.subjects import STREAM
from tests.services import NatsServer, running_nats, running_postgres

EVENTS = 20_000
ROUNDS = 3
SECONDS = 6.0
"""Longest time of one measurement; a slow disk then publishes fewer."""
POLL_SECONDS = 0.005
CONNECT_SECONDS = 10.0
FILL = """
with head as (update rose.log_head set position = position + $1::bigint returning position - $1::bigint as position)
insert into rose.events (position, stream_id, version, type, schema, data, metadata)
select head.position + number, 'job/ftjob_benchmark', head.position + number, 'job.queued', 1,
       jsonb_build_object('reason', repeat('x', 300)), '{}'
from head, generate_series(1, $1::bigint) as number
"""


async def relay_rate(pool: Pool, bus: Bus) -> tuple[int, float]:
    """Relay into a fresh stream; return how many events, and events per second."""
    await bus.delete_stream(STREAM)
    stop = anyio.Event()
    published = 0
    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        group.start_soon(relay.run, pool, bus, Settings(), stop)
        while published < EVENTS and time.perf_counter() < begin + SECONDS:
            await anyio.sleep(POLL_SECONDS)
            facts = await bus.stream(STREAM)
            published = facts.last_sequence if facts else 0
        took = time.perf_counter() - begin
        stop.set()
    return published, published / took


async def bare_rate(server: NatsServer, body: bytes) -> tuple[int, float]:
    """Publish a body again and again, as many at a time as the relay does, with nothing around it; return the same."""
    client = await nats.connect(server.url)
    try:
        stream = client.jetstream(timeout=relay.AUDIT_SECONDS)
        await stream.add_stream(name="BARE", subjects=["bare.>"], storage="file", max_bytes=1 << 30)

        async def publish() -> None:
            await stream.publish("bare.job.ftjob_benchmark.queued", body)

        published = 0
        begin = time.perf_counter()
        while published < EVENTS and time.perf_counter() < begin + SECONDS:
            async with anyio.create_task_group() as group:
                for _ in range(relay.BATCH):
                    group.start_soon(publish)
            published += relay.BATCH
        took = time.perf_counter() - begin
        await stream.delete_stream("BARE")
        return published, published / took
    finally:
        await client.close()


async def measure(dsn: str, server: NatsServer) -> list[list[str]]:
    """Return the table's rows: relay and bare in turns, so that a busy neighbour hits both."""
    await migrate(dsn)
    pool = await open_pool(dsn)
    rows: list[list[str]] = []
    rates: list[tuple[float, float]] = []
    try:
        await pool.execute(FILL, EVENTS)
        async with Bus(server.url) as bus:
            if not await bus.wait_connected(CONNECT_SECONDS):
                raise TimeoutError("the nats-server does not answer")
            for number in range(1, ROUNDS + 1):
                events, own = await relay_rate(pool, bus)
                stored = await bus.stored(STREAM, events)
                assert stored is not None
                bare_events, bare = await bare_rate(server, stored.body)
                counts = [str(value) for value in (number, len(stored.body), events, bare_events)]
                rows.append([*counts, f"{own:.0f}", f"{bare:.0f}", f"{own / bare:.2f}"])
                rates.append((own, bare))
            own, bare = (statistics.median(values) for values in zip(*rates, strict=True))
            rows.append(["median", "", "", "", f"{own:.0f}", f"{bare:.0f}", f"{own / bare:.2f}"])
    finally:
        await pool.close()
    return rows


def main() -> None:
    """Run on a Postgres and a nats-server of its own."""
    with running_postgres() as postgres, running_nats() as server:
        rows = anyio.run(measure, postgres.dsn("postgres"), server)
    columns = ("round", "body bytes", "relayed", "bare", "relayed/s", "bare/s", "ratio")
    print("written to", record("relay", __doc__.splitlines()[0], columns, rows))


if __name__ == "__main__":
    main()
