"""The connection to NATS: connect in the background, publish, wake-ups, the stream, durable consumers.

Nothing here is needed for ROSE to work: without NATS every call fails at once and nobody waits. Each connection is a
new nats-py client with a number (`generation`), so nothing that was buffered for one connection is sent on the next.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, cast

import anyio
import anyio.abc
import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig
from nats.js.client import JetStreamContext

from rose.errors import RoseError, Unavailable
from rose.subjects import Message

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
"""Longest wait for JetStream's answer; `sync_interval: always` on a slow disk takes its time."""
RETRY_SECONDS = 0.5
"""Time between attempts to connect."""
PING_SECONDS = 10
"""A server that leaves two pings unanswered counts as gone."""
CLOSE_SECONDS = 2.0
HEADER_FRAME_BYTES = 12
"""The line `NATS/1.0` and an empty line."""
WRONG_LAST_SEQUENCE = 10071
NOT_FOUND = frozenset({10037, 10059, 10014})
CONTENT_REFUSED = frozenset({10054, 10097})
"""Message or header larger than allowed: no later attempt will do better."""


class BusUnavailable(Unavailable):
    """NATS does not answer."""

    default_code = "nats_unavailable"


class BusRefused(RoseError):
    """NATS refused a request."""

    default_code = "nats_refused"

    def __init__(self, message: str, *, error_code: int = 0, content: bool = False) -> None:
        super().__init__(message)
        self.error_code = error_code
        self.content = content
        """True when the message itself is at fault: sending it again is of no use."""


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is kept."""

    name: str
    subjects: tuple[str, ...]
    replicas: int = 1
    max_bytes: int = 1 << 30
    max_age_seconds: float = 30 * 86400.0


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as the server sees it."""

    first_sequence: int
    last_sequence: int
    messages: int
    bytes: int
    metadata: dict[str, str]
    settings: StreamSettings


class StoredMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it lies in the stream."""

    sequence: int
    subject: str
    body: bytes
    headers: dict[str, str]
    stored_at: datetime | None = None


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A message that a durable consumer was given; acknowledge it once its effect is stored."""

    sequence: int
    subject: str
    body: bytes
    headers: dict[str, str]
    deliveries: int
    """1 at the first delivery."""
    ack: Callable[[], Awaitable[None]]


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


class _Connection:
    """One client from its connect to its loss."""

    def __init__(self, client: Client, generation: int, lost: anyio.Event) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=REQUEST_SECONDS)
        self.generation = generation
        self.lost = lost


class Bus:
    """NATS, when it is there. Use as an async context manager; entering never waits for the server."""

    def __init__(self, url: str | None, *, token: str | None = None, name: str = "rose") -> None:
        self._url = url
        self._token = token
        self._name = name
        self._connection: _Connection | None = None
        self._generation = 0
        self._changed = anyio.Event()
        self._subscriptions: list[tuple[str, Callable[[str, bytes], None]]] = []
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

    def subscribe(self, subject: str, callback: Callable[[str, bytes], None]) -> None:
        """Call `callback(subject, body)` for messages that arrive while connected: a hint, with losses and repeats.

        Registers at once, with or without a server, and again on every connection.
        """
        self._subscriptions.append((subject, callback))
        if self._connection is not None and self._group is not None:
            self._group.start_soon(self._subscribe_now, self._connection, subject, callback)

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
                with _translated():
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
            with _translated():
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
        with _translated():
            await self._current().jetstream.add_stream(_stream_config(settings, metadata, first_sequence))

    async def update_stream(self, settings: StreamSettings, *, metadata: dict[str, str]) -> None:
        """Change limits and metadata of an existing stream. Raises: BusUnavailable, BusRefused."""
        with _translated():
            await self._current().jetstream.update_stream(_stream_config(settings, metadata, None))

    async def delete_stream(self, name: str) -> bool:
        """Delete a stream with its messages; return whether it existed. Raises: BusUnavailable, BusRefused."""
        try:
            with _translated():
                return await self._current().jetstream.delete_stream(name)
        except BusRefused as error:
            if error.error_code in NOT_FOUND:
                return False
            raise

    async def stored(self, stream: str, sequence: int) -> StoredMessage | None:
        """Return the message at `sequence`, None when there is none. Raises: BusUnavailable, BusRefused."""
        try:
            with _translated():
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
        consumer = Consumer(self, stream, durable, filter_subject=filter_subject, ack_seconds=ack_seconds)
        try:
            yield consumer
        finally:
            await consumer.close()

    # --- the connection ---------------------------------------------------------------------------------------------

    def _current(self) -> _Connection:
        if self._connection is None:
            raise BusUnavailable("NATS is not connected.")
        return self._connection

    async def _keep_connected(self, url: str) -> None:
        while True:
            lost = anyio.Event()
            client = Client()
            try:
                await self._connect(client, url, lost)
                connection = _Connection(client, self._generation + 1, lost)
                for subject, callback in self._subscriptions:
                    await self._subscribe_now(connection, subject, callback)
                self._generation = connection.generation
                self._set(connection)
                log.info("NATS is connected (%s).", self._name)
                await lost.wait()
                log.warning("The connection to NATS is lost (%s); trying again.", self._name)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                log.warning("NATS does not work yet: %s", _text(error))
                await anyio.sleep(RETRY_SECONDS)
            finally:
                lost.set()
                self._set(None)
                await _close(client)

    async def _connect(self, client: Client, url: str, lost: anyio.Event) -> None:
        told = False

        async def on_error(error: Exception) -> None:
            nonlocal told
            log.log(logging.DEBUG if told else logging.WARNING, "NATS at %s: %s", _without_password(url), _text(error))
            told = True

        async def on_loss() -> None:
            lost.set()

        await client.connect(
            url,
            name=self._name,
            token=self._token,
            error_cb=on_error,
            disconnected_cb=on_loss,
            closed_cb=on_loss,
            max_reconnect_attempts=-1,
            reconnect_time_wait=cast("int", RETRY_SECONDS),
            connect_timeout=2,
            ping_interval=PING_SECONDS,
            pending_size=0,  # nothing is buffered for a connection that is not there
        )

    def _set(self, connection: _Connection | None) -> None:
        self._connection = connection
        self._changed.set()
        self._changed = anyio.Event()

    async def _subscribe_now(
        self, connection: _Connection, subject: str, callback: Callable[[str, bytes], None]
    ) -> None:
        async def deliver(message: Msg) -> None:
            callback(message.subject, message.data)

        with contextlib.suppress(nats.errors.ConnectionClosedError):
            await connection.client.subscribe(subject, cb=deliver)


