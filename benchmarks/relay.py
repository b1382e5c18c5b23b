"""Relayed events per second beside bare pipelined JetStream publish of the same bodies to the same server.

The server syncs every message to disk (`sync_interval: always`) for both. The relay also reads the log, makes the
CloudEvents, and says at which sequence each belongs.
"""

from __future__ import annotations

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

EVENTS = 5_000
ROUNDS = 3
POLL_SECONDS = 0.005
DEADLINE_SECONDS = 50.0
FILL = """
with head as (update rose.log_head set position = position + $1::bigint returning position - $1::bigint as position)
insert into rose.events (position, stream_id, version, type, schema, data, metadata)
select head.position + number, 'job/ftjob_benchmark', head.position + number, 'job.queued', 1,
       jsonb_build_object('reason', repeat('x', 300)), '{}'
from head, generate_series(1, $1::bigint) as number
"""


async def relay_rate(pool: Pool, bus: Bus) -> float:
    """Relay all events into a fresh stream; return events per second."""
    await bus.delete_stream(STREAM)
    stop = anyio.Event()
    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        group.start_soon(relay.run, pool, bus, Settings(), stop)
        while True:
            facts = await bus.stream(STREAM)
            if facts is not None and facts.last_sequence == EVENTS:
                break
            await anyio.sleep(POLL_SECONDS)
        took = time.perf_counter() - begin
        stop.set()
    return EVENTS / took


async def bare_rate(server: NatsServer, bodies: list[bytes]) -> float:
    """Publish the bodies, as many at a time as the relay does, with nothing around it; return events per second."""
    client = await nats.connect(server.url, token=server.token)
    try:
        stream = client.jetstream(timeout=relay.AUDIT_SECONDS)
        await stream.add_stream(name="BARE", subjects=["bare.>"], storage="file", max_bytes=1 << 30)

        async def publish(body: bytes) -> None:
            await stream.publish("bare.job.ftjob_benchmark.queued", body)

        begin = time.perf_counter()
        for first in range(0, len(bodies), relay.BATCH):
            async with anyio.create_task_group() as group:
                for body in bodies[first : first + relay.BATCH]:
                    group.start_soon(publish, body)
        took = time.perf_counter() - begin
        await stream.delete_stream("BARE")
        return len(bodies) / took
    finally:
        await client.close()


async def measure(dsn: str, server: NatsServer) -> list[list[str]]:
    """Return the table's rows: relay and bare in turns, so that a busy neighbour hits both."""
    await migrate(dsn)
    pool = await open_pool(dsn)
    rows: list[list[str]] = []
    try:
        await pool.execute(FILL, EVENTS)
        with anyio.fail_after(DEADLINE_SECONDS):
            async with Bus(server.url, token=server.token) as bus:
                await bus.wait_connected(10)
                for number in range(1, ROUNDS + 1):
                    own = await relay_rate(pool, bus)
                    stored = await bus.stored(STREAM, EVENTS)
                    assert stored is not None
                    bare = await bare_rate(server, [stored.body] * EVENTS)
                    size = str(len(stored.body))
                    rows.append([str(number), str(EVENTS), size, f"{own:.0f}", f"{bare:.0f}", f"{own / bare:.2f}"])
    finally:
        await pool.close()
    return rows


def main() -> None:
    """Run on a Postgres and a nats-server of its own."""
    with running_postgres() as postgres, running_nats() as server:
        rows = anyio.run(measure, postgres.dsn("postgres"), server)
    columns = ("round", "events", "body bytes", "relay events/s", "bare events/s", "ratio")
    print("written to", record("relay", __doc__.splitlines()[0], columns, rows))


if __name__ == "__main__":
    main()
