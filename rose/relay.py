"""Copies the log to the JetStream stream ROSE_EVENTS, whose sequence numbers are the log's positions.

The stream's own last sequence is the cursor, so nothing is stored here. One relay works at a time, more than one does
no harm. It publishes only after an audit has shown that the stream is a copy of this log; when it is not, it halts.
"""

from __future__ import annotations

import logging

import anyio

from projections.positions import note
from rose.bus import NAME_IN_USE, WRONG_LAST_SEQUENCE, Bus, BusRefused, BusUnavailable, StreamFacts, StreamSettings
from rose.errors import RoseError, Unavailable
from rose.log.feed import Feed, LogIdentity, RawEvent, open_feed
from rose.log.pool import Pool
from rose.settings import Settings
from rose.subjects import ALL_EVENTS, OLDER_SUBJECTS, STREAM, Message, message

log = logging.getLogger(__name__)

NAME = "relay"
"""Row of rose.projections in which the relay tells how it is."""
LOCK = 1
"""Advisory lock of the one relay that works."""
BATCH = 256
"""Events published without waiting in between."""
POLL_SECONDS = 0.25
"""Longest time that an event waits when its notification is lost."""
STANDBY_SECONDS = 1.0
"""How often a standing-by relay asks for the lock."""
RETRY_SECONDS = 0.5
AUDIT_SECONDS = 60.0
HALTED_SECONDS = 2.0
"""Time between audits while halted."""
NOTE_SECONDS = 1.0
"""The position is stored for people, at most this often."""


class RelayHalted(RoseError):
    """The stream in NATS is not a copy of this log; nothing is published."""

    default_code = "relay_halted"

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            hint="Was Postgres or NATS restored from a backup? When Postgres is right: rose events rebuild-stream",
        )


def stream_settings(settings: Settings) -> StreamSettings:
    """Return how ROSE_EVENTS is kept."""
    return StreamSettings(
        name=STREAM,
        subjects=(ALL_EVENTS,),
        replicas=settings.nats_replicas,
        max_bytes=settings.nats_max_bytes,
        max_age_seconds=settings.nats_max_age_seconds,
    )


