"""`/v1/organization/projects…`: projects, service accounts and their keys, as OpenAI's administration API has them.

Every call needs the scope admin. A service account is whose a key is; here it begins with its first key.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from litestar import Response
from litestar.params import FromPath

from projections import keys as keys_view
from projections import projects as projects_view
from rose.api import schema, wire
from rose.api.asking import asked, stored_answer
from rose.api.decoding import read_body, read_query
from rose.api.errors import AnyRequest
from rose.api.principal import NEEDS
from rose.api.routes import delete, get, post
from rose.api.services import Services, TheServices
from rose.decoding import check_values
from rose.domain.keys import CreateKey, KeyState, Scope, ServiceAccount
from rose.domain.projects import ArchiveProject, CreateProject, ProjectState, RenameProject
from rose.errors import InvalidRequest, InvalidState
from rose.ids import new_id
from rose.tenants import HINT_CHARACTERS, Tenants, missing_key, missing_project, new_secret

MAX_LISTED = 100
ADMIN = {NEEDS: "admin"}


# --- projects


@post("/v1/organization/projects", answer=schema.Project, body=schema.NameProject, opt=ADMIN)
async def create_project(request: AnyRequest, services: TheServices) -> Response[Any]:
    """Make room for another team."""
    name = _printable((await read_body(request, schema.NameProject)).name)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return stored_answer(answered)
    command = CreateProject(project=new_id("proj_"), at=int(time.time()), name=name)
    outcome = await Tenants(services.pool).create_project(
        command, asking, lambda state: msgspec.json.encode(wire.project(state))
    )
    return (
        stored_answer(outcome.response) if outcome.replayed and outcome.response else _ok(wire.project(outcome.state))
    )


@get("/v1/organization/projects", opt=ADMIN, query=schema.ProjectsQuery)
async def list_projects(request: AnyRequest, services: TheServices) -> schema.Listing[schema.Project]:
    """List the projects, newest first; the default one is the oldest."""
    query = read_query(request, schema.ProjectsQuery)
    archived = query.include_archived == "true"
    found = await projects_view.newest_first(
        services.pool, limit=min(query.limit, MAX_LISTED), after=query.after or None, archived=archived
    )
    return wire.listing([wire.project(state) for state in found.entries], has_more=found.has_more)


@get("/v1/organization/projects/{project_id:str}", opt=ADMIN)
async def get_project(services: TheServices, project_id: FromPath[str]) -> schema.Project:
    """Describe a project."""
    return wire.project(await _existing(services, project_id))


@post("/v1/organization/projects/{project_id:str}", answer=schema.Project, body=schema.NameProject, opt=ADMIN)
async def rename_project(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> Response[Any]:
    """Give a project another name."""
    name = _printable((await read_body(request, schema.NameProject)).name)
    asking, _ = await asked(request, services, await request.body())
    check_values({"project_id": project_id})
    state = await Tenants(services.pool).change_project(project_id, RenameProject(name=name), asking)
    return _ok(wire.project(state))


@post("/v1/organization/projects/{project_id:str}/archive", answer=schema.Project, opt=ADMIN)
async def archive_project(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> Response[Any]:
    """End a project's use: its keys open nothing any more, what it has stays."""
    asking, _ = await asked(request, services, b"")
    check_values({"project_id": project_id})
    state = await Tenants(services.pool).change_project(project_id, ArchiveProject(at=int(time.time())), asking)
    return _ok(wire.project(state))


# --- service accounts, each with its keys


