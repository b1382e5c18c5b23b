"""What can be asked of checkpoint permissions, as rose/commands.py does for files, jobs and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import msgspec

from projections import permissions as permissions_view
from rose.commands import Request
from rose.domain import permissions
from rose.domain.permissions import PermissionState
from rose.log import read
from rose.log.append import StreamWrite, append

if TYPE_CHECKING:
    from rose.log.pool import Pool

Respond = Callable[[list[PermissionState]], bytes]


class Granted(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    states: list[PermissionState]
    replayed: bool
    """True when this request had been answered before; `response` is that answer."""
    response: bytes | None


class Permissions:
    """Grants and withdraws. Safe to share between tasks; holds no state of its own."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def grant(
        self, commands: Sequence[permissions.GrantPermission], request: Request, *, respond: Respond
    ) -> Granted:
        """Let several projects use a model, all or none. Raises: Unavailable."""
        return await self._append([(command, permissions.initial, 0) for command in commands], request, respond)

    async def withdraw(self, permission_id: str, at: int, request: Request, *, respond: Respond) -> Granted:
        """End a project's use of a model. Raises: NotFound, Conflict, Unavailable."""
        found = await read.load_row(self._pool, "permissions", permission_id)
        if found is None:
            raise permissions.missing(permission_id)
        state = msgspec.json.decode(found[0], type=PermissionState)
        return await self._append([(permissions.WithdrawPermission(at=at), state, found[1])], request, respond)

    async def _append(
        self,
        wanted: Sequence[tuple[permissions.Command, PermissionState, int]],
        request: Request,
        respond: Respond,
    ) -> Granted:
        states: list[PermissionState] = []
        writes: list[StreamWrite] = []
        for command, state, version in wanted:
            events = permissions.decide(command, state)
            after = reduce(permissions.evolve, events, state)
            states.append(after)
            writes.append(
                StreamWrite(
                    stream_id=f"permission/{after.id}",
                    expected_version=version,
                    events=events,
                    row=permissions_view.row(after),
                )
            )
        appended = await append(
            self._pool,
            writes,
            command_id=request.command_id,
            request_hash=request.request_hash,
            response=respond(states),
            actor=request.actor,
        )
        return Granted(states=states, replayed=appended.replayed, response=appended.response)
