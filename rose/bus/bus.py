"""The bus: a connection to NATS when there is one, publishing, wake-ups, and the stream's administration."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, cast

import anyio
import anyio.abc
import nats.errors
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from rose.bus.answers import (
    NOT_FOUND,
    BusRefused,
    BusUnavailable,
    StoredMessage,
    StreamFacts,
    StreamSettings,
    text_of,
    translated,
)
from rose.bus.connection import RETRY_SECONDS, Callback, Connection, connected
from rose.bus.consumer import Consumer
from rose.errors import RoseError
from rose.subjects import Message

log = logging.getLogger(__name__)

HEADER_FRAME_BYTES = 12
"""The line `NATS/1.0` and an empty line."""


class Wake:
    """Waits for a message on some subjects. A wake-up between two waits is kept."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        """Wake whoever waits."""
        self._event.set()

    async def wait(self, timeout_seconds: float) -> bool:
        """Return True when woken, False after `timeout_seconds`."""
        with anyio.move_on_after(timeout_seconds):
            await self._event.wait()
        woken = self._event.is_set()
        if woken:
            self._event = anyio.Event()
        return woken


class Bus:
    """NATS, when it is there. Use as an async context manager; entering never waits for the server."""

    def __init__(self, url: str | None, *, token: str | None = None, name: str = "rose") -> None:
        self._url = url
        self._token = token
        self._name = name
        self._connection: Connection | None = None
        self._generation = 0
        self._changed = anyio.Event()
        self._subscriptions: list[tuple[str, Callback]] = []
        self._group: anyio.abc.TaskGroup | None = None

    @property
    def connected(self) -> bool:
        """Whether NATS answers now."""
        return self._connection is not None

    @property
    def generation(self) -> int:
        """Number of the present (or last) connection; 0 before the first."""
        return self._generation

    async def __aenter__(self) -> Bus:
        self._group = await anyio.create_task_group().__aenter__()
        if self._url is not None:
            self._group.start_soon(self._keep_connected, self._url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._group is not None
        self._group.cancel_scope.cancel()
        if isinstance(error, anyio.get_cancelled_exc_class()):
            return await self._group.__aexit__(kind, error, trace)
        await self._group.__aexit__(None, None, None)  # what the caller raised passes as it is, in no group
        return None

    async def wait_connected(self, timeout_seconds: float) -> bool:
        """Return whether there is a connection, at the latest after `timeout_seconds`."""
        with anyio.move_on_after(timeout_seconds):
            while self._connection is None:
                await self._changed.wait()
        return self.connected

    def subscribe(self, subject: str, callback: Callback) -> None:
        """Call `callback(subject, body)` for messages that arrive while connected: a hint, with losses and repeats.

        Registers at once, with or without a server, and again on every connection.
        """
        self._subscriptions.append((subject, callback))
        if self._connection is not None and self._group is not None:
            self._group.start_soon(self._connection.subscribe, subject, callback)

    def wake_on(self, *subjects: str) -> Wake:
        """Return a `Wake` that is set by every message on `subjects`."""
        wake = Wake()
        for subject in subjects:
            self.subscribe(subject, lambda _subject, _body: wake.set())
        return wake

    # --- publishing -------------------------------------------------------------------------------------------------

    async def publish(self, message: Message) -> int:
        """Publish to JetStream and return the sequence it got. Raises: BusUnavailable, BusRefused."""
        (result,) = await self.publish_batch((message,), generation=self._generation)
        if isinstance(result, RoseError):
            raise result
        return result

    async def publish_batch(self, messages: Sequence[Message], *, generation: int) -> list[int | RoseError]:
        """Publish in order without waiting in between; return each one's sequence, or its error.

        Nothing is sent unless the connection is still the one of `generation`. When it is lost on the way, the
        messages without an answer get BusUnavailable: they may or may not be stored.
        """
        connection = self._current()
        if connection.generation != generation:
            raise BusUnavailable("The connection to NATS is a new one.")
        unanswered = BusUnavailable("The connection to NATS was lost before the answer came.")
        results: list[int | RoseError] = [unanswered] * len(messages)

        async def send(index: int, message: Message) -> None:
            try:
                with translated():
                    _check_size(message, connection.client.max_payload)
                    ack = await connection.jetstream.publish(
                        message.subject, message.body, headers=cast("dict[str, Any]", message.headers)
                    )
                results[index] = ack.seq
            except RoseError as error:
                results[index] = error

        async with anyio.create_task_group() as watch:
            watch.start_soon(_cancel_when, connection.lost, watch.cancel_scope)
            async with anyio.create_task_group() as sending:
                for index, message in enumerate(messages):
                    sending.start_soon(send, index, message)
            watch.cancel_scope.cancel()
        return results

    # --- the stream -------------------------------------------------------------------------------------------------

    async def stream(self, name: str) -> StreamFacts | None:
        """Return the stream's state, None when there is none. Raises: BusUnavailable, BusRefused."""
        jetstream = self._current().jetstream
        try:
            with translated():
                info = await jetstream.stream_info(name)
        except BusRefused as error:
            if error.error_code in NOT_FOUND:
                return None
            raise
        config = info.config
        return StreamFacts(
            first_sequence=info.state.first_seq,
            last_sequence=info.state.last_seq,
            messages=info.state.messages,
            bytes=info.state.bytes,
            metadata=dict(config.metadata or {}),
            settings=StreamSettings(
                name=name,
                subjects=tuple(config.subjects or ()),
                replicas=config.num_replicas or 1,
                max_bytes=config.max_bytes or -1,
                max_age_seconds=config.max_age or 0.0,
            ),
        )

    async def create_stream(self, settings: StreamSettings, *, first_sequence: int, metadata: dict[str, str]) -> None:
        """Create a stream whose first message will have `first_sequence`. Raises: BusUnavailable, BusRefused."""
        with translated():
            await self._current().jetstream.add_stream(_stream_config(settings, metadata, first_sequence))

    async def update_stream(self, settings: StreamSettings, *, metadata: dict[str, str]) -> None:
        """Change limits and metadata of an existing stream. Raises: BusUnavailable, BusRefused."""
        with translated():
            await self._current().jetstream.update_stream(_stream_config(settings, metadata, None))

    async def delete_stream(self, name: str) -> bool:
        """Delete a stream with its messages; return whether it existed. Raises: BusUnavailable, BusRefused."""
        try:
            with translated():
                return await self._current().jetstream.delete_stream(name)
        except BusRefused as error:
            if error.error_code in NOT_FOUND:
                return False
            raise

    async def stored(self, stream: str, sequence: int) -> StoredMessage | None:
        """Return the message at `sequence`, None when there is none. Raises: BusUnavailable, BusRefused."""
        try:
            with translated():
                raw = await self._current().jetstream.get_msg(stream, sequence)
        except BusRefused as error:
            if error.error_code in NOT_FOUND:
                return None
            raise
        return StoredMessage(
            sequence=raw.seq or sequence,
            subject=raw.subject or "",
            body=raw.data or b"",
            headers=dict(cast("dict[str, str]", raw.headers or {})),
            stored_at=raw.time,
        )

    @contextlib.asynccontextmanager
    async def consumer(
        self, stream: str, durable: str, *, filter_subject: str | None = None, ack_seconds: float = 30.0
    ) -> AsyncGenerator[Consumer, None]:
        """Give a durable pull consumer that starts at the stream's beginning; it survives lost connections.

        The next message comes only after the last one was acknowledged, so the order holds, also after a crash; a
        message that is not acknowledged comes again after `ack_seconds`.
        """
        consumer = Consumer(self._current, stream, durable, filter_subject=filter_subject, ack_seconds=ack_seconds)
        try:
            yield consumer
        finally:
            await consumer.close()

    async def consumers(self, stream: str) -> set[str] | None:
        """Return the names of a stream's durable consumers, None when there is no stream.

        Raises: BusUnavailable, BusRefused.
        """
        names: set[str] = set()
        try:
            with translated():
                while page := await self._current().jetstream.consumers_info(stream, offset=len(names)):
                    names |= {one.name for one in page}
        except BusRefused as error:
            if error.error_code in NOT_FOUND:
                return None
            raise
        return names

    async def create_consumer(self, stream: str, durable: str, *, filter_subject: str) -> None:
        """Make a durable pull consumer that starts at the stream's beginning. Raises: BusUnavailable, BusRefused."""
        config = ConsumerConfig(
            durable_name=durable,
            ack_policy=AckPolicy.EXPLICIT,
            deliver_policy=DeliverPolicy.ALL,
            filter_subject=filter_subject,
        )
        with translated():
            await self._current().jetstream.add_consumer(stream, config)

    async def delete_consumer(self, stream: str, durable: str) -> None:
        """Remove a consumer. Raises: BusUnavailable, BusRefused."""
        with translated():
            await self._current().jetstream.delete_consumer(stream, durable)

    # --- the connection ---------------------------------------------------------------------------------------------

    def _current(self) -> Connection:
        if self._connection is None:
            raise BusUnavailable("NATS is not connected.")
        return self._connection

    async def _keep_connected(self, url: str) -> None:
        while True:
            try:
                async with connected(
                    url, token=self._token, name=self._name, generation=self._generation + 1
                ) as connection:
                    for subject, callback in self._subscriptions:
                        await connection.subscribe(subject, callback)
                    self._generation = connection.generation
                    self._set(connection)
                    log.info("NATS is connected (%s).", self._name)
                    await connection.lost.wait()
                    log.warning("The connection to NATS is lost (%s); trying again.", self._name)
                    self._set(None)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                log.warning("NATS does not work yet: %s", text_of(error))
                await anyio.sleep(RETRY_SECONDS)
            finally:
                self._set(None)

    def _set(self, connection: Connection | None) -> None:
        self._connection = connection
        self._changed.set()
        self._changed = anyio.Event()


def _stream_config(settings: StreamSettings, metadata: dict[str, str], first_sequence: int | None) -> StreamConfig:
    return StreamConfig(
        name=settings.name,
        description="Every event of ROSE; the sequence is the position in the log. Only the relay publishes here.",
        subjects=list(settings.subjects),
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_bytes=settings.max_bytes,
        max_age=settings.max_age_seconds,
        num_replicas=settings.replicas,
        deny_delete=True,
        deny_purge=True,
        first_seq=first_sequence,
        metadata=metadata,
    )


def _check_size(message: Message, limit: int) -> None:
    """Refuse what the server would answer by closing the connection: its limit counts the headers too."""
    headers = sum(len(name) + len(value) + 4 for name, value in message.headers.items()) + HEADER_FRAME_BYTES
    if headers + len(message.body) > limit:
        raise nats.errors.MaxPayloadError


async def _cancel_when(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
