"""Frees disk space: removes blobs that nothing can use any more, a day after their use ended, and parts after an hour;
forgets commands whose repetition nobody expects any more.

What an unfinished job names stays, whatever became of the file's or model's entry. Nothing here decides what is used:
the log does. A blob older than this log belongs to another one and is left alone.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import anyio
import anyio.to_thread

from projections import files as files_view
from projections import jobs as jobs_view
from projections import models as models_view
from projections import uploads as uploads_view
from rose.blobs import Blobs
from rose.domain.jobs import JobState
from rose.errors import RoseError
from rose.log.forget import forget_commands
from rose.log.pool import Pool
from rose.log.read import read_all

KEEP_SECONDS = 86400.0
"""How long a blob outlives its use: requests in progress finish, mistakes can be mended."""
KEEP_PARTS_SECONDS = 3600.0
"""How long the parts of an upload outlive it: a completion that began in time comes to its end."""
PARTS_OWNERS = ("part", "joined")
"""What begins the names of half written parts, and of files that are being made of parts."""
EVERY_SECONDS = 3600.0

logger = logging.getLogger(__name__)


async def run(pool: Pool, blobs: Blobs, stop: anyio.Event, keep_commands_seconds: float) -> None:
    """Sweep now and each hour until `stop` is set. Any number of processes may do so at once."""
    while not stop.is_set():
        try:
            forgotten = await forget_commands(pool, older_than_seconds=keep_commands_seconds)
            logger.info("forgot %d commands that are older than %.0f s", forgotten, keep_commands_seconds)
        except RoseError as error:
            logger.warning("old commands could not be forgotten: %s", error)
        try:
            await sweep(pool, blobs)
        except (RoseError, OSError) as error:  # a damaged row, too: it may pin anything
            logger.warning("the blob folder could not be swept: %s", error)
        with anyio.move_on_after(EVERY_SECONDS):
            await stop.wait()


async def sweep(pool: Pool, blobs: Blobs, *, keep_seconds: float = KEEP_SECONDS) -> list[str]:
    """Remove what has been without use for `keep_seconds` and return the paths. Raises: Unavailable."""
    first = await read_all(pool, after_position=0, limit=1)
    if not first:
        return []
    horizon = time.time() - keep_seconds
    born = first[0].recorded_at.timestamp()
    pinned = {path for job in await jobs_view.unfinished(pool) for path in _pinned_by(job)}
    removed: list[str] = []
    for path in await _entries(blobs, "files"):
        if path not in pinned and await _file_is_over(pool, blobs, path, born, horizon):
            removed.append(path)
    keep_parts_seconds = min(keep_seconds, KEEP_PARTS_SECONDS)
    for folder in await _entries(blobs, "uploads"):
        if await _upload_is_over(pool, blobs, folder, born, time.time() - keep_parts_seconds):
            removed.append(folder)
    for folder in await _entries(blobs, "jobs"):
        named = await _kept_of_job(pool, blobs, folder, born, horizon)
        if named is not None:
            removed += await anyio.to_thread.run_sync(_not_named, blobs.root, folder, named | pinned)
    for path in removed:
        logger.info("removing %s, which nothing uses any more", path)
        await anyio.to_thread.run_sync(blobs.delete, path)
    for owner in PARTS_OWNERS:
        await anyio.to_thread.run_sync(
            lambda owner=owner: blobs.sweep_temporary(owner=f"{owner}.", older_than_seconds=keep_parts_seconds)
        )
    await anyio.to_thread.run_sync(lambda: blobs.sweep_temporary(older_than_seconds=keep_seconds))
    return removed


def _pinned_by(job: JobState) -> list[str]:
    """Return the paths that a job needs until it ends."""
    artifacts = [pinned.artifact for pinned in (job.training_file, job.validation_file) if pinned is not None]
    if job.base_request.parent is not None:
        artifacts.append(job.base_request.parent.artifact)
    return [artifact.path for artifact in artifacts]


async def _file_is_over(pool: Pool, blobs: Blobs, path: str, born: float, horizon: float) -> bool:
    state = await files_view.find(pool, path.partition("/")[2])
    if state is None:  # an upload whose event never came
        return await _lies_unnamed(blobs, path, born, horizon)
    ends = [moment for moment in (state.deleted_at, state.expires_at) if moment is not None]
    return bool(ends) and min(ends) <= horizon


async def _upload_is_over(pool: Pool, blobs: Blobs, folder: str, born: float, horizon: float) -> bool:
    """Say whether the parts can go: the upload was completed or cancelled, or has expired."""
    state = await uploads_view.find(pool, folder.partition("/")[2])
    if state is None:
        return await _lies_unnamed(blobs, folder, born, horizon)
    return state.ended_at <= horizon


async def _kept_of_job(pool: Pool, blobs: Blobs, folder: str, born: float, horizon: float) -> set[str] | None:
    """Return what the job's folder must keep; None when nothing in it may be touched yet."""
    job = await jobs_view.find(pool, folder.partition("/")[2])
    if job is None:
        return set() if await _lies_unnamed(blobs, folder, born, horizon) else None
    if job.finished_at is None or job.finished_at > horizon:
        return None
    model = await models_view.find(pool, job.id)
    if model is not None and model.deleted_at is not None:
        return set() if model.deleted_at <= horizon else None
    named = {checkpoint.artifact.path for checkpoint in job.checkpoints}
    return named | {job.artifact.path} if job.artifact is not None else named


async def _lies_unnamed(blobs: Blobs, path: str, born: float, horizon: float) -> bool:
    written = await anyio.to_thread.run_sync(_last_written, blobs.root / path)
    return born < written <= horizon


def _last_written(path: Path) -> float:
    try:
        return max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    except FileNotFoundError:
        return 0.0  # somebody removed it just now


async def _entries(blobs: Blobs, kind: str) -> list[str]:
    def names() -> list[str]:
        folder = blobs.root / kind
        return sorted(f"{kind}/{entry.name}" for entry in folder.iterdir()) if folder.is_dir() else []

    return await anyio.to_thread.run_sync(names)


def _not_named(root: Path, folder: str, named: set[str]) -> list[str]:
    """Return the largest entries below `folder` that are not, and do not hold, a named path."""
    if not any(path.startswith(f"{folder}/") for path in named):
        return [folder]
    found: list[str] = []
    for entry in sorted((root / folder).iterdir()):
        path = f"{folder}/{entry.name}"
        if path not in named:
            found += _not_named(root, path, named)
    return found