async def run(pool: Pool, bus: Bus, settings: Settings, stop: anyio.Event) -> None:
    """Relay until `stop` is set. Lasts through the absence of Postgres and NATS; `bus` is entered by the caller.

    How it is doing is in rose.projections under the name `relay`.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(Relay(pool, bus, stream_settings(settings)).relay)
        await stop.wait()
        group.cancel_scope.cancel()


async def rebuild_stream(pool: Pool, bus: Bus, settings: Settings, *, first_position: int = 1) -> None:
    """Delete the stream and create it anew for this log, to begin with `first_position`; the relay fills it again.

    Durable consumers of the stream go with it. Raises: Unavailable, BusRefused.
    """
    stream = stream_settings(settings)
    async with open_feed(pool) as feed:
        metadata = _metadata(await feed.identity())
    while True:
        await bus.delete_stream(stream.name)
        try:
            await bus.create_stream(stream, first_sequence=first_position, metadata=metadata)
        except BusRefused as error:
            if error.error_code != NAME_IN_USE:
                raise
            continue  # a running relay created it in between
        return


class Relay:
    """One relay. `lock` is another one only in tests that let two relays race."""

    def __init__(self, pool: Pool, bus: Bus, stream: StreamSettings, *, lock: int = LOCK) -> None:
        self._pool = pool
        self._bus = bus
        self._stream = stream
        self._lock = lock
        self._log_id = ""
        self._kept: StreamSettings | None = None  # settings that could not be changed
        self._bare: set[int] = set()  # positions whose data NATS refused
        self._told: tuple[str, str | None] | None = None
        self._told_position = -1
        self._told_at = float("-inf")

    async def relay(self) -> None:
        """Relay for ever. Never raises for what services do."""
        while True:
            try:
                async with open_feed(self._pool) as feed:
                    await self._stand_by(feed)
                    await self._work(feed)
            except Unavailable as error:
                log.warning("The relay waits for Postgres: %s", error.message)
                await anyio.sleep(RETRY_SECONDS)

    async def audit(self, feed: Feed) -> None:
        """Create the stream when there is none, and compare it with the log.

        Raises: RelayHalted when it belongs to another log or another past of this one; Unavailable, BusRefused.
        """
        identity = await feed.identity()
        self._log_id = identity.log_id
        facts = await self._ensure_stream(_metadata(identity))
        for key, value in _metadata(identity).items():
            if facts.metadata.get(key) != value:
                raise RelayHalted(
                    f"The NATS stream {self._stream.name} was made for another database: its {key} is "
                    f"{facts.metadata.get(key, 'missing')}, this one's is {value}."
                )
        head = await feed.head()  # read after the stream: another relay may publish what was appended meanwhile
        if facts.last_sequence > head:
            raise RelayHalted(
                f"NATS is ahead of Postgres: the stream {self._stream.name} ends at {facts.last_sequence}, "
                f"the log at {head}. Postgres lost events that others may have seen."
            )
        stored = await self._bus.stored(self._stream.name, facts.last_sequence) if facts.messages else None
        expected = await feed.event_id_at(facts.last_sequence)
        if stored is not None and stored.headers.get("Nats-Msg-Id") != expected:
            raise RelayHalted(
                f"The NATS stream {self._stream.name} holds the event {stored.headers.get('Nats-Msg-Id')} at "
                f"{facts.last_sequence}, the log {expected}: they have different pasts."
            )

    async def _stand_by(self, feed: Feed) -> None:
        """Return once this is the relay that works. Raises: Unavailable."""
        while True:
            if await feed.lock(self._lock):
                return
            await anyio.sleep(STANDBY_SECONDS)

    async def _work(self, feed: Feed) -> None:
        """Relay while this feed lives. Raises: Unavailable when it does not any more."""
        audited: int | None = None
        audit_due = 0.0
        while True:
            if not self._bus.connected:
                await self._tell("waiting", "NATS is not connected; the log waits for it.")
                await self._bus.wait_connected(STANDBY_SECONDS)
                await feed.wait(0)
                continue
            generation = self._bus.generation
            try:
                if audited != generation or anyio.current_time() >= audit_due:
                    audited = None
                    await self.audit(feed)
                    audited, audit_due = generation, anyio.current_time() + AUDIT_SECONDS
                position, more = await self._publish_next(feed, generation)
            except RelayHalted as halt:
                await self._tell("stopped", str(halt))
                await anyio.sleep(HALTED_SECONDS)
            except (BusUnavailable, BusRefused) as error:
                audited = None
                await self._tell("waiting", error.message)
                await anyio.sleep(RETRY_SECONDS)
            else:
                await self._tell("running", None, position)
                if not more:
                    await feed.wait(POLL_SECONDS)

    async def _publish_next(self, feed: Feed, generation: int) -> tuple[int, bool]:
        """Publish the next events; return the stream's last sequence and whether to go on without waiting."""
        facts = await self._bus.stream(self._stream.name)
        if facts is None:
            raise BusUnavailable(f"The stream {self._stream.name} is gone.")
        last = facts.last_sequence
        events = await feed.events_after(last, BATCH)
        self._bare = {position for position in self._bare if position > last}
        messages = [self._message(event) for event in events]
        results = await self._bus.publish_batch(messages, generation=generation) if messages else []
        for event, result in zip(events, results, strict=True):
            if isinstance(result, int):
                if result != event.position:
                    raise BusUnavailable(f"JetStream gave the event {event.position} the sequence {result}.")
                last = result
            elif isinstance(result, BusRefused) and result.content:
                log.warning("The event %d goes out without data: %s", event.position, result.message)
                self._bare.add(event.position)
                return last, True
            elif isinstance(result, BusRefused) and result.error_code == WRONG_LAST_SEQUENCE:
                return last, True  # another relay was faster
            else:
                raise result
        return last, bool(events)

    async def _ensure_stream(self, metadata: dict[str, str]) -> StreamFacts:
        facts = await self._bus.stream(self._stream.name)
        if facts is None:
            await self._bus.create_stream(self._stream, first_sequence=1, metadata=metadata)
            log.info("Created the NATS stream %s.", self._stream.name)
        elif facts.settings == self._stream or facts.settings == self._kept:
            return facts
        elif facts.settings.subjects in OLDER_SUBJECTS:
            await self._bus.delete_stream(self._stream.name)
            await self._bus.create_stream(self._stream, first_sequence=1, metadata=metadata)
            log.warning(
                "The NATS stream %s had the subjects %s of an older ROSE; it is made anew and filled from the log.",
                self._stream.name,
                ", ".join(facts.settings.subjects),
            )
        else:
            await self._change_stream(facts)
        facts = await self._bus.stream(self._stream.name)
        if facts is None:
            raise BusUnavailable(f"The stream {self._stream.name} is gone.")
        return facts

    async def _change_stream(self, facts: StreamFacts) -> None:
        """Bring the stream to the settings; when the server refuses them, the old ones stay."""
        try:
            await self._bus.update_stream(self._stream, metadata=facts.metadata)
        except BusRefused as error:
            self._kept = facts.settings
            log.error("The NATS stream %s keeps its old settings %s: %s", facts.settings.name, facts.settings, error)
        else:
            log.info("Changed the NATS stream %s from %s to %s.", facts.settings.name, facts.settings, self._stream)

    def _message(self, event: RawEvent) -> Message:
        return message(
            log_id=self._log_id,
            position=event.position,
            event_id=event.event_id,
            wire_name=event.type,
            schema=event.schema,
            project=event.project,
            stream_id=event.stream_id,
            version=event.version,
            recorded_at=event.recorded_at,
            data=event.data,
            without_data=event.position in self._bare,
        )

    async def _tell(self, state: str, reason: str | None, position: int | None = None) -> None:
        """Store and log how the relay is; nothing when nothing is new."""
        changed = self._told != (state, reason)
        moved = position is not None and position != self._told_position
        now = anyio.current_time()
        if not changed and not (moved and now >= self._told_at + NOTE_SECONDS):
            return
        if changed:
            level = {"stopped": logging.ERROR, "waiting": logging.WARNING}.get(state, logging.INFO)
            log.log(level, "The relay is %s%s", state, f": {reason}" if reason else ".")
        await note(self._pool, NAME, position=position, status=state, error=reason)
        self._told, self._told_at = (state, reason), now
        self._told_position = position if position is not None else self._told_position


def _metadata(identity: LogIdentity) -> dict[str, str]:
    return {
        "rose_log_id": identity.log_id,
        "rose_system_identifier": identity.system_identifier,
        "rose_timeline": identity.timeline,
    }
