"""Projects: whose a file, job or model is. Everything belongs to exactly one, from its first event on."""

from __future__ import annotations

from typing import assert_never

import msgspec

from rose.errors import InvalidState

DEFAULT_PROJECT = "default"
"""The project of whoever calls without a key, and of everything that is older than projects. It is always there."""


class CreateProject(msgspec.Struct, frozen=True, kw_only=True):
    """Make room for another team."""

    project: str
    at: int
    name: str


class RenameProject(msgspec.Struct, frozen=True, kw_only=True):
    """Give a project another name; its id stays."""

    name: str


class ArchiveProject(msgspec.Struct, frozen=True, kw_only=True):
    """End a project's use: its keys open nothing any more, what it has stays in the log and on disk."""

    at: int


Command = CreateProject | RenameProject | ArchiveProject


class ProjectCreated(msgspec.Struct, frozen=True, kw_only=True):
    """There is another project."""

    project: str
    created_at: int
    name: str


class ProjectRenamed(msgspec.Struct, frozen=True, kw_only=True):
    """A project has another name."""

    name: str


class ProjectArchived(msgspec.Struct, frozen=True, kw_only=True):
    """A project is not used any more."""

    at: int


Event = ProjectCreated | ProjectRenamed | ProjectArchived


class ProjectState(msgspec.Struct, frozen=True, kw_only=True):
    """A project as its events make it; its JSON is the entity row's `doc`."""

    project: str = ""
    """Its id."""
    created_at: int = 0
    name: str = ""
    archived_at: int | None = None


initial = ProjectState()
default = ProjectState(project=DEFAULT_PROJECT, name="Default")


def decide(command: Command, state: ProjectState) -> tuple[Event, ...]:
    """Return the events of `command`; none when it is already so. Raises: InvalidState."""
    match command:
        case CreateProject():
            return (ProjectCreated(project=command.project, created_at=command.at, name=command.name),)
        case RenameProject():
            if state.archived_at is not None:
                raise InvalidState(f"The project {state.project} is archived.", code="project_archived")
            return () if command.name == state.name else (ProjectRenamed(name=command.name),)
        case ArchiveProject():
            return () if state.archived_at is not None else (ProjectArchived(at=command.at),)
        case _:
            assert_never(command)


def evolve(state: ProjectState, event: Event) -> ProjectState:
    """Return the state after `event`."""
    match event:
        case ProjectCreated():
            return ProjectState(project=event.project, created_at=event.created_at, name=event.name)
        case ProjectRenamed():
            return msgspec.structs.replace(state, name=event.name)
        case ProjectArchived():
            return msgspec.structs.replace(state, archived_at=event.at)
        case _:
            assert_never(event)
