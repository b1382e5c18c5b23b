"""Webhook endpoints: what can be asked of them, as rose/commands.py does for files, jobs and models."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

from projections import webhooks as webhooks_view
from rose.commands import Commands, Outcome, Request
from rose.domain import webhooks
from rose.domain.webhooks import WebhookState, missing
from rose.errors import InvalidState
from rose.log.append import StreamWrite

if TYPE_CHECKING:
    from rose.log.pool import Pool

MAX_ENDPOINTS = 1000
"""Of a project."""
Respond = Callable[[WebhookState], bytes]


class Endpoints:
    """Everything that can be asked of webhook endpoints. Safe to share between tasks; holds no state of its own."""

    def __init__(self, pool: Pool, commands: Commands) -> None:
        self._pool = pool
        self._commands = commands

    async def get(self, project: str, webhook_id: str) -> WebhookState:
        """Return the project's endpoint. Raises: NotFound, Unavailable."""
        state = await webhooks_view.get(self._pool, project, webhook_id)
        if state is None:
            raise missing(webhook_id)
        return state

    async def create(
        self, command: webhooks.CreateWebhook, secret: str, request: Request, respond: Respond
    ) -> Outcome[WebhookState]:
        """Create an endpoint whose deliveries `secret` signs. Raises: InvalidState when there are many; Unavailable."""
        if await webhooks_view.count(self._pool, command.project) >= MAX_ENDPOINTS:
            raise InvalidState(
                f"There are {MAX_ENDPOINTS} webhook endpoints; a project has no more.",
                code="too_many_webhook_endpoints",
                hint="Delete one, or change where it goes.",
            )
        await webhooks_view.keep_secret(self._pool, command.secret_id, secret)

        async def load() -> tuple[WebhookState, int]:
            return webhooks.initial, 0

        return await self._commands.change(load, _writer(command.webhook_id, command), request, respond)

    async def change(
        self, project: str, webhook_id: str, command: webhooks.Command, request: Request, respond: Respond
    ) -> Outcome[WebhookState]:
        """Update or delete the project's endpoint. Raises: NotFound, InvalidState, Unavailable."""

        async def load() -> tuple[WebhookState, int]:
            return await self._load(project, webhook_id)

        return await self._commands.change(load, _writer(webhook_id, command), request, respond)

    async def rotate_secret(
        self,
        project: str,
        webhook_id: str,
        command: webhooks.RotateSecret,
        secret: str,
        request: Request,
        respond: Respond,
    ) -> Outcome[WebhookState]:
        """Sign with another secret from now on. Raises: NotFound, InvalidState, Unavailable."""
        await self.get(project, webhook_id)
        await webhooks_view.keep_secret(self._pool, command.secret_id, secret)
        return await self.change(project, webhook_id, command, request, respond)

    async def disable(self, webhook_id: str, command: webhooks.DisableWebhook, request: Request) -> WebhookState:
        """Switch an endpoint off for what its receiver does. Raises: NotFound, Unavailable."""

        async def load() -> tuple[WebhookState, int]:
            return await self._load(None, webhook_id)

        return (await self._commands.change(load, _writer(webhook_id, command), request)).state

    async def _load(self, project: str | None, webhook_id: str) -> tuple[WebhookState, int]:
        found = await webhooks_view.find(self._pool, webhook_id)
        if found is None or project not in (None, found[0].project):
            raise missing(webhook_id)
        return found


def _writer(
    webhook_id: str, command: webhooks.Command
) -> Callable[[WebhookState, int], tuple[WebhookState, list[StreamWrite]]]:
    def write(state: WebhookState, version: int) -> tuple[WebhookState, list[StreamWrite]]:
        events = webhooks.decide(command, state)
        if not events:
            return state, []
        after = reduce(webhooks.evolve, events, state)
        stream = StreamWrite(
            stream_id=f"webhook/{webhook_id}", expected_version=version, events=events, row=webhooks_view.row(after)
        )
        return after, [stream]

    return write
