"""`/v1/organization/projects…`: projects, service accounts and their keys, as OpenAI's administration API has them.

Every call needs the scope admin. A service account is whose a key is; here it begins with its first key.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec
from litestar import Response
from litestar.params import FromPath

from projections import keys as keys_view
from projections import projects as projects_view
from rose.api import wire
from rose.api.asking import asked
from rose.api.body import check_values, query_choice, query_page, read_object, require_text, wrong_type
from rose.api.errors import AnyRequest
from rose.api.principal import NEEDS
from rose.api.routes import AFTER, BOOLEAN, TEXT, WHOLE, choice, delete, get, limit, optional, post, record
from rose.api.services import Services, TheServices
from rose.bus import without_password
from rose.domain.keys import SCOPES, CreateKey, KeyState, Kind, Scope, ServiceAccount
from rose.domain.projects import ArchiveProject, CreateProject, ProjectState, RenameProject
from rose.errors import InvalidRequest, InvalidState
from rose.ids import new_id
from rose.subjects import READER_API, STREAM, inbox_prefix, project_subjects
from rose.tenants import HINT_CHARACTERS, SECRET_PREFIXES, Tenants, missing_key, missing_project, new_secret

MAX_NAME = 100
MAX_LISTED = 100
LONGEST_LIFE_SECONDS = 10 * 366 * 86400
NATS_SECONDS = 5.0
"""Longest wait until NATS has taken a fresh key over."""
ADMIN = {NEEDS: "admin"}
_KEY_OPTIONS = {"name": TEXT, "scope": optional(TEXT), "expires_in_seconds": optional(WHOLE), "nats": optional(BOOLEAN)}


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """A project."""

    id: str
    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: str
    """active or archived"""


class NatsAccess(msgspec.Struct, frozen=True, kw_only=True):
    """What the holder of a key for NATS needs beside the password."""

    url: str | None
    """Address of NATS as the server knows it; null where it does not."""
    user: str
    stream: str
    consumer: str
    """The durable pull consumer that is there for this key alone."""
    api_prefix: str
    """What its client asks JetStream under, in place of `$JS.API`."""
    inbox_prefix: str
    """What its client's inboxes must begin with."""
    subjects: str
    """All it may subscribe to."""
    ready: bool
    """False when NATS has not taken the key over yet; it does so as soon as it is there."""


class AccountKey(msgspec.Struct, frozen=True, kw_only=True):
    """A fresh key, with its secret: it is shown this once."""

    id: str
    object: Literal["organization.project.service_account.api_key"] = "organization.project.service_account.api_key"
    name: str
    created_at: int
    value: str
    """The key, or the password of one for NATS."""
    expires_at: int | None
    scope: str
    """ROSE: read, write or admin."""
    kind: str
    """ROSE: api or nats."""
    nats: NatsAccess | msgspec.UnsetType = msgspec.UNSET


