"""Lets the holders of NATS keys read their project's events, and nothing else.

A key of the kind nats is a user of the NATS server, named after the key, in an account of its own, and a durable pull
consumer of the same name over its project's subjects, which ROSE makes: the reader may ask for its next messages and
acknowledge them. Who the users are is in Postgres; the server's file of users and the consumers are made of that, again
and again, so that what is missed once is mended a moment later.

Permissions alone would not confine a reader: JetStream answers to whatever reply subject a request names, so one that
shared ROSE's account could let it publish on any subject, also into the stream (docs/adr/0012-nats-keys.md).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import anyio

from projections import keys as keys_view
from projections.keys import NatsReader
from rose.bus import Bus
from rose.errors import RoseError
from rose.log.pool import Pool
from rose.subjects import ALL_EVENTS, STREAM, project_events

KEY_CHANGES = ("rose.v2.*.key.*.created", "rose.v2.*.key.*.revoked", "rose.v2.*.project.*.archived")
ACCOUNT = "ROSE"
"""The NATS account of ROSE's own users and of the stream."""
API_PREFIX = "ROSE.API"
"""What a reader asks its consumer under: `$JS.API` in its own account answers that there is no JetStream."""
EXPORTS = f"""\
    exports: [
      {{ service: "$JS.API.CONSUMER.INFO.{STREAM}.*" }}
      {{ service: "$JS.API.CONSUMER.MSG.NEXT.{STREAM}.*", response_type: stream }}
      {{ service: "$JS.ACK.{STREAM}.>" }}
      {{ stream: "{ALL_EVENTS}" }}
    ]
"""
"""What ROSE's account lets the readers' accounts import."""
EVERY_SECONDS = 5.0
"""How soon a key that expired, or whose change nobody told, is dealt with."""

Write = Callable[[Sequence[NatsReader]], Awaitable[object]]
"""Tells the NATS server who may read."""

logger = logging.getLogger(__name__)


def inbox_prefix(key_id: str) -> str:
    """Return how the subjects begin on which a reader gets its answers."""
    return f"_INBOX_{key_id}"


def accounts(readers: Sequence[NatsReader]) -> list[str]:
    """Return the readers as accounts of a nats-server's configuration, an entry each, for its map `accounts`.

    What each may do was tried against nats-server 2.15: a consumer of another name, direct reads of the stream, the
    subjects of other projects and every publication, also by way of a reply subject, are refused or stay in the
    reader's account (tests/integration/test_nats_readers.py).
    """
    return [_account(one) for one in readers]


def _account(reader: NatsReader) -> str:
    key, subjects = reader.key_id, project_events(reader.project)
    asked = {f"CONSUMER.{what}.{STREAM}.{key}" for what in ("INFO", "MSG.NEXT")}
    acknowledged = f"$JS.ACK.{STREAM}.{key}.>"
    publish = [*(f"{API_PREFIX}.{one}" for one in sorted(asked)), acknowledged]
    imports = [
        *(f'{{service: {_from(f"$JS.API.{one}")}, to: "{API_PREFIX}.{one}"}}' for one in sorted(asked)),
        f"{{service: {_from(acknowledged)}}}",
        f"{{stream: {_from(subjects)}}}",
    ]
    return (
        f"{key}: {{\n"
        f"  users: [{{user: {json.dumps(key)}, password: {json.dumps(reader.bcrypt)}, permissions: {{"
        f"publish: {{allow: {json.dumps(publish)}}}, "
        f"subscribe: {{allow: {json.dumps([subjects, f'{inbox_prefix(key)}.>'])}}}}}}}]\n"
        f"  imports: [{', '.join(imports)}]\n"
        "}"
    )


def _from(subject: str) -> str:
    return f'{{account: {ACCOUNT}, subject: "{subject}"}}'


async def run(pool: Pool, bus: Bus, stop: anyio.Event, write: Write | None) -> None:
    """Keep users and consumers as the keys are until `stop` is set.

    Without `write` the users are told to the server by whoever runs it (`rose keys nats-users`); the consumers are
    made all the same.
    """
    wake = bus.wake_on(*KEY_CHANGES)
    told: object = None
    while not stop.is_set():
        try:
            readers = await keys_view.nats_readers(pool, int(time.time()))
            if write is not None:
                await write(readers)
            if bus.connected:
                await keep_consumers(bus, readers)
            told = None
        except (RoseError, OSError) as error:
            if told != str(error):
                logger.warning("The readers of NATS are not up to date: %s", error)
            told = str(error)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when, stop, tasks.cancel_scope)
            await wake.wait(EVERY_SECONDS)
            tasks.cancel_scope.cancel()


async def keep_consumers(bus: Bus, readers: Sequence[NatsReader]) -> None:
    """Make the consumers of the readers, and remove those of keys that open nothing any more.

    Raises: BusUnavailable, BusRefused.
    """
    there = await bus.consumers(STREAM)
    if there is None:
        return  # the relay has not made the stream yet
    wanted = {one.key_id: one.project for one in readers}
    for key_id, project in wanted.items():
        if key_id not in there:
            await bus.create_consumer(STREAM, key_id, filter_subject=project_events(project))
            logger.info("The key %s reads the events of %s on NATS.", key_id, project)
    for name in there:
        if name.startswith("key_") and name not in wanted:
            await bus.delete_consumer(STREAM, name)
            logger.info("The key %s reads nothing on NATS any more.", name)


async def _cancel_when(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