class Consumer:
    """A durable pull consumer. `next` recreates its subscription after a lost connection or a silent server."""

    def __init__(self, bus: Bus, stream: str, durable: str, *, filter_subject: str | None, ack_seconds: float) -> None:
        self._bus = bus
        self._stream = stream
        self._durable = durable
        self._filter = filter_subject
        self._ack_seconds = ack_seconds
        self._subscription: JetStreamContext.PullSubscription | None = None
        self._generation = 0

    async def next(self, *, timeout_seconds: float = 5.0) -> Received | None:
        """Return the next message, None when there is none for `timeout_seconds`.

        Raises: BusUnavailable, BusRefused.
        """
        subscription = await self._subscribed()
        try:
            (message,) = await subscription.fetch(1, timeout=timeout_seconds, heartbeat=timeout_seconds / 3)
        except nats.js.errors.FetchTimeoutError:
            return None  # the server said that it is there and has nothing
        except (nats.errors.TimeoutError, TimeoutError):
            await self.close()  # silence: the subscription may be dead
            return None
        except nats.js.errors.APIError as error:
            await self.close()
            raise _refused(error) from None
        except (nats.errors.Error, OSError) as error:
            await self.close()
            raise BusUnavailable(f"NATS does not answer: {_text(error)}.") from None
        return _received(message)

    async def close(self) -> None:
        """Drop the subscription; the durable consumer on the server stays."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None and self._bus.connected:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def _subscribed(self) -> JetStreamContext.PullSubscription:
        connection = self._bus._current()  # pyright: ignore[reportPrivateUsage]
        if self._subscription is None or self._generation != connection.generation:
            config = ConsumerConfig(
                durable_name=self._durable,
                ack_policy=AckPolicy.EXPLICIT,
                deliver_policy=DeliverPolicy.ALL,
                ack_wait=self._ack_seconds,
                max_ack_pending=1,
                filter_subject=self._filter,
            )
            with _translated():
                self._subscription = await connection.jetstream.pull_subscribe(
                    self._filter or "", durable=self._durable, stream=self._stream, config=config
                )
            self._generation = connection.generation
        return self._subscription


def _stream_config(settings: StreamSettings, metadata: dict[str, str], first_sequence: int | None) -> StreamConfig:
    return StreamConfig(
        name=settings.name,
        description="Every event of ROSE; the sequence is the position in the log. Only the relay publishes here.",
        subjects=list(settings.subjects),
        retention="limits",  # pyright: ignore[reportArgumentType]
        storage="file",  # pyright: ignore[reportArgumentType]
        discard="old",  # pyright: ignore[reportArgumentType]
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


def _received(message: Msg) -> Received:
    async def acknowledge() -> None:
        with _translated():
            await message.ack_sync(timeout=cast("int", REQUEST_SECONDS))

    return Received(
        sequence=message.metadata.sequence.stream,
        subject=message.subject,
        body=message.data,
        headers=dict(message.headers or {}),
        deliveries=message.metadata.num_delivered or 1,
        ack=acknowledge,
    )


@contextlib.contextmanager
def _translated() -> Generator[None, None, None]:
    """Turn what nats-py raises into BusUnavailable and BusRefused."""
    try:
        yield
    except (nats.errors.MaxPayloadError, nats.errors.BadSubjectError, nats.errors.BadHeaderError) as error:
        raise BusRefused(f"NATS refuses the message: {_text(error)}.", content=True) from None
    except nats.js.errors.NoStreamResponseError:
        raise BusUnavailable("No JetStream stream takes the message.", code="no_stream") from None
    except nats.js.errors.ServiceUnavailableError as error:
        raise BusUnavailable(f"JetStream does not answer: {_text(error)}.") from None
    except nats.js.errors.APIError as error:
        raise _refused(error) from None
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise BusUnavailable(f"NATS does not answer: {_text(error)}.") from None


def _refused(error: nats.js.errors.APIError) -> BusRefused:
    code = error.err_code or 0
    return BusRefused(
        f"NATS refused the request: {error.description} (error {code}).",
        error_code=code,
        content=code in CONTENT_REFUSED,
    )


def _without_password(url: str) -> str:
    return url.rpartition("@")[2]


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


async def _cancel_when(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _close(client: Client) -> None:
    """Close within a bound, whatever state the client is in."""
    with anyio.move_on_after(CLOSE_SECONDS, shield=True), contextlib.suppress(nats.errors.Error, OSError):
        await client.close()
