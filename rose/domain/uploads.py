"""Uploads in parts: commands, events, state, decide, evolve.

A part is content that lies in the blob folder already. Whether an upload has expired is computed from the moment that
a command carries, so no event says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn, assert_never

import msgspec

from rose.domain.artifacts import Artifact
from rose.errors import InvalidRequest, InvalidState

LIFE_SECONDS = 3600
"""How long after its creation an upload takes parts and can be completed."""
MAX_PART_BYTES = 64 << 20
MAX_PARTS = 2048
"""All of them stand in the upload's row, which every part writes anew."""

Status = Literal["pending", "completed", "cancelled", "expired"]


class CreateUpload(msgspec.Struct, frozen=True, kw_only=True):
    """Announce a file that will come in parts."""

    project: str
    upload_id: str
    at: int
    filename: str
    purpose: str
    bytes: int
    mime_type: str
    file_lifetime_seconds: int | None = None


class AddPart(msgspec.Struct, frozen=True, kw_only=True):
    """Add content that already lies in the blob folder."""

    part_id: str
    at: int
    artifact: Artifact


class CompleteUpload(msgspec.Struct, frozen=True, kw_only=True):
    """Make a file of the parts; it already lies in the blob folder."""

    at: int
    part_ids: tuple[str, ...]
    """In the order of the file."""
    md5: str | None
    """What the client stated; it was compared before."""
    file_id: str
    artifact: Artifact


class CancelUpload(msgspec.Struct, frozen=True, kw_only=True):
    """Give the upload up."""

    at: int


Command = CreateUpload | AddPart | CompleteUpload | CancelUpload


class UploadCreated(msgspec.Struct, frozen=True, kw_only=True):
    """Parts can be added."""

    project: str
    upload_id: str
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    bytes: int
    mime_type: str
    file_lifetime_seconds: int | None = None


class PartAdded(msgspec.Struct, frozen=True, kw_only=True):
    """A part is there."""

    part_id: str
    at: int
    artifact: Artifact


class UploadCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """The file can be used; its own event stands in the same append."""

    at: int
    file_id: str
    part_ids: tuple[str, ...]
    md5: str | None = None


