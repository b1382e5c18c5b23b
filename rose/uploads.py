"""Uploads in parts: what can be asked of them, and how a file is made of the parts.

Parts lie in `uploads/<id>/` of the blob folder. Completing joins them to a blob of its own, and one append then says at
once that the upload is completed and the file uploaded: a process that dies before it leaves an upload that can be
completed again, one that dies after it leaves parts for the sweeper.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import reduce
from threading import Event
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
import msgspec
from anyio.lowlevel import RunVar

from projections import files as files_view
from projections import uploads as uploads_view
from rose import quotas
from rose.blobs import Blobs, TemporaryBlob
from rose.commands import Commands, Outcome, Request
from rose.domain import files, uploads
from rose.domain.artifacts import Artifact
from rose.domain.files import FileState
from rose.domain.uploads import Part, UploadState
from rose.errors import InvalidRequest, NotFound
from rose.ids import new_id
from rose.log import read
from rose.log.append import QuotaExceeded, StreamWrite

if TYPE_CHECKING:
    from rose.log.pool import Pool

MOST_AT_ONCE = 2
"""Files that a process makes of parts at the same time; each keeps a core and the disk busy."""
Respond = Callable[[UploadState, FileState], bytes]

_locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()
"""Of what is done to an upload now: who comes second waits, which saves conflicts and a second file."""
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("joining")

logger = logging.getLogger(__name__)


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A completed upload."""

    state: UploadState
    file: FileState
    response: bytes | None = None
    """The stored answer, when the same request was answered before."""


