"""`/v1/webhook_endpoints`: where events go, as the newest OpenAI SDKs manage it. They are sent by rose/webhooks/."""

from __future__ import annotations

import re
import time
from typing import Any, Literal, TypeVar

import msgspec
from litestar import Response
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import FromPath

from projections import webhooks as webhooks_view
from rose.api import wire
from rose.api.asking import asked, stored_answer
from rose.api.body import check_values, query_page, read_object
from rose.api.errors import AnyRequest
from rose.api.principal import ThePrincipal
from rose.api.routes import AFTER, BOOLEAN, TEXT, delete, get, limit, listing, post, record
from rose.api.services import Services, TheServices
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

MAX_NAME = 256
MAX_LISTED = 100
PATH = "/v1/webhook_endpoints"
ONE = f"{PATH}/{{webhook_endpoint_id:str}}"
EVENT_TYPE = Schema(type=OpenAPIType.STRING, enum=list(EVENT_TYPES))
STATUS = Schema(type=OpenAPIType.STRING, enum=["enabled", "disabled"])

Body = TypeVar("Body")
_NAMES = {
    "str": "a string",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


class CreateBody(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint shall be."""

    event_types: list[str]
    name: str
    url: str


class UpdateBody(msgspec.Struct, frozen=True, kw_only=True):
    """What shall be different."""

    event_types: list[str] | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    url: str | msgspec.UnsetType = msgspec.UNSET
    status: str | msgspec.UnsetType = msgspec.UNSET
    """ROSE: enabled or disabled."""


class RotateBody(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the old secret."""

    keep_old_secret_active_for_24_hours: bool = False


class TestBody(msgspec.Struct, frozen=True, kw_only=True):
    """Which event to make up."""

    event_type: str


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where events go."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    """Last change of the configuration or the secret."""
    event_types: tuple[str, ...]
    name: str
    url: str
    signing_secret_hint: str
    status: Literal["enabled", "disabled"]
    """ROSE: to a disabled one nothing is sent; an update with the status enabled or another address ends that."""
    disabled_reason: str | None
    """ROSE: requested, gone (the receiver answered 410) or failing (nothing arrived for three days)."""
    disabled_detail: str | None
    """ROSE: what happened."""


class EndpointWithSecret(Endpoint, frozen=True, kw_only=True):
    """The same, with the secret: it is shown this once."""

    signing_secret: str


class TestResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver answered."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    event_type: str
    status_code: int
    success: Literal[True] = True
    """That there was an answer, whatever its status."""
    webhook_endpoint_id: str


class EventTypes(msgspec.Struct, frozen=True, kw_only=True):
    """Events that ROSE sends."""

    object: Literal["list"] = "list"
    data: tuple[str, ...]


@post(
    PATH,
    answer=EndpointWithSecret,
    body=record(("event_types", "name", "url"), event_types=listing(EVENT_TYPE), name=TEXT, url=TEXT),
)
async def create_endpoint(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Send events to an address from now on. The secret is shown this once."""
    body = await _read(request, CreateBody)
    name, types = _name(body.name), _event_types(body.event_types)
    await _check_url(services, body.url)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return await _replayed(services, answered)
    secret, secret_id = new_secret(), new_id("whsecret_")
    command = CreateWebhook(
        webhook_id=new_id("whe_"),
        project=principal.project,
        at=int(time.time()),
        name=name,
        url=body.url,
        event_types=types,
        secret_id=secret_id,
        secret_hint=hint(secret),
    )
    outcome = await _endpoints(services).create(command, secret, asking, _encoded_with_secret)
    if outcome.replayed and outcome.response:
        return await _replayed(services, outcome.response)
    return _ok(_with_secret(outcome.state, secret))


@get(PATH, queries=(limit(20, MAX_LISTED), AFTER))
async def list_endpoints(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> wire.Listing[Endpoint]:
    """List the project's endpoints, newest first."""
    page = query_page(request, default=20, maximum=MAX_LISTED, clamp=True)
    check_values({"after": page.after})
    found = await webhooks_view.newest_first(services.pool, principal.project, limit=page.limit, after=page.after)
    return wire.listing([_endpoint(state) for state in found.entries], has_more=found.has_more)


@get(ONE)
async def get_endpoint(services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]) -> Endpoint:
    """Describe an endpoint."""
    return _endpoint(await _existing(services, principal.project, webhook_endpoint_id))


@post(ONE, answer=Endpoint, body=record((), event_types=listing(EVENT_TYPE), name=TEXT, url=TEXT, status=STATUS))
async def update_endpoint(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """Change an endpoint; what is not named stays."""
    body = await _read(request, UpdateBody)
    if body.status is not msgspec.UNSET and body.status not in ("enabled", "disabled"):
        raise _wrong("status", f"is {body.status[:40]!r}; it must be enabled or disabled")
    name = None if body.name is msgspec.UNSET else _name(body.name)
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
    return stored_answer(outcome.response) if outcome.replayed and outcome.response else _ok(_endpoint(outcome.state))


@delete(ONE, answer=wire.Deleted)
async def delete_endpoint(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """End an endpoint; nothing more is sent to it, nor what waits."""
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    state = await _existing(services, principal.project, webhook_endpoint_id)
    gone = wire.Deleted(id=state.id, object="webhook_endpoint.deleted")
    command = DeleteWebhook(at=int(time.time()))
    await _endpoints(services).change(principal.project, state.id, command, asking, lambda _: msgspec.json.encode(gone))
    return _ok(gone)


@post(
    f"{ONE}/rotate_secret",
    answer=EndpointWithSecret,
    body=record((), keep_old_secret_active_for_24_hours=BOOLEAN),
)
async def rotate_secret(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """Sign with another secret, which is shown this once; the old one ends at once, or signs, too, for 24 hours."""
    body = await _read(request, RotateBody) if await request.body() else RotateBody()
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
    return _ok(_with_secret(outcome.state, secret))


@post(f"{ONE}/test", answer=TestResult, body=record(("event_type",), event_type=EVENT_TYPE))
async def test_endpoint(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, webhook_endpoint_id: FromPath[str]
) -> Response[Any]:
    """Send a made-up event now, also to an endpoint that is switched off, and tell what the receiver answers."""
    body = await _read(request, TestBody)
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
    return _ok(TestResult(event_type=event_type, status_code=answer.status, webhook_endpoint_id=state.id))


@get("/v1/webhook_event_types")
async def list_event_types() -> EventTypes:
    """List the events that are sent. An endpoint can ask for OpenAI's others, too; they do not happen here."""
    return EventTypes(data=SENT_TYPES)


def _endpoints(services: Services) -> Endpoints:
    return Endpoints(services.pool, services.commands)


async def _existing(services: Services, project: str, webhook_id: str) -> WebhookState:
    check_values({"webhook_endpoint_id": webhook_id})
    return await _endpoints(services).get(project, webhook_id)


async def _read(request: AnyRequest, kind: type[Body]) -> Body:
    """Return the request's JSON as `kind`. Raises: InvalidRequest naming the field that does not fit."""
    given = await read_object(request)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        missing = re.match(r"Object missing required field `(\w+)`", str(error))
        if missing:
            name = missing[1]
            text = f"Missing required parameter: {name}."
            raise InvalidRequest(text, code="missing_required_parameter", param=name) from None
        found = re.match(r"Expected `(\w+)[^`]*`, got `(\w+)` - at `\$\.([^`]+)`", str(error))
        if found is None:
            raise InvalidRequest(f"The request body is not right: {error}.", code="invalid_type") from None
        expected, got, name = (_NAMES.get(found[1], found[1]), _NAMES.get(found[2], found[2]), found[3])
        raise InvalidRequest(f"{name} must be {expected}; it is {got}.", code="invalid_type", param=name) from None


async def _check_url(services: Services, url: str) -> None:
    private = services.settings.webhook_private_targets
    parsed = targets.parse(url, private=private)
    if not private:
        await targets.addresses(parsed, private=False)


def _name(name: str) -> str:
    if not 0 < len(name) <= MAX_NAME:
        raise _wrong("name", f"must have 1 to {MAX_NAME} characters; it has {len(name)}")
    return name


def _event_types(given: list[str], field: str = "event_types") -> tuple[str, ...]:
    if not given:
        raise _wrong(field, "is empty; name at least one event type")
    for index, one in enumerate(given):
        if one not in EVENT_TYPES:
            name = f"{field}[{index}]" if field == "event_types" else field
            raise _wrong(name, f"is {one[:60]!r}; it must be one of {', '.join(EVENT_TYPES)}")
    return tuple(dict.fromkeys(given))


def _wrong(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {what}.", code="invalid_value", param=param)


def _endpoint(state: WebhookState) -> Endpoint:
    return Endpoint(**_fields(state))


def _with_secret(state: WebhookState, secret: str) -> EndpointWithSecret:
    return EndpointWithSecret(**_fields(state), signing_secret=secret)


def _fields(state: WebhookState) -> dict[str, Any]:
    off = state.disabled
    return {
        "id": state.id,
        "created_at": state.created_at,
        "updated_at": state.updated_at,
        "event_types": state.event_types,
        "name": state.name,
        "url": state.url,
        "signing_secret_hint": state.secrets[0].hint,
        "status": "enabled" if off is None else "disabled",
        "disabled_reason": None if off is None else off.reason,
        "disabled_detail": None if off is None else off.detail,
    }


def _encoded(state: WebhookState) -> bytes:
    return msgspec.json.encode(_endpoint(state))


def _encoded_with_secret(state: WebhookState) -> bytes:
    """What is stored with the command: the id of the secret in its place, as no secret outlives its use."""
    return msgspec.json.encode(_with_secret(state, state.secrets[0].id))


async def _replayed(services: Services, stored: bytes) -> Response[Any]:
    """Give an answer again that told a secret. Raises: InvalidState when the secret is not kept any more."""
    answer = msgspec.json.decode(stored, type=EndpointWithSecret)
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
