"""Webhook endpoints: commands, events, state, decide, evolve.

Signing secrets are never in an event: they lie beside the log, which names them.
"""

from __future__ import annotations

from typing import Literal, assert_never

import msgspec

from rose.errors import InvalidState, NotFound

OLD_SECRET_SECONDS = 24 * 3600
"""How long an old secret goes on to sign when a rotation keeps it."""
MAX_OLD_SECRETS = 4
"""Each one is a signature more in every delivery."""

SENT_TYPES: tuple[str, ...] = (
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
)
"""Events that ROSE has."""
EVENT_TYPES: tuple[str, ...] = (
    *SENT_TYPES,
    *("batch.completed", "batch.failed", "batch.expired", "batch.cancelled"),
    *("response.completed", "response.failed", "response.cancelled", "response.incomplete"),
    *("eval.run.succeeded", "eval.run.failed", "eval.run.canceled"),
    *("realtime.call.incoming", "video.completed", "video.failed"),
    *("agent.environment.ready", "agent.environment.failed"),
    *("agent.environment.suspended", "agent.environment.expired"),
    *("agent.session.created", "agent.session.action_required", "agent.session.in_progress"),
    *("agent.session.idle", "agent.session.failed"),
    "safety.alert.created",
)
"""Events that an endpoint can ask for: also OpenAI's others, so that its programs run unchanged. Those never happen."""

DisableReason = Literal["requested", "gone", "failing"]
"""A person asked for it; the receiver answered 410; nothing arrived during the whole schedule of attempts."""


class CreateWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """Send events to an address."""

    webhook_id: str
    project: str
    at: int
    name: str
    url: str
    event_types: tuple[str, ...]
    secret_id: str
    secret_hint: str


class UpdateWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """Change what is not None."""

    at: int
    name: str | None = None
    url: str | None = None
    event_types: tuple[str, ...] | None = None
    enabled: bool | None = None
    """A new address switches an endpoint on, too, unless this says otherwise."""


class RotateSecret(msgspec.Struct, frozen=True, kw_only=True):
    """Sign with a new secret."""

    at: int
    secret_id: str
    secret_hint: str
    keep_old: bool


class DisableWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """Send nothing more, because of what the receiver at `url` does; nothing when that is not the address now."""

    at: int
    url: str
    reason: DisableReason
    detail: str


class DeleteWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """End the endpoint."""

    at: int


Command = CreateWebhook | UpdateWebhook | RotateSecret | DisableWebhook | DeleteWebhook


class WebhookCreated(msgspec.Struct, frozen=True, kw_only=True):
    """Events go to an address from now on."""

    project: str
    webhook_id: str
    created_at: int
    name: str
    url: str
    event_types: tuple[str, ...]
    secret_id: str
    """Which secret signs; the secret itself is not in the log."""
    secret_hint: str


class WebhookUpdated(msgspec.Struct, frozen=True, kw_only=True):
    """What is not null has changed."""

    at: int
    name: str | None = None
    url: str | None = None
    event_types: tuple[str, ...] | None = None


class WebhookSecretRotated(msgspec.Struct, frozen=True, kw_only=True):
    """Deliveries are signed with a new secret."""

    at: int
    secret_id: str
    secret_hint: str
    old_until: int | None = None
    """Until when the secrets before it sign, too; null: they do not."""


