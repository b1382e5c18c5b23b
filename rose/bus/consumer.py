"""A durable pull consumer: every message in order, each until it is acknowledged, through lost connections."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import cast

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.client import JetStreamContext

from rose.bus.answers import BusUnavailable, Received, refused, text_of, translated
from rose.bus.connection import REQUEST_SECONDS, Connection


class Consumer:
    """A durable pull consumer. `next` recreates its subscription after a lost connection or a silent server."""

    def __init__(
        self,
        current: Callable[[], Connection],
        stream: str,
        durable: str,
        *,
        filter_subject: str | None,
        ack_seconds: float,
    ) -> None:
        self._current = current
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
            raise refused(error) from None
        except (nats.errors.Error, OSError) as error:
            await self.close()
            raise BusUnavailable(f"NATS does not answer: {text_of(error)}.") from None
        return _received(message)

    async def close(self) -> None:
        """Drop the subscription; the durable consumer on the server stays."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def _subscribed(self) -> JetStreamContext.PullSubscription:
        connection = self._current()
        if self._subscription is None or self._generation != connection.generation:
            config = ConsumerConfig(
                durable_name=self._durable,
                ack_policy=AckPolicy.EXPLICIT,
                deliver_policy=DeliverPolicy.ALL,
                ack_wait=self._ack_seconds,
                max_ack_pending=1,
                filter_subject=self._filter,
            )
            with translated():
                self._subscription = await connection.jetstream.pull_subscribe(
                    self._filter or "", durable=self._durable, stream=self._stream, config=config
                )
            self._generation = connection.generation
        return self._subscription


def _received(message: Msg) -> Received:
    async def acknowledge() -> None:
        with translated():
            await message.ack_sync(timeout=cast("int", REQUEST_SECONDS))

    return Received(
        sequence=message.metadata.sequence.stream,
        subject=message.subject,
        body=message.data,
        headers=dict(message.headers or {}),
        deliveries=message.metadata.num_delivered or 1,
        ack=acknowledge,
    )
