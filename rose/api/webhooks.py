"""`/v1/webhook_endpoints`: where events go, as the newest OpenAI SDKs manage it. They are sent by rose/webhooks/."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from litestar import Response
from litestar.params import FromPath

from projections import webhooks as webhooks_view
from rose.api import schema, wire
from rose.api.asking import asked, stored_answer
from rose.api.decoding import read_body, read_query
from rose.api.errors import AnyRequest
from rose.api.principal import ThePrincipal
from rose.api.routes import delete, get, post
from rose.api.services import Services, TheServices
from rose.decoding import check_values
from rose.domain.webhooks import (
    EVENT_TYPES,
    SENT_TYPES,
    CreateWebhook,
    DeleteWebhook,
    RotateSecret,
    UpdateWebhook,
    WebhookState,
)
from rose.errors import InvalidRequest, InvalidState
from rose.ids import new_id
from rose.webhooks import targets
from rose.webhooks.endpoints import Endpoints
from rose.webhooks.samples import sample
from rose.webhooks.sending import Sender
from rose.webhooks.signing import Payload, headers, hint, new_secret

MAX_LISTED = 100
PATH = "/v1/webhook_endpoints"
ONE = f"{PATH}/{{webhook_endpoint_id:str}}"


@post(PATH, answer=schema.WebhookEndpointWithSecret, body=schema.CreateWebhookEndpoint)
async def create_endpoint(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Send events to an address from now on. The secret is shown this once."""
    body = await read_body(request, schema.CreateWebhookEndpoint)
    types = _event_types(body.event_types)
    await _check_url(services, body.url)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return await _replayed(services, answered)
    secret, secret_id = new_secret(), new_id("whsecret_")
    command = CreateWebhook(
        webhook_id=new_id("whe_"),
        project=principal.project,
        at=int(time.time()),
        name=body.name,
        url=body.url,
        event_types=types,
        secret_id=secret_id,
        secret_hint=hint(secret),
    )
    outcome = await _endpoints(services).create(command, secret, asking, _encoded_with_secret)
    if outcome.replayed and outcome.response:
        return await _replayed(services, outcome.response)
    return _ok(wire.webhook_endpoint_with_secret(outcome.state, secret))


@get(PATH, query=schema.PageQuery)
async def list_endpoints(
    request: AnyRequest, services: TheServices, principal: ThePrincipal
) -> schema.Listing[schema.WebhookEndpoint]:
    """List the project's endpoints, newest first."""
    query = read_query(request, schema.PageQuery)
    found = await webhooks_view.newest_first(
        services.pool, principal.project, limit=min(query.limit, MAX_LISTED), after=query.after or None
    )
    return wire.listing([wire.webhook_endpoint(state) for state in found.entries], has_more=found.has_more)


