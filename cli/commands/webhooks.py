"""`rose webhooks …`: who is told when a job ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import Parameter

from cli.options import COMMON, Common
from cli.output import moment
from rose.api import schema
from rose.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from cli.client import Client

Ending = Literal["succeeded", "failed", "cancelled"]
ENDINGS: tuple[Ending, ...] = ("succeeded", "failed", "cancelled")
PREFIX = "fine_tuning.job."
Events = Annotated[list[Ending] | None, Parameter(name=["--event", "-e"], env_var="ROSE_EVENT", negative="")]
KEEP_IT = "Keep it: it is not shown again. The SDKs read it from OPENAI_WEBHOOK_SECRET."


def create(
    target: str,
    /,
    *,
    name: Annotated[str | None, Parameter(env_var="ROSE_NAME")] = None,
    event: Events = None,
    common: Common = COMMON,
) -> None:
    """Send events to an address from now on, and print the secret that signs them, this once.

    Parameters
    ----------
    target
        Where they go; https, and public unless the server allows more.
    name
        What people call it; default: the address.
    event
        Which end of a job is told; several times for several; default: each.
    """
    body = schema.CreateWebhookEndpoint(name=name or target[:256], url=target, event_types=_types(event or ENDINGS))
    with common.client() as client:
        made = client.create_webhook(body)
    lines = [f"Webhook endpoint created: {made.id}", made.signing_secret, KEEP_IT]
    common.output.show(made, identity=made.signing_secret, lines=lines)


def list_webhooks(*, common: Common = COMMON) -> None:
    """List webhook endpoints, newest first."""
    with common.client() as client:
        found = client.webhooks()
    rows = [(one.id, one.name, one.url, _events(one), one.status, moment(one.created_at)) for one in found]
    headings = ("endpoint", "name", "url", "events", "status", "created")
    common.output.table(headings, rows, things=found, empty="No webhook endpoints.")


def get(endpoint: str, /, *, common: Common = COMMON) -> None:
    """Show a webhook endpoint, and why it is switched off.

    Parameters
    ----------
    endpoint
        Its id, a unique beginning of it, its name, or `last`.
    """
    with common.client() as client:
        one = client.webhook(_resolve(client, endpoint))
    common.output.show(one, identity=one.id, lines=_lines(one))


def update(
    endpoint: str,
    /,
    *,
    to: Annotated[str | None, Parameter(env_var="ROSE_TO")] = None,
    name: Annotated[str | None, Parameter(env_var="ROSE_NAME")] = None,
    event: Events = None,
    enable: Annotated[bool | None, Parameter(env_var="ROSE_ENABLE", negative="--disable")] = None,
    common: Common = COMMON,
) -> None:
    """Change a webhook endpoint, or switch it off and on.

    Parameters
    ----------
    endpoint
        Its id, a unique beginning of it, its name, or `last`.
    to
        A new address; it also switches the endpoint on.
    name
        A new name.
    event
        All ends of a job that are told from now on.
    enable
        Send events, or send nothing.
    """
    body = schema.UpdateWebhookEndpoint(
        url=msgspec.UNSET if to is None else to,
        name=msgspec.UNSET if name is None else name,
        event_types=_types(event) if event else msgspec.UNSET,
        status=msgspec.UNSET if enable is None else "enabled" if enable else "disabled",
    )
    with common.client() as client:
        one = client.update_webhook(_resolve(client, endpoint), body)
    common.output.show(one, identity=one.id, lines=_lines(one))


def delete(endpoint: str, /, *, common: Common = COMMON) -> None:
    """Delete a webhook endpoint; what waits for it is not sent.

    Parameters
    ----------
    endpoint
        Its id, a unique beginning of it, its name, or `last`.
    """
    with common.client() as client:
        gone = client.delete_webhook(_resolve(client, endpoint))
    common.output.show(gone, identity=gone.id, lines=[f"Webhook endpoint deleted: {gone.id}"])


def try_out(
    endpoint: str,
    /,
    *,
    event: Annotated[Ending, Parameter(name=["--event", "-e"], env_var="ROSE_EVENT")] = "succeeded",
    common: Common = COMMON,
) -> int:
    """Send a made-up event now and say what the receiver answers; exit 1 unless it takes it.

    Parameters
    ----------
    endpoint
        Its id, a unique beginning of it, its name, or `last`.
    event
        Which end of a job to make up.
    """
    with common.client() as client:
        done = client.test_webhook(_resolve(client, endpoint), PREFIX + event)
    status = done.status_code
    common.output.show(done, identity=str(status), lines=[f"The receiver answered {status} to {done.event_type}."])
    return 0 if 200 <= status < 300 else 1


def rotate_secret(
    endpoint: str,
    /,
    *,
    keep_old: Annotated[bool, Parameter(env_var="ROSE_KEEP_OLD", negative="")] = False,
    common: Common = COMMON,
) -> None:
    """Sign with a new secret, and print it, this once.

    Parameters
    ----------
    endpoint
        Its id, a unique beginning of it, its name, or `last`.
    keep_old
        The old secret signs, too, for 24 hours.
    """
    body = schema.RotateWebhookSecret(keep_old_secret_active_for_24_hours=keep_old)
    with common.client() as client:
        made = client.rotate_webhook_secret(_resolve(client, endpoint), body)
    old = "The old secret signs, too, for 24 hours." if keep_old else "The old secret signs nothing any more."
    common.output.show(made, identity=made.signing_secret, lines=[made.signing_secret, KEEP_IT, old])


def _types(endings: list[Ending] | tuple[Ending, ...]) -> list[str]:
    return [PREFIX + one for one in dict.fromkeys(endings)]


def _events(endpoint: schema.WebhookEndpoint) -> str:
    return ",".join(one.removeprefix(PREFIX) for one in endpoint.event_types)


def _lines(endpoint: schema.WebhookEndpoint) -> list[str]:
    lines = [
        f"{endpoint.id}  {endpoint.name}",
        f"  url      {endpoint.url}",
        f"  events   {_events(endpoint)}",
        f"  secret   {endpoint.signing_secret_hint}",
        f"  status   {endpoint.status}",
    ]
    if endpoint.disabled_reason:
        lines += [
            f"  because  {endpoint.disabled_reason}: {endpoint.disabled_detail}",
            f"  Switch it on again: rose webhooks update {endpoint.id} --enable",
        ]
    return lines


def _resolve(client: Client, given: str) -> str:
    """Return the id of the endpoint that is meant. Raises: NotFound; InvalidRequest when several fit."""
    known = client.webhooks()
    if given == "last" and known:
        return known[0].id
    exact = [one.id for one in known if given in (one.id, one.name)]
    fitting = exact or [one.id for one in known if one.id.removeprefix("whe_").startswith(given.removeprefix("whe_"))]
    if len(fitting) > 1:
        raise InvalidRequest(
            f"{given!r} fits several webhook endpoints: {', '.join(fitting[:5])}.", code="ambiguous_id"
        )
    if not fitting:
        raise NotFound(
            f"There is no webhook endpoint {given!r}.",
            code="webhook_endpoint_not_found",
            hint="`rose webhooks list` shows the endpoints there are.",
        )
    return fitting[0]
