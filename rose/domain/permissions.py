"""Checkpoint permissions: how a project lets another one use a model of its own."""

from __future__ import annotations

from typing import assert_never

import msgspec

from rose.errors import NotFound


class GrantPermission(msgspec.Struct, frozen=True, kw_only=True):
    """Let a project use a model."""

    permission_id: str
    project: str
    """Whose model it is."""
    grantee: str
    """Who may use it."""
    model: str
    """Name of the model or checkpoint."""
    at: int


class WithdrawPermission(msgspec.Struct, frozen=True, kw_only=True):
    """End it; jobs that have begun keep what they need."""

    at: int


Command = GrantPermission | WithdrawPermission


class PermissionGranted(msgspec.Struct, frozen=True, kw_only=True):
    """A project may use a model of another one."""

    permission_id: str
    project: str
    grantee: str
    model: str
    created_at: int


class PermissionWithdrawn(msgspec.Struct, frozen=True, kw_only=True):
    """It may not any more."""

    at: int


Event = PermissionGranted | PermissionWithdrawn


class PermissionState(msgspec.Struct, frozen=True, kw_only=True):
    """A permission as its events make it; its JSON is the entity row's `doc`."""

    id: str = ""
    project: str = ""
    grantee: str = ""
    model: str = ""
    created_at: int = 0
    withdrawn_at: int | None = None


initial = PermissionState()


def decide(command: Command, state: PermissionState) -> tuple[Event, ...]:
    """Return the events of `command`. Raises: NotFound when the permission was withdrawn before."""
    match command:
        case GrantPermission():
            return (
                PermissionGranted(
                    permission_id=command.permission_id,
                    project=command.project,
                    grantee=command.grantee,
                    model=command.model,
                    created_at=command.at,
                ),
            )
        case WithdrawPermission():
            if state.withdrawn_at is not None:
                raise missing(state.id)
            return (PermissionWithdrawn(at=command.at),)
        case _:
            assert_never(command)


def evolve(state: PermissionState, event: Event) -> PermissionState:
    """Return the state after `event`."""
    match event:
        case PermissionGranted():
            return PermissionState(
                id=event.permission_id,
                project=event.project,
                grantee=event.grantee,
                model=event.model,
                created_at=event.created_at,
            )
        case PermissionWithdrawn():
            return msgspec.structs.replace(state, withdrawn_at=event.at)
        case _:
            assert_never(event)


def missing(permission_id: str) -> NotFound:
    """Return the error for a permission that there is not, or not any more."""
    return NotFound(f"There is no permission {permission_id}.", code="permission_not_found", param="permission_id")
