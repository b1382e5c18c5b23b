"""`rose projects …` and `rose keys …`: for whoever administers a ROSE that several teams share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cli.options import COMMON, Common
from cli.output import moment
from rose.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from cli.client import Client

DEFAULT = "default"
DAY_SECONDS = 86400


def create_project(name: str, /, *, common: Common = COMMON) -> None:
    """Create a project, for a team that shall see nothing of the others.

    Parameters
    ----------
    name
        What people call it.
    """
    with common.client() as client:
        made = client.organization("POST", "/projects", {"name": name})
    lines = [
        f"Project created: {made['id']} ({made['name']})",
        f"Make a key for it: rose keys create NAME --project {made['id']}",
    ]
    common.output.show(made, identity=made["id"], lines=lines)


def list_projects(
    *, archived: Annotated[bool, Parameter(env_var="ROSE_ARCHIVED", negative="")] = False, common: Common = COMMON
) -> None:
    """List projects, newest first.

    Parameters
    ----------
    archived
        Archived ones, too.
    """
    with common.client() as client:
        found = _projects(client, archived=archived)
    rows = [(one["id"], one["name"], one["status"], moment(one["created_at"])) for one in found]
    common.output.table(("project", "name", "status", "created"), rows, things=found, empty="No projects.")


def archive_project(project: str, /, *, common: Common = COMMON) -> None:
    """End a project's use: its keys open nothing any more, and nothing of it is deleted.

    Parameters
    ----------
    project
        Its id or its name.
    """
    with common.client() as client:
        gone = client.organization("POST", f"/projects/{_project(client, project)}/archive")
    common.output.show(gone, identity=gone["id"], lines=[f"Project archived: {gone['id']} ({gone['name']})"])


def create_key(
    name: str,
    /,
    *,
    project: Annotated[str, Parameter(env_var="ROSE_PROJECT")] = DEFAULT,
    scope: Annotated[Literal["read", "write", "admin"] | None, Parameter(env_var="ROSE_SCOPE")] = None,
    nats: Annotated[bool, Parameter(env_var="ROSE_NATS", negative="")] = False,
    days: Annotated[int | None, Parameter(env_var="ROSE_DAYS")] = None,
    common: Common = COMMON,
) -> None:
    """Create an API key, or user and password for NATS, and print it, this once.

    Parameters
    ----------
    name
        Whose or what it is for.
    project
        Id or name of the project that it works in.
    scope
        read: look and chat. write (the default): also upload, train, delete. admin: also projects and keys, of all
        projects.
    nats
        It reads the project's events in NATS, and opens nothing of the API.
    days
        After how many days it opens nothing any more; default: never.
    """
    body: dict[str, Any] = {"name": name}
    if scope is not None or not nats:
        body["scope"] = scope or "write"
    if nats:
        body["nats"] = True
    if days is not None:
        body["expires_in_seconds"] = days * DAY_SECONDS
    with common.client() as client:
        made = client.organization("POST", f"/projects/{_project(client, project)}/service_accounts", body)
    key = made["api_key"]
    if nats:
        lines = _nats_lines(key, project)
    else:
        lines = [
            f"Key created: {key['id']} ({key['scope']}, project {project})",
            key["value"],
            "Keep it: it is not shown again. The command line reads it from ROSE_API_KEY, the SDKs from "
            "OPENAI_API_KEY.",
        ]
    common.output.show(made, identity=key["value"], lines=lines)


def list_keys(
    *, project: Annotated[str | None, Parameter(env_var="ROSE_PROJECT")] = None, common: Common = COMMON
) -> None:
    """List the keys in use, newest first.

    Parameters
    ----------
    project
        Id or name of a project; default: all.
    """
    with common.client() as client:
        projects = [_project(client, project)] if project else [one["id"] for one in _projects(client, archived=False)]
        found = [(one, key) for one in projects for key in client.organization_list(f"/projects/{one}/api_keys")]
    rows = [
        (
            key["id"],
            key["name"],
            one,
            key["scope"],
            key["kind"],
            key["redacted_value"],
            moment(key["created_at"]),
            moment(key["expires_at"]) if key["expires_at"] else "",
        )
        for one, key in found
    ]
    headings = ("key", "name", "project", "scope", "opens", "value", "created", "expires")
    empty = "There is no key: whoever sits at the server's machine may do everything."
    common.output.table(headings, rows, things=[key for _, key in found], empty=empty)


def revoke_key(key: str, /, *, common: Common = COMMON) -> None:
    """End a key's use at once.

    Parameters
    ----------
    key
        Its id, as `rose keys list` shows it.
    """
    with common.client() as client:
        for one in _projects(client, archived=True):
            if any(known["id"] == key for known in client.organization_list(f"/projects/{one['id']}/api_keys")):
                gone = client.organization("DELETE", f"/projects/{one['id']}/api_keys/{key}")
                break
        else:
            raise NotFound(f"There is no API key {key}.", hint="`rose keys list` shows the keys there are.")
    common.output.show(gone, identity=key, lines=[f"Key revoked: {key}"])


def _nats_lines(key: dict[str, Any], project: str) -> list[str]:
    access = key["nats"]
    lines = [
        f"Key created: {key['id']} (NATS, project {project})",
        f"NATS_URL={access['url'] or 'nats://…'}",
        f"NATS_USER={access['user']}",
        f"NATS_PASSWORD={key['value']}",
        f"It reads {access['subjects']} through the consumer {access['consumer']} of {access['stream']}.",
        "Keep the password: it is not shown again. docs/subjects.md has a program that reads with it.",
    ]
    if not access["ready"]:
        lines.append("NATS does not know the key yet: it will once it is there and ROSE's projections run.")
    return lines


def _projects(client: Client, *, archived: bool) -> list[dict[str, Any]]:
    return client.organization_list("/projects", include_archived="true" if archived else "false")


def _project(client: Client, given: str) -> str:
    """Return the id of the project that is meant. Raises: NotFound; InvalidRequest when several have that name."""
    found = [one["id"] for one in _projects(client, archived=True) if given in (one["id"], one["name"])]
    if len(found) > 1:
        raise InvalidRequest(f"Several projects are called {given!r}: {', '.join(found)}.", code="ambiguous_name")
    if not found:
        raise NotFound(f"There is no project {given!r}.", hint="`rose projects list` shows the projects there are.")
    return found[0]
