"""`rose projects …` and `rose keys …`: for whoever administers a ROSE that several teams share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import Parameter

from cli.options import COMMON, Common
from cli.output import duration, moment, size
from rose.api import schema
from rose.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from cli.client import Client

DEFAULT = "default"
DAY_SECONDS = 86400
UNFINISHED = ("validating_files", "queued", "running", "paused")


def create_project(name: str, /, *, common: Common = COMMON) -> None:
    """Create a project, for a team that shall see nothing of the others.

    Parameters
    ----------
    name
        What people call it.
    """
    with common.client() as client:
        made = client.create_project(name)
    lines = [
        f"Project created: {made.id} ({made.name})",
        f"Make a key for it: rose keys create NAME --project {made.id}",
    ]
    common.output.show(made, identity=made.id, lines=lines)


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
        found = client.projects(archived=archived)
    rows = [(one.id, one.name, one.status, moment(one.created_at)) for one in found]
    common.output.table(("project", "name", "status", "created"), rows, things=found, empty="No projects.")


def archive_project(project: str, /, *, common: Common = COMMON) -> None:
    """End a project's use: its keys open nothing any more, and nothing of it is deleted.

    Parameters
    ----------
    project
        Its id or its name.
    """
    with common.client() as client:
        gone = client.archive_project(_project(client, project))
    common.output.show(gone, identity=gone.id, lines=[f"Project archived: {gone.id} ({gone.name})"])


def show_usage(project: str = "current", /, *, common: Common = COMMON) -> None:
    """Show what a project has done and what it stores, and its limits.

    Parameters
    ----------
    project
        Its id or its name; default: the project that the key works in.
    """
    with common.client() as client:
        used = client.project_usage(_meant(client, project))
    jobs, stored, answered, limits = used.jobs, used.stored_bytes, used.completions, used.limits
    states = ", ".join(f"{count} {status}" for status, count in jobs.items() if count) or "none"
    lines = [
        f"Project          {used.project_id}",
        f"Jobs             {states}",
        f"Unfinished jobs  {sum(jobs[status] for status in UNFINISHED)}{_of(limits.unfinished_jobs, str)}",
        f"Trained          {used.trained_tokens} tokens in {duration(used.training_seconds)}",
        f"Stored           {size(stored.total)}{_of(limits.stored_bytes, size)} (files {size(stored.files)}, "
        f"uploads {size(stored.uploads)}, models {size(stored.models)})",
        f"Answered         {answered.num_model_requests} requests: {answered.input_tokens} tokens in, "
        f"{answered.output_tokens} out",
    ]
    rates = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
    lines += [f"Limit            {rate} {what} per minute" for what, rate in rates.items() if rate is not None]
    common.output.show(used, identity=used.project_id, lines=lines)


def _of(limit: int | None, shown: Callable[[int], str]) -> str:
    return "" if limit is None else f" of {shown(limit)}"


def create_key(
    name: str,
    /,
    *,
    project: Annotated[str, Parameter(env_var="ROSE_PROJECT")] = DEFAULT,
    scope: Annotated[Literal["read", "write", "admin"], Parameter(env_var="ROSE_SCOPE")] = "write",
    days: Annotated[int | None, Parameter(env_var="ROSE_DAYS")] = None,
    nats: Annotated[bool, Parameter(env_var="ROSE_NATS", negative="")] = False,
    common: Common = COMMON,
) -> None:
    """Create an API key and print it, this once; or, with --nats, a name and password for the project's events.

    Parameters
    ----------
    name
        Whose or what it is for.
    project
        Id or name of the project that it works in.
    scope
        read: look and chat. write: also upload, train, delete. admin: also projects and keys, of all projects.
    days
        After how many days it opens nothing any more; default: never.
    nats
        A key that reads the project's events on NATS, and opens nothing else; it has no scope.
    """
    seconds = None if days is None else days * DAY_SECONDS
    body = schema.CreateServiceAccount(
        name=name, scope=None if nats else scope, expires_in_seconds=seconds, kind="nats" if nats else "api"
    )
    with common.client() as client:
        made = client.create_service_account(_project(client, project), body)
    key = made.api_key
    assert key is not msgspec.UNSET, "an account comes with its first key"
    opens = "events on NATS" if nats else scope
    use = "The command line reads it from ROSE_API_KEY, the SDKs from OPENAI_API_KEY."
    if nats:
        use = f"It is the password of the user {key.id}, whose consumer in ROSE_EVENTS has that name: docs/subjects.md."
    lines = [
        f"Key created: {key.id} ({opens}, project {project})",
        key.value,
        f"Keep it: it is not shown again. {use}",
    ]
    common.output.show(made, identity=key.value, lines=lines)


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
        projects = [_project(client, project)] if project else [one.id for one in client.projects(archived=False)]
        found = [(one, key) for one in projects for key in client.keys(one)]
    rows = [
        (
            key.id,
            key.name,
            one,
            key.scope if key.kind == "api" else key.kind,
            key.redacted_value,
            moment(key.created_at),
            moment(key.expires_at) if key.expires_at else "",
        )
        for one, key in found
    ]
    headings = ("key", "name", "project", "scope", "value", "created", "expires")
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
        for one in client.projects(archived=True):
            if any(known.id == key for known in client.keys(one.id)):
                gone = client.revoke_key(one.id, key)
                break
        else:
            raise NotFound(f"There is no API key {key}.", hint="`rose keys list` shows the keys there are.")
    common.output.show(gone, identity=key, lines=[f"Key revoked: {key}"])


def _meant(client: Client, given: str) -> str:
    """Return the id of the project that is meant. An id needs no list of all projects, which only admins may see."""
    return given if given in ("current", DEFAULT) or given.startswith("proj_") else _project(client, given)


def _project(client: Client, given: str) -> str:
    """Return the id of the project that is meant. Raises: NotFound; InvalidRequest when several have that name."""
    found = [one.id for one in client.projects(archived=True) if given in (one.id, one.name)]
    if len(found) > 1:
        raise InvalidRequest(f"Several projects are called {given!r}: {', '.join(found)}.", code="ambiguous_name")
    if not found:
        raise NotFound(f"There is no project {given!r}.", hint="`rose projects list` shows the projects there are.")
    return found[0]