class PartMismatch(Exception):
    """A part is missing or has other content than its event says; `index` is its place in the list."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Stopped(Exception):
    """Nobody waits for the file any more."""


class Uploads:
    """Everything that can be asked of uploads in parts. Holds no state of its own."""

    def __init__(self, pool: Pool, blobs: Blobs, commands: Commands, *, min_free_bytes: int) -> None:
        self._pool = pool
        self._blobs = blobs
        self._commands = commands
        self._min_free_bytes = min_free_bytes

    async def get(self, project: str, upload_id: str) -> UploadState:
        """Return the project's upload. Raises: NotFound; Unavailable."""
        state = await uploads_view.get(self._pool, project, upload_id)
        if state is None:
            raise _missing(upload_id)
        return state

    async def file_of(self, state: UploadState) -> FileState | None:
        """Return the file that was made of a completed upload, also when it was deleted since."""
        return await files_view.find(self._pool, state.file_id) if state.file_id else None

    async def create(
        self,
        command: uploads.CreateUpload,
        request: Request,
        respond: Callable[[UploadState], bytes],
        *,
        most_bytes: int | None = None,
    ) -> Outcome[UploadState]:
        """Announce a file. Raises: LimitReached when the project would store more than `most_bytes`; Unavailable."""

        async def load() -> tuple[UploadState, int]:
            return uploads.initial, 0

        announce = _writer(command.upload_id, command)

        def write(state: UploadState, version: int) -> tuple[UploadState, list[StreamWrite]]:
            after, writes = announce(state, version)
            quota = quotas.of_bytes(command.project, command.bytes, most_bytes)
            return after, [msgspec.structs.replace(one, quota=quota) for one in writes]

        try:
            return await self._commands.change(load, write, request, respond)
        except QuotaExceeded:
            raise await quotas.too_many_bytes(self._pool, command.project, command.bytes, most_bytes or 0) from None

    async def add_part(
        self,
        project: str,
        upload_id: str,
        part_id: str,
        blob: TemporaryBlob,
        at: int,
        request: Request,
        response: bytes,
    ) -> Outcome[UploadState]:
        """Put `blob` into the upload as a part; what is refused leaves nothing behind.

        Raises: NotFound, InvalidState, InvalidRequest naming `data`; NoSpace; Unavailable.
        """
        path = f"{uploads.folder(upload_id)}/{part_id}"
        try:
            try:
                artifact = await anyio.to_thread.run_sync(blob.commit, path)
            except FileNotFoundError:  # the upload ended, and its folder was removed, while the part was put there
                uploads.check_open(await self.get(project, upload_id), at)
                raise
            command = uploads.AddPart(part_id=part_id, at=at, artifact=artifact)
            async with _lock(f"{upload_id}/parts"):  # else many that come together would mostly meet conflicts
                outcome = await self._commands.change(
                    lambda: self._load(project, upload_id), _writer(upload_id, command), request, lambda _: response
                )
        except InvalidRequest:
            await self._remove_part(project, upload_id, path)
            raise
        if outcome.replayed:
            await self._remove_part(project, upload_id, path)
        return outcome

    async def complete(
        self,
        project: str,
        upload_id: str,
        part_ids: Sequence[str],
        md5: str | None,
        at: int,
        request: Request,
        respond: Respond,
    ) -> Completed:
        """Make a file of the parts, in this order. The same request again gives the same answer.

        Raises: NotFound, InvalidState, InvalidRequest naming `part_ids` or `md5`; NoSpace; Unavailable.
        """
        async with _lock(upload_id):
            while True:
                state = await self.get(project, upload_id)
                if uploads.is_repetition(state, part_ids, md5):
                    return await self._completed(state)
                parts = uploads.chosen_parts(state, part_ids, at)
                try:
                    blob, found = await self._join(state, parts, md5 is not None)
                except PartMismatch as mismatch:
                    again = await self.get(project, upload_id)
                    if again.status(at) != "pending":
                        continue  # another process was first, or it was cancelled
                    raise InvalidRequest(
                        f"part_ids[{mismatch.index}] ({part_ids[mismatch.index]}) is not any more what was sent.",
                        code="part_damaged",
                        param="part_ids",
                        hint="Send that part again and name the new one.",
                    ) from None
                with blob:
                    if md5 is not None and found != md5:
                        raise InvalidRequest(
                            f"md5 is {md5}; the parts in this order have {found}.", code="md5_mismatch", param="md5"
                        )
                    # The rename and the event belong together, as for a file that comes in one piece.
                    with anyio.CancelScope(shield=True):
                        return await self._publish(state, blob, part_ids, md5, at, request, respond)

    async def cancel(
        self, project: str, upload_id: str, at: int, request: Request, respond: Callable[[UploadState], bytes]
    ) -> Outcome[UploadState]:
        """Give an upload up; its parts are removed. Raises: NotFound, InvalidState; Unavailable."""
        command = uploads.CancelUpload(at=at)
        with anyio.CancelScope(shield=True):
            outcome = await self._commands.change(
                lambda: self._load(project, upload_id), _writer(upload_id, command), request, respond
            )
            await self._remove_parts(upload_id)
            return outcome
        raise AssertionError("a shielded scope swallows nothing")

    async def _load(self, project: str, upload_id: str) -> tuple[UploadState, int]:
        found = await read.load_row(self._pool, "uploads", upload_id)
        state = msgspec.json.decode(found[0], type=UploadState) if found else uploads.initial
        if found is None or state.project != project:
            raise _missing(upload_id)
        return state, found[1]

    async def _completed(self, state: UploadState, response: bytes | None = None) -> Completed:
        file = await self.file_of(state)
        assert file is not None
        return Completed(state=state, file=file, response=response)

    async def _join(self, state: UploadState, parts: Sequence[Part], with_md5: bool) -> tuple[TemporaryBlob, str]:
        artifacts = [uploads.part_artifact(state, part) for part in parts]
        await anyio.to_thread.run_sync(self._blobs.require_space, state.bytes, self._min_free_bytes)
        try:
            limiter = _limiter.get()
        except LookupError:
            limiter = anyio.CapacityLimiter(MOST_AT_ONCE)
            _limiter.set(limiter)
        stop = Event()
        try:
            return await anyio.to_thread.run_sync(
                join, self._blobs, artifacts, with_md5, stop, limiter=limiter, abandon_on_cancel=True
            )
        finally:
            stop.set()

    async def _publish(
        self,
        state: UploadState,
        blob: TemporaryBlob,
        part_ids: Sequence[str],
        md5: str | None,
        at: int,
        request: Request,
        respond: Respond,
    ) -> Completed:
        file_id = new_id("file_")
        artifact = await anyio.to_thread.run_sync(blob.commit, f"files/{file_id}")
        command = uploads.CompleteUpload(at=at, part_ids=tuple(part_ids), md5=md5, file_id=file_id, artifact=artifact)
        life = state.file_lifetime_seconds
        add_file = files.AddFile(
            project=state.project,
            file_id=file_id,
            at=at,
            filename=state.filename,
            purpose=state.purpose,
            artifact=artifact,
            expires_at=None if life is None else at + life,
        )
        uploaded = files.decide(add_file, files.initial)
        file = reduce(files.evolve, uploaded, files.initial)
        file_write = StreamWrite(
            stream_id=f"file/{file_id}", expected_version=0, events=uploaded, row=files_view.row(file)
        )
        upload_write = _writer(state.id, command)

        def write(before: UploadState, version: int) -> tuple[UploadState, list[StreamWrite]]:
            after, writes = upload_write(before, version)
            return after, [*writes, file_write] if writes else []

        try:
            outcome = await self._commands.change(
                lambda: self._load(state.project, state.id), write, request, lambda after: respond(after, file)
            )
        except InvalidRequest:
            await anyio.to_thread.run_sync(self._blobs.delete, artifact.path)
            raise
        # Only here and above is it certain that no event names the blob; after an unknown outcome the sweeper decides.
        if outcome.replayed or not outcome.events:
            await anyio.to_thread.run_sync(self._blobs.delete, artifact.path)
            return await self._completed(await self.get(state.project, state.id), outcome.response)
        await self._remove_parts(state.id)
        return Completed(state=outcome.state, file=file)

    async def _remove_parts(self, upload_id: str) -> None:
        """Free the disk at once; what is left the sweeper removes."""
        try:
            await anyio.to_thread.run_sync(self._blobs.delete, uploads.folder(upload_id))
        except OSError as error:
            logger.warning("the parts of %s could not be removed: %s", upload_id, error)

    async def _remove_part(self, project: str, upload_id: str, path: str) -> None:
        """Remove a part that was refused, and with it the folder when the upload ended while the part came in."""
        await anyio.to_thread.run_sync(self._blobs.delete, path)
        state = await uploads_view.get(self._pool, project, upload_id)
        if state is not None and (state.completed_at or state.cancelled_at):
            await self._remove_parts(upload_id)


