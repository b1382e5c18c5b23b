"""`/v1/fine_tuning/checkpoints/…/permissions`: which other projects may use a model of this one. Scope: admin."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from litestar import Response
from litestar.params import FromPath

from projections import permissions as permissions_view
from projections import projects as projects_view
from rose.api import schema, wire
from rose.api.asking import asked, stored_answer
from rose.api.decoding import read_body, read_query
from rose.api.errors import AnyRequest
from rose.api.model_names import find_tuned
from rose.api.principal import NEEDS, Principal, ThePrincipal
from rose.api.routes import delete, get, post
from rose.api.services import Services, TheServices
from rose.decoding import check_values
from rose.domain.permissions import GrantPermission, PermissionState, missing
from rose.errors import InvalidRequest
from rose.ids import new_id
from rose.missing import missing_model
from rose.permissions import Permissions

MAX_LISTED = 100
ADMIN = {NEEDS: "admin"}
PATH = "/v1/fine_tuning/checkpoints/{model:str}/permissions"


@post(PATH, answer=schema.Listing[schema.Permission], body=schema.CreatePermissions, opt=ADMIN)
async def create_permissions(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, model: FromPath[str]
) -> Response[Any]:
    """Let other projects use a model: chat with it, and train further from it."""
    body = await read_body(request, schema.CreatePermissions)
    grantees = list(dict.fromkeys(body.project_ids))
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return stored_answer(answered)
    await _require_model(services, principal, model)
    for number, grantee in enumerate(grantees):
        project = await projects_view.get(services.pool, grantee)
        if project is None or project.archived_at is not None:
            raise InvalidRequest(
                f"There is no project {grantee}.", code="project_not_found", param=f"project_ids[{number}]"
            )
        if grantee == principal.project:
            raise InvalidRequest(f"The model is {grantee}'s own.", code="invalid_value", param=f"project_ids[{number}]")
    now = int(time.time())
    commands = [
        GrantPermission(permission_id=new_id("cp_"), project=principal.project, grantee=grantee, model=model, at=now)
        for grantee in grantees
    ]
    outcome = await Permissions(services.pool).grant(commands, asking, respond=_encoded)
    return stored_answer(outcome.response) if outcome.replayed and outcome.response else _ok(_listed(outcome.states))


@get(PATH, opt=ADMIN, query=schema.PermissionsQuery)
async def list_permissions(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, model: FromPath[str]
) -> schema.Listing[schema.Permission]:
    """List the projects that may use a model."""
    query = read_query(request, schema.PermissionsQuery)
    await _require_model(services, principal, model)
    found = await permissions_view.page(
        services.pool,
        principal.project,
        model,
        limit=min(query.limit, MAX_LISTED),
        after=query.after or None,
        grantee=query.project_id or None,
        newest_first=query.order == "descending",
    )
    return wire.listing([wire.permission(state) for state in found.entries], has_more=found.has_more)


@delete(f"{PATH}/{{permission_id:str}}", answer=schema.Deleted, opt=ADMIN)
async def delete_permission(
    request: AnyRequest,
    services: TheServices,
    principal: ThePrincipal,
    model: FromPath[str],
    permission_id: FromPath[str],
) -> Response[Any]:
    """End a project's use of a model for new requests."""
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    await _require_model(services, principal, model)
    check_values({"permission_id": permission_id})
    state = await permissions_view.get(services.pool, principal.project, model, permission_id)
    if state is None:
        raise missing(permission_id)
    gone = schema.Deleted(id=permission_id, object="checkpoint.permission")
    await Permissions(services.pool).withdraw(
        permission_id, int(time.time()), asking, respond=lambda _: msgspec.json.encode(gone)
    )
    return _ok(gone)


async def _require_model(services: Services, principal: Principal, model: str) -> None:
    check_values({"model": model})
    tuned = await find_tuned(services, principal.project, model)
    if tuned is None or tuned.project != principal.project:
        raise missing_model(model)


def _listed(states: list[PermissionState]) -> schema.Listing[schema.Permission]:
    return wire.listing([wire.permission(state) for state in states], has_more=False)


def _encoded(states: list[PermissionState]) -> bytes:
    return msgspec.json.encode(_listed(states))


def _ok(content: Any) -> Response[Any]:
    return Response(content, status_code=200)


HANDLERS = (create_permissions, list_permissions, delete_permission)
