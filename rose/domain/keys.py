"""API keys: who may call, in which project, and what for. A key's secret is never in an event; its hash lies beside.

A key belongs to a service account, as in OpenAI's administration API: a name under which a project's programs call.
"""

from __future__ import annotations

from typing import Literal, assert_never

import msgspec

from rose.errors import NotFound

Scope = Literal["read", "write", "admin"]
Kind = Literal["api", "nats"]
"""What a key opens: the API, or its project's events on NATS. Never both."""
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
SCOPE_CLOSURE: dict[Scope, frozenset[Scope]] = {
    "read": frozenset(("read",)),
    "write": frozenset(("read", "write")),
    "admin": frozenset(SCOPES),
}
"""What a scope allows: who may write may read, and who administers may do both."""


class ServiceAccount(msgspec.Struct, frozen=True, kw_only=True):
    """Whose a key is."""

    id: str
    name: str
    created_at: int


class CreateKey(msgspec.Struct, frozen=True, kw_only=True):
    """Let somebody call."""

    key_id: str
    project: str
    at: int
    name: str
    account: ServiceAccount
    scope: Scope
    hint: str
    """The secret's last characters, by which a person knows it again."""
    expires_at: int | None = None
    kind: Kind = "api"


class RevokeKey(msgspec.Struct, frozen=True, kw_only=True):
    """End a key's use at once."""

    at: int


Command = CreateKey | RevokeKey


class KeyCreated(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody may call."""

    key_id: str
    project: str
    created_at: int
    name: str
    account: ServiceAccount
    scope: Scope
    hint: str
    expires_at: int | None = None
    kind: Kind = "api"


class KeyRevoked(msgspec.Struct, frozen=True, kw_only=True):
    """The key opens nothing any more."""

    at: int


Event = KeyCreated | KeyRevoked


class KeyState(msgspec.Struct, frozen=True, kw_only=True):
    """A key as its events make it; its JSON is the entity row's `doc`."""

    id: str = ""
    project: str = ""
    created_at: int = 0
    name: str = ""
    account: ServiceAccount = ServiceAccount(id="", name="", created_at=0)
    scope: Scope = "read"
    hint: str = ""
    expires_at: int | None = None
    revoked_at: int | None = None
    kind: Kind = "api"

    def opens(self, now: int) -> bool:
        """Say whether the key can be used at `now` (Unix seconds)."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


initial = KeyState()


def decide(command: Command, state: KeyState) -> tuple[Event, ...]:
    """Return the events of `command`. Raises: NotFound when the key was revoked before."""
    match command:
        case CreateKey():
            return (
                KeyCreated(
                    key_id=command.key_id,
                    project=command.project,
                    created_at=command.at,
                    name=command.name,
                    account=command.account,
                    scope=command.scope,
                    hint=command.hint,
                    expires_at=command.expires_at,
                    kind=command.kind,
                ),
            )
        case RevokeKey():
            if state.revoked_at is not None:
                raise NotFound(f"There is no API key {state.id}.", code="key_not_found", param="key_id")
            return (KeyRevoked(at=command.at),)
        case _:
            assert_never(command)


def evolve(state: KeyState, event: Event) -> KeyState:
    """Return the state after `event`."""
    match event:
        case KeyCreated():
            return KeyState(
                id=event.key_id,
                project=event.project,
                created_at=event.created_at,
                name=event.name,
                account=event.account,
                scope=event.scope,
                hint=event.hint,
                expires_at=event.expires_at,
                kind=event.kind,
            )
        case KeyRevoked():
            return msgspec.structs.replace(state, revoked_at=event.at)
        case _:
            assert_never(event)