class WebhookDisabled(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing is sent until the endpoint is switched on again."""

    at: int
    reason: DisableReason
    detail: str
    """What happened, for people."""


class WebhookEnabled(msgspec.Struct, frozen=True, kw_only=True):
    """Events are sent again."""

    at: int


class WebhookDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint is gone."""

    at: int


Event = WebhookCreated | WebhookUpdated | WebhookSecretRotated | WebhookDisabled | WebhookEnabled | WebhookDeleted


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that signs."""

    id: str
    hint: str
    """The secret, masked."""
    until: int | None = None
    """Unix seconds of its end; None for the present one."""


class Disabled(msgspec.Struct, frozen=True, kw_only=True):
    """Why and since when nothing is sent."""

    at: int
    reason: DisableReason
    detail: str


class WebhookState(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as its events make it; its JSON is the entity row's `doc`."""

    id: str = ""
    project: str = ""
    name: str = ""
    url: str = ""
    event_types: tuple[str, ...] = ()
    created_at: int = 0
    updated_at: int = 0
    """Last change of the configuration or the secret."""
    secrets: tuple[Secret, ...] = ()
    """The present one first, then older ones that may still sign."""
    disabled: Disabled | None = None
    deleted_at: int | None = None

    def signing(self, at: int) -> tuple[Secret, ...]:
        """Return the secrets that sign at `at` (Unix seconds), the present one first."""
        return tuple(secret for secret in self.secrets if secret.until is None or secret.until > at)


initial = WebhookState()


def decide(command: Command, state: WebhookState) -> tuple[Event, ...]:
    """Return the events of `command`; none when it is already so.

    Raises: NotFound when the endpoint was deleted; InvalidState.
    """
    if isinstance(command, CreateWebhook):
        return (
            WebhookCreated(
                project=command.project,
                webhook_id=command.webhook_id,
                created_at=command.at,
                name=command.name,
                url=command.url,
                event_types=command.event_types,
                secret_id=command.secret_id,
                secret_hint=command.secret_hint,
            ),
        )
    if state.deleted_at is not None:
        raise missing(state.id)
    match command:
        case UpdateWebhook():
            return _updated(command, state)
        case RotateSecret():
            old = [secret for secret in state.signing(command.at) if secret.until is not None]
            if command.keep_old and len(old) >= MAX_OLD_SECRETS:
                first = min(secret.until for secret in old if secret.until is not None)
                raise InvalidState(
                    f"{len(old)} old secrets of {state.id} still sign; the first of them ends at {first}.",
                    code="too_many_secrets",
                    param="keep_old_secret_active_for_24_hours",
                    hint="Wait, or rotate without keeping the old secrets.",
                )
            until = command.at + OLD_SECRET_SECONDS if command.keep_old else None
            return (
                WebhookSecretRotated(
                    at=command.at, secret_id=command.secret_id, secret_hint=command.secret_hint, old_until=until
                ),
            )
        case DisableWebhook():
            if state.disabled is not None or state.url != command.url:
                return ()
            return (WebhookDisabled(at=command.at, reason=command.reason, detail=command.detail),)
        case DeleteWebhook():
            return (WebhookDeleted(at=command.at),)
        case _:
            assert_never(command)


def evolve(state: WebhookState, event: Event) -> WebhookState:
    """Return the state after `event`."""
    replace = msgspec.structs.replace
    match event:
        case WebhookCreated():
            return WebhookState(
                id=event.webhook_id,
                project=event.project,
                name=event.name,
                url=event.url,
                event_types=event.event_types,
                created_at=event.created_at,
                updated_at=event.created_at,
                secrets=(Secret(id=event.secret_id, hint=event.secret_hint),),
            )
        case WebhookUpdated():
            return replace(
                state,
                name=state.name if event.name is None else event.name,
                url=state.url if event.url is None else event.url,
                event_types=state.event_types if event.event_types is None else event.event_types,
                updated_at=event.at,
            )
        case WebhookSecretRotated():
            fresh = Secret(id=event.secret_id, hint=event.secret_hint)
            old = state.signing(event.at) if event.old_until is not None else ()
            kept = [one if one.until is not None else replace(one, until=event.old_until) for one in old]
            return replace(state, secrets=(fresh, *kept), updated_at=event.at)
        case WebhookDisabled():
            disabled = Disabled(at=event.at, reason=event.reason, detail=event.detail)
            return replace(state, disabled=disabled, updated_at=event.at)
        case WebhookEnabled():
            return replace(state, disabled=None, updated_at=event.at)
        case WebhookDeleted():
            return replace(state, deleted_at=event.at)
        case _:
            assert_never(event)


def missing(webhook_id: str) -> NotFound:
    """Return the error for an endpoint that there is not, or not any more."""
    return NotFound(
        f"There is no webhook endpoint {webhook_id}.", code="webhook_endpoint_not_found", param="webhook_endpoint_id"
    )


def _updated(command: UpdateWebhook, state: WebhookState) -> tuple[Event, ...]:
    changed = WebhookUpdated(
        at=command.at,
        name=command.name if command.name != state.name else None,
        url=command.url if command.url != state.url else None,
        event_types=command.event_types if command.event_types != state.event_types else None,
    )
    events: list[Event] = []
    if (changed.name, changed.url, changed.event_types) != (None, None, None):
        events.append(changed)
    enabled = command.enabled
    if enabled is None and changed.url is not None:
        enabled = True
    if enabled is True and state.disabled is not None:
        events.append(WebhookEnabled(at=command.at))
    if enabled is False and state.disabled is None:
        events.append(WebhookDisabled(at=command.at, reason="requested", detail="It was switched off on request."))
    return tuple(events)
