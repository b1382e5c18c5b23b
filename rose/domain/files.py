"""Files: commands, events, state, decide, evolve."""

from __future__ import annotations

from typing import assert_never

import msgspec

from rose.domain.artifacts import Artifact
from rose.errors import InvalidState
from rose.missing import missing_file


class AddFile(msgspec.Struct, frozen=True, kw_only=True):
    """Register content that already lies in the blob folder."""

    project: str
    file_id: str
    at: int
    filename: str
    purpose: str
    artifact: Artifact
    expires_at: int | None = None
    job_id: str | None = None


class DeleteFile(msgspec.Struct, frozen=True, kw_only=True):
    """End a file's use for new requests."""

    at: int


Command = AddFile | DeleteFile


class FileUploaded(msgspec.Struct, frozen=True, kw_only=True):
    """A file can be used."""

    project: str
    file_id: str
    created_at: int
    filename: str
    purpose: str
    artifact: Artifact
    expires_at: int | None = None
    job_id: str | None = None
    """The job that made it, for result files."""


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The file cannot be used by new requests; jobs that name its content keep it."""

    at: int


Event = FileUploaded | FileDeleted


class FileState(msgspec.Struct, frozen=True, kw_only=True):
    """A file as its events make it; its JSON is the entity row's `doc`."""

    id: str = ""
    project: str = ""
    created_at: int = 0
    filename: str = ""
    purpose: str = ""
    artifact: Artifact | None = None
    expires_at: int | None = None
    job_id: str | None = None
    deleted_at: int | None = None


initial = FileState()


def decide(command: Command, state: FileState) -> tuple[Event, ...]:
    """Return the events of `command`. Raises: InvalidState, NotFound."""
    match command:
        case AddFile():
            if state.id:
                raise InvalidState(f"The file {state.id} exists already.")
            return (
                FileUploaded(
                    project=command.project,
                    file_id=command.file_id,
                    created_at=command.at,
                    filename=command.filename,
                    purpose=command.purpose,
                    artifact=command.artifact,
                    expires_at=command.expires_at,
                    job_id=command.job_id,
                ),
            )
        case DeleteFile():
            if not state.id or state.deleted_at is not None:
                raise missing_file(state.id)
            return (FileDeleted(at=command.at),)
        case _:
            assert_never(command)


def evolve(state: FileState, event: Event) -> FileState:
    """Return the state after `event`."""
    match event:
        case FileUploaded():
            return FileState(
                project=event.project,
                id=event.file_id,
                created_at=event.created_at,
                filename=event.filename,
                purpose=event.purpose,
                artifact=event.artifact,
                expires_at=event.expires_at,
                job_id=event.job_id,
            )
        case FileDeleted():
            return msgspec.structs.replace(state, deleted_at=event.at)
        case _:
            assert_never(event)