class Account(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whose keys are."""

    id: str
    object: str
    name: str
    created_at: int
    role: str
    api_key: AccountKey | msgspec.UnsetType = msgspec.UNSET


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose a key is."""

    type: Literal["service_account"] = "service_account"
    service_account: dict[str, Any]
    user: None = None


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key, without its secret."""

    id: str
    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    """Always null: ROSE does not write on each call."""
    expires_at: int | None
    owner: Owner
    owner_project_access: Literal["active", "inactive"] = "active"
    scope: str
    """ROSE: read, write or admin."""
    kind: str
    """ROSE: api or nats."""


# --- projects


@post("/v1/organization/projects", answer=Project, body=record(("name",), name=TEXT), opt=ADMIN)
async def create_project(request: AnyRequest, services: TheServices) -> Response[Any]:
    """Make room for another team."""
    name = _name(await read_object(request))
    asking, _ = await asked(request, services, await request.body())
    command = CreateProject(project=new_id("proj_"), at=int(time.time()), name=name)
    return _ok(_project(await Tenants(services.pool).create_project(command, asking)))


@get(
    "/v1/organization/projects",
    opt=ADMIN,
    queries=(limit(20, MAX_LISTED), AFTER, choice("include_archived", ("true", "false"), "Archived ones, too.")),
)
async def list_projects(request: AnyRequest, services: TheServices) -> wire.Listing[Project]:
    """List the projects, newest first; the default one is the oldest."""
    page = query_page(request, default=20, maximum=MAX_LISTED, clamp=True)
    check_values({"after": page.after})
    archived = query_choice(request, "include_archived", ("true", "false"), "false") == "true"
    found = await projects_view.newest_first(services.pool, limit=page.limit, after=page.after, archived=archived)
    return wire.listing([_project(state) for state in found.entries], has_more=found.has_more)


@get("/v1/organization/projects/{project_id:str}", opt=ADMIN)
async def get_project(services: TheServices, project_id: FromPath[str]) -> Project:
    """Describe a project."""
    return _project(await _existing(services, project_id))


@post("/v1/organization/projects/{project_id:str}", answer=Project, body=record(("name",), name=TEXT), opt=ADMIN)
async def rename_project(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> Response[Any]:
    """Give a project another name."""
    name = _name(await read_object(request))
    asking, _ = await asked(request, services, await request.body())
    check_values({"project_id": project_id})
    state = await Tenants(services.pool).change_project(project_id, RenameProject(name=name), asking)
    return _ok(_project(state))


@post("/v1/organization/projects/{project_id:str}/archive", answer=Project, opt=ADMIN)
async def archive_project(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> Response[Any]:
    """End a project's use: its keys open nothing any more, what it has stays."""
    asking, _ = await asked(request, services, b"")
    check_values({"project_id": project_id})
    state = await Tenants(services.pool).change_project(project_id, ArchiveProject(at=int(time.time())), asking)
    return _ok(_project(state))


# --- service accounts, each with its keys


@post(
    "/v1/organization/projects/{project_id:str}/service_accounts",
    answer=Account,
    body=record(("name",), **_KEY_OPTIONS),
    opt=ADMIN,
)
async def create_account(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> Response[Any]:
    """Create a service account with its first key; the secret is shown this once."""
    body = await read_object(request)
    if body.get("create_service_account_only"):
        raise InvalidRequest(
            "create_service_account_only is not supported: here a service account begins with its first key.",
            code="unsupported_parameter",
            param="create_service_account_only",
        )
    account = ServiceAccount(id=new_id("svc_acct_"), name=_name(body), created_at=int(time.time()))
    state, secret = await _create_key(request, services, project_id, body, account, "write")
    return _ok(
        Account(
            id=account.id,
            object="organization.project.service_account",
            name=account.name,
            created_at=account.created_at,
            role="member",
            api_key=await _fresh(services, state, secret),
        )
    )


@post(
    "/v1/organization/projects/{project_id:str}/service_accounts/{account_id:str}/api_keys",
    answer=AccountKey,
    body=record((), **_KEY_OPTIONS),
    opt=ADMIN,
)
async def create_account_key(
    request: AnyRequest, services: TheServices, project_id: FromPath[str], account_id: FromPath[str]
) -> Response[Any]:
    """Create another key of a service account; the secret is shown this once."""
    body = await read_object(request)
    known = await _keys_of(services, project_id, account_id)
    state, secret = await _create_key(request, services, project_id, body, known[0].account, known[0].scope)
    return _ok(await _fresh(services, state, secret))


@get(
    "/v1/organization/projects/{project_id:str}/service_accounts",
    opt=ADMIN,
    queries=(limit(20, MAX_LISTED), AFTER),
)
async def list_accounts(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> wire.Listing[Account]:
    """List the service accounts that have a key, newest first."""
    page = query_page(request, default=20, maximum=MAX_LISTED, clamp=True)
    check_values({"after": page.after})
    await _existing(services, project_id)
    accounts = await keys_view.accounts(services.pool, project_id, limit=page.limit, after=page.after)
    return wire.listing([_account(one) for one in accounts.entries], has_more=accounts.has_more)


@get("/v1/organization/projects/{project_id:str}/service_accounts/{account_id:str}", opt=ADMIN)
async def get_account(services: TheServices, project_id: FromPath[str], account_id: FromPath[str]) -> Account:
    """Describe a service account."""
    return _account((await _keys_of(services, project_id, account_id))[0].account)


@delete("/v1/organization/projects/{project_id:str}/service_accounts/{account_id:str}", answer=wire.Deleted, opt=ADMIN)
async def delete_account(
    request: AnyRequest, services: TheServices, project_id: FromPath[str], account_id: FromPath[str]
) -> Response[Any]:
    """Revoke all keys of a service account."""
    asking, _ = await asked(request, services, b"")
    known = await _keys_of(services, project_id, account_id)
    await Tenants(services.pool).revoke_keys(known, int(time.time()), asking)
    return _ok(wire.Deleted(id=account_id, object="organization.project.service_account.deleted"))


# --- keys


@get("/v1/organization/projects/{project_id:str}/api_keys", opt=ADMIN, queries=(limit(20, MAX_LISTED), AFTER))
async def list_keys(request: AnyRequest, services: TheServices, project_id: FromPath[str]) -> wire.Listing[ApiKey]:
    """List a project's keys that were not revoked, newest first."""
    page = query_page(request, default=20, maximum=MAX_LISTED, clamp=True)
    check_values({"after": page.after})
    await _existing(services, project_id)
    found = await keys_view.newest_first(services.pool, project_id, limit=page.limit, after=page.after)
    return wire.listing([_key(state) for state in found.entries], has_more=found.has_more)


@get("/v1/organization/projects/{project_id:str}/api_keys/{key_id:str}", opt=ADMIN)
async def get_key(services: TheServices, project_id: FromPath[str], key_id: FromPath[str]) -> ApiKey:
    """Describe a key."""
    return _key(await _existing_key(services, project_id, key_id))


@delete("/v1/organization/projects/{project_id:str}/api_keys/{key_id:str}", answer=wire.Deleted, opt=ADMIN)
async def delete_key(
    request: AnyRequest, services: TheServices, project_id: FromPath[str], key_id: FromPath[str]
) -> Response[Any]:
    """Revoke a key: from now on it opens nothing."""
    asking, _ = await asked(request, services, b"")
    state = await _existing_key(services, project_id, key_id)
    await Tenants(services.pool).revoke_keys([state], int(time.time()), asking)
    return _ok(wire.Deleted(id=key_id, object="organization.project.api_key.deleted"))


async def _create_key(
    request: AnyRequest,
    services: Services,
    project_id: str,
    body: dict[str, Any],
    account: ServiceAccount,
    default_scope: Scope,
) -> tuple[KeyState, str]:
    now = int(time.time())
    kind = _kind(body, services)
    scope = body.get("scope") or ("read" if kind == "nats" else default_scope)
    if scope not in SCOPES:
        raise InvalidRequest(f"scope must be one of {', '.join(SCOPES)}.", code="invalid_value", param="scope")
    if kind == "nats" and scope != "read":
        raise InvalidRequest(
            "A key for NATS only reads; leave scope out, or make it read.", code="invalid_value", param="scope"
        )
    life = _life(body)
    name = _name(body) if body.get("name") is not None else account.name
    project = await _existing(services, project_id)
    if project.archived_at is not None:
        raise InvalidState(f"The project {project_id} is archived.", code="project_archived", param="project_id")
    asking, _ = await asked(request, services, await request.body())
    secret = new_secret(kind)
    command = CreateKey(
        key_id=new_id("key_"),
        project=project_id,
        at=now,
        name=name,
        account=account,
        scope=scope,
        hint=secret[-HINT_CHARACTERS:],
        expires_at=None if life is None else now + life,
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


def _name(body: dict[str, Any]) -> str:
    name = require_text(body, "name", maximum=MAX_NAME).strip()
    if not name or not name.isprintable():
        raise InvalidRequest("name must have printable characters.", code="invalid_value", param="name")
    return name


def _kind(body: dict[str, Any], services: Services) -> Kind:
    """Return what a key shall open. Raises: InvalidRequest; InvalidState when ROSE cannot let anybody into NATS."""
    value = body.get("nats")
    if value is not None and not isinstance(value, bool):
        wrong_type("nats", "true or false", value)
    if not value:
        return "api"
    if services.settings.nats_readers_file is None or services.settings.nats_system_url is None:
        raise InvalidState(
            "This ROSE cannot let anybody into its NATS: it was not told where that NATS reads its users.",
            code="nats_not_managed",
            param="nats",
            hint="Set ROSE_NATS_READERS_FILE and ROSE_NATS_SYSTEM_URL, as docs/operations.md says; `rose up` does.",
        )
    return "nats"


def _life(body: dict[str, Any]) -> int | None:
    value = body.get("expires_in_seconds")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        wrong_type("expires_in_seconds", "a whole number", value)
    if not 1 <= value <= LONGEST_LIFE_SECONDS:
        raise InvalidRequest(
            f"expires_in_seconds is {value}; it must be from 1 to {LONGEST_LIFE_SECONDS}.",
            code="invalid_value",
            param="expires_in_seconds",
        )
    return value


def _project(state: ProjectState) -> Project:
    return Project(
        id=state.project,
        name=state.name,
        created_at=state.created_at,
        archived_at=state.archived_at,
        status="active" if state.archived_at is None else "archived",
    )


def _account(account: ServiceAccount) -> Account:
    return Account(
        id=account.id,
        object="organization.project.service_account",
        name=account.name,
        created_at=account.created_at,
        role="member",
    )


async def _fresh(services: Services, state: KeyState, secret: str) -> AccountKey:
    return AccountKey(
        id=state.id,
        name=state.name,
        created_at=state.created_at,
        value=secret,
        expires_at=state.expires_at,
        scope=state.scope,
        kind=state.kind,
        nats=await _nats_access(services, state) if state.kind == "nats" else msgspec.UNSET,
    )


async def _nats_access(services: Services, state: KeyState) -> NatsAccess:
    url = services.settings.nats_url
    scheme, _, place = (url or "").rpartition("://")
    return NatsAccess(
        url=None if url is None else f"{scheme or 'nats'}://{without_password(place)}",
        user=state.id,
        stream=STREAM,
        consumer=state.id,
        api_prefix=READER_API,
        inbox_prefix=inbox_prefix(state.id),
        subjects=project_subjects(state.project),
        ready=await keys_view.wait_taken(services.pool, state.id, NATS_SECONDS),
    )


def _key(state: KeyState) -> ApiKey:
    account = state.account
    return ApiKey(
        id=state.id,
        name=state.name,
        redacted_value=f"{SECRET_PREFIXES[state.kind]}…{state.hint}",
        created_at=state.created_at,
        last_used_at=None,
        expires_at=state.expires_at,
        owner=Owner(
            service_account={
                "id": account.id,
                "name": account.name,
                "created_at": account.created_at,
                "role": "member",
                "object": "organization.project.service_account",
            }
        ),
        scope=state.scope,
        kind=state.kind,
    )


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