@post(
    "/v1/organization/projects/{project_id:str}/service_accounts",
    answer=schema.ServiceAccount,
    body=schema.CreateServiceAccount,
    opt=ADMIN,
)
async def create_account(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> Response[Any]:
    """Create a service account with its first key; the secret is shown this once."""
    body = await read_body(request, schema.CreateServiceAccount)
    if body.create_service_account_only:
        raise InvalidRequest(
            "create_service_account_only is not supported: here a service account begins with its first key.",
            code="unsupported_parameter",
            param="create_service_account_only",
        )
    account = ServiceAccount(id=new_id("svc_acct_"), name=_printable(body.name), created_at=int(time.time()))
    state, secret = await _create_key(request, services, project_id, body, account, "write")
    made = wire.service_account(account)
    return _ok(msgspec.structs.replace(made, api_key=wire.fresh_key(state, secret)))


@post(
    "/v1/organization/projects/{project_id:str}/service_accounts/{account_id:str}/api_keys",
    answer=schema.ServiceAccountKey,
    body=schema.CreateKey,
    opt=ADMIN,
)
async def create_account_key(
    request: AnyRequest, services: TheServices, project_id: FromPath[str], account_id: FromPath[str]
) -> Response[Any]:
    """Create another key of a service account; the secret is shown this once."""
    body = await read_body(request, schema.CreateKey)
    known = await _keys_of(services, project_id, account_id)
    state, secret = await _create_key(request, services, project_id, body, known[0].account, known[0].scope)
    return _ok(wire.fresh_key(state, secret))


@get(
    "/v1/organization/projects/{project_id:str}/service_accounts",
    opt=ADMIN,
    query=schema.PageQuery,
)
async def list_accounts(
    request: AnyRequest, services: TheServices, project_id: FromPath[str]
) -> schema.Listing[schema.ServiceAccount]:
    """List the service accounts that have a key, newest first."""
    query = read_query(request, schema.PageQuery)
    await _existing(services, project_id)
    accounts = await keys_view.accounts(
        services.pool, project_id, limit=min(query.limit, MAX_LISTED), after=query.after or None
    )
    return wire.listing([wire.service_account(one) for one in accounts.entries], has_more=accounts.has_more)


@get("/v1/organization/projects/{project_id:str}/service_accounts/{account_id:str}", opt=ADMIN)
async def get_account(
    services: TheServices, project_id: FromPath[str], account_id: FromPath[str]
) -> schema.ServiceAccount:
    """Describe a service account."""
    return wire.service_account((await _keys_of(services, project_id, account_id))[0].account)


@delete(
    "/v1/organization/projects/{project_id:str}/service_accounts/{account_id:str}", answer=schema.Deleted, opt=ADMIN
)
async def delete_account(
    request: AnyRequest, services: TheServices, project_id: FromPath[str], account_id: FromPath[str]
) -> Response[Any]:
    """Revoke all keys of a service account."""
    asking, _ = await asked(request, services, b"")
    known = await _keys_of(services, project_id, account_id)
    await Tenants(services.pool).revoke_keys(known, int(time.time()), asking)
    return _ok(schema.Deleted(id=account_id, object="organization.project.service_account.deleted"))


# --- keys


@get("/v1/organization/projects/{project_id:str}/api_keys", opt=ADMIN, query=schema.PageQuery)
async def list_keys(
    request: AnyRequest, services: TheServices, project_id: FromPath[str]
) -> schema.Listing[schema.ApiKey]:
    """List a project's keys that were not revoked, newest first."""
    query = read_query(request, schema.PageQuery)
    await _existing(services, project_id)
    found = await keys_view.newest_first(
        services.pool, project_id, limit=min(query.limit, MAX_LISTED), after=query.after or None
    )
    return wire.listing([wire.key(state) for state in found.entries], has_more=found.has_more)


@get("/v1/organization/projects/{project_id:str}/api_keys/{key_id:str}", opt=ADMIN)
async def get_key(services: TheServices, project_id: FromPath[str], key_id: FromPath[str]) -> schema.ApiKey:
    """Describe a key."""
    return wire.key(await _existing_key(services, project_id, key_id))


@delete("/v1/organization/projects/{project_id:str}/api_keys/{key_id:str}", answer=schema.Deleted, opt=ADMIN)
async def delete_key(
    request: AnyRequest, services: TheServices, project_id: FromPath[str], key_id: FromPath[str]
) -> Response[Any]:
    """Revoke a key: from now on it opens nothing."""
    asking, _ = await asked(request, services, b"")
    state = await _existing_key(services, project_id, key_id)
    await Tenants(services.pool).revoke_keys([state], int(time.time()), asking)
    return _ok(schema.Deleted(id=key_id, object="organization.project.api_key.deleted"))


async def _create_key(
    request: AnyRequest,
    services: Services,
    project_id: str,
    body: schema.CreateKey | schema.CreateServiceAccount,
    account: ServiceAccount,
    default_scope: Scope,
) -> tuple[KeyState, str]:
    now = int(time.time())
    name = account.name if body.name is None else _printable(body.name)
    project = await _existing(services, project_id)
    if project.archived_at is not None:
        raise InvalidState(f"The project {project_id} is archived.", code="project_archived", param="project_id")
    asking, _ = await asked(request, services, await request.body())
    kind = body.kind or "api"
    if kind == "nats" and body.scope not in (None, "read"):
        raise InvalidRequest(
            f"scope is {body.scope!r}; a key of the kind nats has the scope read.", code="invalid_value", param="scope"
        )
    secret = new_secret(kind)
    command = CreateKey(
        key_id=new_id("key_"),
        project=project_id,
        at=now,
        name=name,
        account=account,
        scope="read" if kind == "nats" else body.scope or default_scope,
        hint=secret[-HINT_CHARACTERS:],
        expires_at=None if body.expires_in_seconds is None else now + body.expires_in_seconds,
        kind=kind,
    )
    return await Tenants(services.pool).create_key(command, secret, asking), secret


async def _existing(services: Services, project_id: str) -> ProjectState:
    check_values({"project_id": project_id})
    found = await projects_view.get(services.pool, project_id)
    if found is None:
        raise missing_project(project_id)
    return found


async def _existing_key(services: Services, project_id: str, key_id: str) -> KeyState:
    await _existing(services, project_id)
    check_values({"key_id": key_id})
    found = await keys_view.get(services.pool, project_id, key_id)
    if found is None:
        raise missing_key(key_id)
    return found


async def _keys_of(services: Services, project_id: str, account_id: str) -> list[KeyState]:
    """Return all keys of a service account, newest first. Raises: NotFound when it has none."""
    await _existing(services, project_id)
    check_values({"service_account_id": account_id})
    found = await keys_view.newest_first(services.pool, project_id, limit=1000, account=account_id)
    if not found.entries:
        raise missing_key(account_id)
    return found.entries


def _printable(name: str) -> str:
    if not name.strip() or not name.strip().isprintable():
        raise InvalidRequest("name must have printable characters.", code="invalid_value", param="name")
    return name.strip()


def _ok(content: Any) -> Response[Any]:
    return Response(content, status_code=200)


HANDLERS = (
    create_project,
    list_projects,
    get_project,
    rename_project,
    archive_project,
    create_account,
    create_account_key,
    list_accounts,
    get_account,
    delete_account,
    list_keys,
    get_key,
    delete_key,
)
