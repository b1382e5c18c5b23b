"""Delivers the log's events to webhook endpoints: at least once, an event under the same id however often.

One process works at a time. What is to be sent is planned from the log into a table; an attempt is noted after it was
made, so one that a crash cuts off is made again. Order is not kept: each event is tried by itself.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

import anyio
import msgspec
from anyio.abc import TaskGroup

from projections import webhook_deliveries as deliveries
from projections import webhooks as webhooks_view
from projections.webhook_deliveries import Delivery
from rose.commands import Commands, Request
from rose.domain.webhooks import DisableReason, DisableWebhook
from rose.errors import NotFound, Unavailable
from rose.log.append import Actor
from rose.log.feed import Feed, open_feed
from rose.log.pool import Pool
from rose.settings import Settings
from rose.webhooks.endpoints import Endpoints
from rose.webhooks.sending import Answer, Sender
from rose.webhooks.signing import Payload, event_id, headers

logger = logging.getLogger(__name__)

LOCK = 3
"""Advisory lock of the one process that delivers."""
_MINUTE, _HOUR = 60.0, 3600.0
SCHEDULE = (
    *(5.0, 5 * _MINUTE, 30 * _MINUTE),
    *(2 * _HOUR, 5 * _HOUR, 10 * _HOUR, 14 * _HOUR, 20 * _HOUR, 24 * _HOUR),
)
"""Seconds between attempts, as Standard Webhooks recommends: ten attempts in three days."""
JITTER = 0.1
"""Part of a wait by which it is made shorter or longer, so that not everything comes back at once."""
LONGEST_WAIT_SECONDS = 24 * _HOUR
"""What a receiver that asks to be left alone can have."""
AT_ONCE = 64
AT_ONCE_PROJECT = 16
AT_ONCE_ENDPOINT = 4
"""Deliveries under way: of all, of a project, of an endpoint. Who answers slowly only delays itself."""
POLL_SECONDS = 0.5
"""How often it is looked at what is due."""
PAUSE_SECONDS = 0.1
"""Least time between two looks, however busy the log is."""
STANDBY_SECONDS = 1.0
RETRY_SECONDS = 0.5
GIVE_UP_SECONDS = 5.0
"""How often what waits for endpoints that are off is dropped."""
TIDY_SECONDS = 3600.0
KEEP_SECONDS = 7 * 24 * _HOUR
"""How long finished deliveries are remembered; longer than the schedule."""
DRAIN_SECONDS = 5.0
"""How long the end waits for deliveries under way."""

Key = tuple[str, int]


async def run(pool: Pool, settings: Settings, stop: anyio.Event) -> None:
    """Deliver until `stop` is set, then let what is under way come to its end for a moment.

    Lasts through the absence of Postgres. Any number of processes may run this.
    """
    async with Sender(private=settings.webhook_private_targets) as sender:
        deliverer = Deliverer(pool, sender)
        async with anyio.create_task_group() as group:
            group.start_soon(deliverer.deliver)
            await stop.wait()
            await deliverer.drain(DRAIN_SECONDS)
            group.cancel_scope.cancel()


class Deliverer:
    """Plans and makes deliveries. Another `schedule` is for tests."""

    def __init__(self, pool: Pool, sender: Sender, *, schedule: Sequence[float] = SCHEDULE) -> None:
        self._pool = pool
        self._sender = sender
        self._schedule = schedule
        self._endpoints = Endpoints(pool, Commands(pool))
        self._under_way: dict[Key, str] = {}  # delivery -> project
        self._planned = 0
        self._ending = False
        self._finished = anyio.Event()
        self._give_up_at = self._tidy_at = float("-inf")

    async def deliver(self) -> None:
        """Deliver for ever. Never raises for what Postgres or a receiver does."""
        while True:
            try:
                async with open_feed(self._pool) as feed:
                    while not await feed.lock(LOCK):
                        await anyio.sleep(STANDBY_SECONDS)
                        await feed.wait(0)
                    await self._work(feed)
            except* Unavailable as group:
                logger.warning("webhooks wait for Postgres: %s", _first(group))
            await anyio.sleep(RETRY_SECONDS)

    async def drain(self, seconds: float) -> None:
        """Begin no more deliveries, and wait for those under way, at most so long."""
        self._ending = True
        with anyio.move_on_after(seconds):
            while self._under_way:
                self._finished = anyio.Event()
                await self._finished.wait()

    async def _work(self, feed: Feed) -> None:
        """Deliver while this feed lives. Raises: Unavailable (in a group) when it does not any more."""
        self._under_way.clear()
        async with anyio.create_task_group() as group:
            while True:
                more = await self._look(feed, group)
                await anyio.sleep(PAUSE_SECONDS)
                await feed.wait(0 if more else POLL_SECONDS)

    async def _look(self, feed: Feed, group: TaskGroup) -> bool:
        """Plan, and begin what is due and has room; return whether the log goes on."""
        head = await feed.head()
        if head > self._planned:
            self._planned = await deliveries.plan(self._pool, head)
        await self._tidy()
        if not self._ending and len(self._under_way) < AT_ONCE:
            for delivery in self._chosen(await deliveries.due(self._pool, each=AT_ONCE_ENDPOINT)):
                key = (delivery.webhook.id, delivery.position)
                self._under_way[key] = delivery.webhook.project
                group.start_soon(self._make, delivery, key, feed.ring)
        return self._planned < head

    def _chosen(self, due: Sequence[Delivery]) -> list[Delivery]:
        chosen: list[Delivery] = []
        endpoints = Counter(webhook_id for webhook_id, _ in self._under_way)
        projects = Counter(self._under_way.values())
        for delivery in due:
            endpoint, project = delivery.webhook.id, delivery.webhook.project
            if (
                (endpoint, delivery.position) in self._under_way
                or endpoints[endpoint] >= AT_ONCE_ENDPOINT
                or projects[project] >= AT_ONCE_PROJECT
                or endpoints.total() >= AT_ONCE
            ):
                continue
            endpoints[endpoint] += 1
            projects[project] += 1
            chosen.append(delivery)
        return chosen

    async def _make(self, delivery: Delivery, key: Key, ring: Callable[[], None]) -> None:
        try:
            await self._attempt(delivery)
        finally:
            self._under_way.pop(key, None)
            self._finished.set()
            ring()

    async def _attempt(self, delivery: Delivery) -> None:
        """Make one attempt and note what came of it. Raises: Unavailable."""
        webhook, begun, now = delivery.webhook, anyio.current_time(), int(time.time())
        name = event_id(webhook.id, delivery.position)
        payload = Payload(
            id=name, created_at=delivery.happened_at, type=delivery.type, data={"id": delivery.subject_id}
        )
        body = msgspec.json.encode(payload)
        signing = await webhooks_view.secrets(self._pool, [secret.id for secret in webhook.signing(now)])
        if signing:
            answer = await self._sender.send(webhook.url, headers(name, body, signing, now), body)
        else:
            answer = Answer(status=None, error="its signing secret is not there; rotate it")
        took = anyio.current_time() - begun
        if answer.error is None:
            assert answer.status is not None
            await deliveries.delivered(self._pool, delivery, status=answer.status, took_seconds=took)
            return
        logger.warning("webhook %s: attempt %d of %s: %s", webhook.id, delivery.attempts + 1, name, answer.error)
        wait = self._wait(delivery, answer)
        if answer.status == 410:
            await self._disable(delivery, "gone", "The receiver answered 410 Gone.")
        elif wait is not None:
            await deliveries.postpone(
                self._pool, delivery, wait, status=answer.status, error=answer.error, took_seconds=took
            )
            return
        elif not await deliveries.something_arrived(self._pool, delivery):
            text = f"{delivery.attempts + 1} attempts to deliver {name} failed, and nothing else arrived meanwhile"
            await self._disable(delivery, "failing", f"{text}. The last time {answer.error}.")
        await deliveries.fail(self._pool, delivery, status=answer.status, error=answer.error, took_seconds=took)

    def _wait(self, delivery: Delivery, answer: Answer) -> float | None:
        """Return the seconds until the next attempt, or None when this was the last."""
        if delivery.attempts >= len(self._schedule):
            return None
        wait = self._schedule[delivery.attempts] * random.uniform(1 - JITTER, 1 + JITTER)
        return max(wait, min(answer.retry_after_seconds, LONGEST_WAIT_SECONDS))

    async def _disable(self, delivery: Delivery, reason: DisableReason, detail: str) -> None:
        webhook = delivery.webhook
        logger.error("webhook %s is switched off: %s", webhook.id, detail)
        command = DisableWebhook(at=int(time.time()), url=webhook.url, reason=reason, detail=detail)
        try:
            await self._endpoints.disable(webhook.id, command, Request(actor=Actor(kind="system", name="webhooks")))
        except NotFound:
            logger.info("webhook %s was deleted meanwhile", webhook.id)

    async def _tidy(self) -> None:
        now = anyio.current_time()
        if now >= self._give_up_at:
            await deliveries.give_up(self._pool)
            self._give_up_at = now + GIVE_UP_SECONDS
        if now >= self._tidy_at:
            await deliveries.forget(self._pool, KEEP_SECONDS)
            await webhooks_view.forget_secrets(self._pool, int(time.time()))
            self._tidy_at = now + TIDY_SECONDS


def _first(group: BaseExceptionGroup[Unavailable]) -> Unavailable:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