class UploadCancelled(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing will come of the upload."""

    at: int


Event = UploadCreated | PartAdded | UploadCompleted | UploadCancelled


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part that can be used."""

    id: str
    bytes: int
    sha256: str


class UploadState(msgspec.Struct, frozen=True, kw_only=True):
    """An upload as its events make it; its JSON is the entity row's `doc`."""

    id: str = ""
    project: str = ""
    created_at: int = 0
    expires_at: int = 0
    filename: str = ""
    purpose: str = ""
    bytes: int = 0
    """How large the whole file was announced to be."""
    mime_type: str = ""
    file_lifetime_seconds: int | None = None
    parts: tuple[Part, ...] = ()
    """As they came; empty once the upload is completed or cancelled."""
    completed_at: int | None = None
    file_id: str | None = None
    """The file that was made."""
    part_ids: tuple[str, ...] = ()
    """What the file was made of, in its order."""
    md5: str | None = None
    cancelled_at: int | None = None

    def status(self, now: int) -> Status:
        """Return the upload's status at `now` (Unix seconds)."""
        if self.completed_at is not None:
            return "completed"
        if self.cancelled_at is not None:
            return "cancelled"
        return "expired" if self.expires_at <= now else "pending"

    @property
    def ended_at(self) -> int:
        """From when on its parts are of no use any more; of a pending upload this lies ahead."""
        return min(moment for moment in (self.completed_at, self.cancelled_at, self.expires_at) if moment is not None)


initial = UploadState()


def folder(upload_id: str) -> str:
    """Return the folder of an upload's parts, relative to the blob folder."""
    return f"uploads/{upload_id}"


def part_artifact(state: UploadState, part: Part) -> Artifact:
    """Return a part as a blob."""
    return Artifact(path=f"{folder(state.id)}/{part.id}", bytes=part.bytes, sha256=part.sha256)


def check_open(state: UploadState, at: int) -> None:
    """Raises: InvalidState unless the upload takes parts at `at` (Unix seconds)."""
    if state.status(at) != "pending":
        _refuse(state, at)


def check_room(state: UploadState, part_bytes: int) -> None:
    """Check that a part of this size may be added. Raises: InvalidRequest naming `data`.

    A part that did not arrive is sent again, under another id, so all of them may have twice the announced size.
    """
    if part_bytes == 0:
        raise InvalidRequest("data is empty; a part has at least one byte.", code="empty_file", param="data")
    if part_bytes > state.bytes:
        raise InvalidRequest(
            f"data has {part_bytes} bytes, more than the whole upload, which was announced with {state.bytes}.",
            code="part_too_large",
            param="data",
        )
    total = sum(part.bytes for part in state.parts) + part_bytes
    if total > 2 * state.bytes:
        raise InvalidRequest(
            f"With data the parts of this upload have {total} bytes, more than twice the {state.bytes} announced.",
            code="too_many_parts",
            param="data",
        )
    if len(state.parts) >= MAX_PARTS:
        raise InvalidRequest(
            f"The upload has {len(state.parts)} parts; at most {MAX_PARTS} are taken.",
            code="too_many_parts",
            param="data",
            hint=f"Send larger parts; one may have {MAX_PART_BYTES} bytes.",
        )


def chosen_parts(state: UploadState, part_ids: Sequence[str], at: int) -> tuple[Part, ...]:
    """Return the parts of the file in its order; parts that are not named are left out.

    Raises: InvalidState when the upload cannot be completed at `at`; InvalidRequest naming `part_ids`.
    """
    check_open(state, at)
    known = {part.id: part for part in state.parts}
    seen: dict[str, int] = {}
    for index, part_id in enumerate(part_ids):
        name = f"part_ids[{index}]"
        if part_id not in known:
            raise _wrong_parts(f"{name} is {part_id[:80]!r}; this upload has no such part.")
        if part_id in seen:
            raise _wrong_parts(f"{name} is {part_id}, as part_ids[{seen[part_id]}] is; a part can be named once.")
        seen[part_id] = index
    chosen = tuple(known[part_id] for part_id in part_ids)
    total = sum(part.bytes for part in chosen)
    if total != state.bytes:
        raise _wrong_parts(f"The parts in part_ids have {total} bytes together; bytes was {state.bytes}.")
    if not total:
        raise InvalidRequest(f"The file {state.filename!r} is empty.", code="empty_file", param="part_ids")
    return chosen


def is_repetition(state: UploadState, part_ids: Sequence[str], md5: str | None) -> bool:
    """Tell whether the upload was completed by exactly this request."""
    return state.completed_at is not None and state.part_ids == tuple(part_ids) and state.md5 == md5


def decide(command: Command, state: UploadState) -> tuple[Event, ...]:
    """Return the events of `command`; none when it is already so. Raises: InvalidState, InvalidRequest."""
    match command:
        case CreateUpload():
            if state.id:
                raise InvalidState(f"The upload {state.id} exists already.", code="invalid_upload_state")
            return (
                UploadCreated(
                    project=command.project,
                    upload_id=command.upload_id,
                    created_at=command.at,
                    expires_at=command.at + LIFE_SECONDS,
                    filename=command.filename,
                    purpose=command.purpose,
                    bytes=command.bytes,
                    mime_type=command.mime_type,
                    file_lifetime_seconds=command.file_lifetime_seconds,
                ),
            )
        case AddPart():
            check_open(state, command.at)
            check_room(state, command.artifact.bytes)
            return (PartAdded(part_id=command.part_id, at=command.at, artifact=command.artifact),)
        case CompleteUpload():
            if is_repetition(state, command.part_ids, command.md5):
                return ()
            chosen_parts(state, command.part_ids, command.at)
            return (
                UploadCompleted(at=command.at, file_id=command.file_id, part_ids=command.part_ids, md5=command.md5),
            )
        case CancelUpload():
            if state.cancelled_at is not None:
                return ()
            check_open(state, command.at)
            return (UploadCancelled(at=command.at),)
        case _:
            assert_never(command)


def evolve(state: UploadState, event: Event) -> UploadState:
    """Return the state after `event`."""
    match event:
        case UploadCreated():
            return UploadState(
                id=event.upload_id,
                project=event.project,
                created_at=event.created_at,
                expires_at=event.expires_at,
                filename=event.filename,
                purpose=event.purpose,
                bytes=event.bytes,
                mime_type=event.mime_type,
                file_lifetime_seconds=event.file_lifetime_seconds,
            )
        case PartAdded():
            part = Part(id=event.part_id, bytes=event.artifact.bytes, sha256=event.artifact.sha256)
            return msgspec.structs.replace(state, parts=(*state.parts, part))
        case UploadCompleted():
            return msgspec.structs.replace(
                state,
                completed_at=event.at,
                file_id=event.file_id,
                part_ids=event.part_ids,
                md5=event.md5,
                parts=(),
            )
        case UploadCancelled():
            return msgspec.structs.replace(state, cancelled_at=event.at, parts=())
        case _:
            assert_never(event)


def _refuse(state: UploadState, at: int) -> NoReturn:
    status = state.status(at)
    why = {
        "completed": f"it was completed and is the file {state.file_id}",
        "cancelled": "it was cancelled",
        "expired": f"it expired {LIFE_SECONDS // 60} minutes after its creation, at {state.expires_at}",
    }
    raise InvalidState(
        f"The upload {state.id} is {status}: {why.get(status, status)}.",
        code="invalid_upload_state",
        param="upload_id",
        hint=None if status == "completed" else "Create another upload.",
    )


def _wrong_parts(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_value", param="part_ids")