@get(ONE)
async def get_endpoint(
    services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> schema.WebhookEndpoint:
    """Describe an endpoint."""
    return wire.webhook_endpoint(await _existing(services, principal.project, webhook_endpoint_id))


@post(ONE, answer=schema.WebhookEndpoint, body=schema.UpdateWebhookEndpoint)
async def update_endpoint(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """Change an endpoint; what is not named stays."""
    body = await read_body(request, schema.UpdateWebhookEndpoint)
    name = None if body.name is msgspec.UNSET else body.name
    types = None if body.event_types is msgspec.UNSET else _event_types(body.event_types)
    state = await _existing(services, principal.project, webhook_endpoint_id)
    url = None if body.url is msgspec.UNSET else body.url
    if url not in (None, state.url):
        await _check_url(services, url)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return stored_answer(answered)
    command = UpdateWebhook(
        at=int(time.time()),
        name=name,
        url=url,
        event_types=types,
        enabled=None if body.status is msgspec.UNSET else body.status == "enabled",
    )
    outcome = await _endpoints(services).change(principal.project, state.id, command, asking, _encoded)
    return (
        stored_answer(outcome.response)
        if outcome.replayed and outcome.response
        else _ok(wire.webhook_endpoint(outcome.state))
    )


@delete(ONE, answer=schema.Deleted)
async def delete_endpoint(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """End an endpoint; nothing more is sent to it, nor what waits."""
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    state = await _existing(services, principal.project, webhook_endpoint_id)
    gone = schema.Deleted(id=state.id, object="webhook_endpoint.deleted")
    command = DeleteWebhook(at=int(time.time()))
    await _endpoints(services).change(principal.project, state.id, command, asking, lambda _: msgspec.json.encode(gone))
    return _ok(gone)


@post(
    f"{ONE}/rotate_secret",
    answer=schema.WebhookEndpointWithSecret,
    body=schema.RotateWebhookSecret,
    optional_body=True,
)
async def rotate_secret(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """Sign with another secret, which is shown this once; the old one ends at once, or signs, too, for 24 hours."""
    body = await read_body(request, schema.RotateWebhookSecret, empty_allowed=True)
    state = await _existing(services, principal.project, webhook_endpoint_id)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return await _replayed(services, answered)
    secret = new_secret()
    command = RotateSecret(
        at=int(time.time()),
        secret_id=new_id("whsecret_"),
        secret_hint=hint(secret),
        keep_old=body.keep_old_secret_active_for_24_hours,
    )
    outcome = await _endpoints(services).rotate_secret(
        principal.project, state.id, command, secret, asking, _encoded_with_secret
    )
    if outcome.replayed and outcome.response:
        return await _replayed(services, outcome.response)
    return _ok(wire.webhook_endpoint_with_secret(outcome.state, secret))


@post(f"{ONE}/test", answer=schema.WebhookTestResult, body=schema.TestWebhookEndpoint)
async def test_endpoint(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """Send a made-up event now, also to an endpoint that is switched off, and tell what the receiver answers."""
    body = await read_body(request, schema.TestWebhookEndpoint)
    [event_type] = _event_types([body.event_type], "event_type")
    state = await _existing(services, principal.project, webhook_endpoint_id)
    now = int(time.time())
    signing = await webhooks_view.secrets(services.pool, [secret.id for secret in state.signing(now)])
    name = new_id("evt_")
    payload = msgspec.json.encode(Payload(id=name, created_at=now, type=event_type, data=sample(event_type)))
    async with Sender(private=services.settings.webhook_private_targets) as sender:
        answer = await sender.send(state.url, headers(name, payload, signing, now), payload)
    if answer.status is None:
        raise InvalidRequest(
            f"The event could not be delivered to {state.url}: {answer.error}.", code="webhook_not_delivered"
        )
    return _ok(schema.WebhookTestResult(event_type=event_type, status_code=answer.status, webhook_endpoint_id=state.id))


@get("/v1/webhook_event_types")
async def list_event_types() -> schema.WebhookEventTypes:
    """List the events that are sent. An endpoint can ask for OpenAI's others, too; they do not happen here."""
    return schema.WebhookEventTypes(data=SENT_TYPES)


def _endpoints(services: Services) -> Endpoints:
    return Endpoints(services.pool, services.commands)


async def _existing(services: Services, project: str, webhook_id: str) -> WebhookState:
    check_values({"webhook_endpoint_id": webhook_id})
    return await _endpoints(services).get(project, webhook_id)


async def _check_url(services: Services, url: str) -> None:
    private = services.settings.webhook_private_targets
    parsed = targets.parse(url, private=private)
    if not private:
        await targets.addresses(parsed, private=False)


def _event_types(given: list[str], field: str = "event_types") -> tuple[str, ...]:
    for index, one in enumerate(given):
        if one not in EVENT_TYPES:
            name = f"{field}[{index}]" if field == "event_types" else field
            raise _wrong(name, f"is {one[:60]!r}; it must be one of {', '.join(EVENT_TYPES)}")
    return tuple(dict.fromkeys(given))


def _wrong(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {what}.", code="invalid_value", param=param)


def _encoded(state: WebhookState) -> bytes:
    return msgspec.json.encode(wire.webhook_endpoint(state))


def _encoded_with_secret(state: WebhookState) -> bytes:
    """What is stored with the command: the id of the secret in its place, as no secret outlives its use."""
    return msgspec.json.encode(wire.webhook_endpoint_with_secret(state, state.secrets[0].id))


async def _replayed(services: Services, stored: bytes) -> Response[Any]:
    """Give an answer again that told a secret. Raises: InvalidState when the secret is not kept any more."""
    answer = msgspec.json.decode(stored, type=schema.WebhookEndpointWithSecret)
    found = await webhooks_view.secrets(services.pool, [answer.signing_secret])
    if not found:
        raise InvalidState(
            f"This request was answered before, and its secret of {answer.id} is not in use any more.",
            code="secret_gone",
            hint="Rotate the secret to get another one.",
        )
    return stored_answer(msgspec.json.encode(msgspec.structs.replace(answer, signing_secret=found[0])))


def _ok(content: Any) -> Response[Any]:
    return Response(content, status_code=200)


HANDLERS = (
    create_endpoint,
    list_endpoints,
    get_endpoint,
    update_endpoint,
    delete_endpoint,
    rotate_secret,
    test_endpoint,
    list_event_types,
)