def join(blobs: Blobs, parts: Sequence[Artifact], with_md5: bool, stop: Event) -> tuple[TemporaryBlob, str]:
    """Write the parts one behind the other into a new temporary blob; return it and the md5, or an empty text.

    Blocking; `stop` ends it between two pieces.

    Raises: PartMismatch; NoSpace; Stopped. Then nothing is left.
    """
    md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None

    def see(piece: memoryview) -> None:
        if stop.is_set():
            raise Stopped
        if md5 is not None:
            md5.update(piece)

    blob = blobs.open_temporary("joined")
    try:
        for index, part in enumerate(parts):
            try:
                found = blob.append(blobs.path(part.path), see)
            except FileNotFoundError:
                raise PartMismatch(index) from None
            if found != (part.bytes, part.sha256):
                raise PartMismatch(index)
    except BaseException:
        blob.discard()
        raise
    return blob, md5.hexdigest() if md5 is not None else ""


def _lock(name: str) -> anyio.Lock:
    return _locks.setdefault(name, anyio.Lock())


def _writer(
    upload_id: str, command: uploads.Command
) -> Callable[[UploadState, int], tuple[UploadState, list[StreamWrite]]]:
    def write(state: UploadState, version: int) -> tuple[UploadState, list[StreamWrite]]:
        happened = uploads.decide(command, state)
        after = reduce(uploads.evolve, happened, state)
        if not happened:
            return after, []
        return after, [
            StreamWrite(
                stream_id=f"upload/{upload_id}",
                expected_version=version,
                events=happened,
                row=uploads_view.row(after),
            )
        ]

    return write


def _missing(upload_id: str) -> NotFound:
    return NotFound(f"No such Upload object: {upload_id}", code="upload_not_found", param="upload_id")
