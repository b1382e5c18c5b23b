"""Says in words that a project has reached a limit: what is in the way, and what makes room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from projections import jobs as jobs_view
from projections import storage
from rose.errors import ProjectFull
from rose.log.append import Quota

if TYPE_CHECKING:
    from rose.log.pool import Pool

MAX_SHOWN = 5


def of_bytes(project: str, adds: int, most: int | None) -> Quota | None:
    """Return the quota of a write that stores something; None without a limit."""
    return None if most is None else Quota(of="bytes", project=project, adds=adds, most=most)


async def too_many_jobs(pool: Pool, project: str, most: int) -> ProjectFull:
    """Return the error for one job too many. Raises: Unavailable."""
    found = await jobs_view.unfinished_of(pool, project)
    shown = ", ".join(found[:MAX_SHOWN]) + (", …" if len(found) > MAX_SHOWN else "")
    return ProjectFull(
        f"The project {project} has {len(found)} unfinished jobs of {most} ({shown}).",
        code="project_jobs_limit",
        hint="Cancel one, or wait until one has ended.",
    )


async def too_many_bytes(pool: Pool, project: str, adds: int, most: int) -> ProjectFull:
    """Return the error for what does not fit into a project's storage any more. Raises: Unavailable."""
    stored = await storage.of_project(pool, project)
    return ProjectFull(
        f"The project {project} stores {stored.total} of {most} bytes (files {stored.files}, uploads {stored.uploads}, "
        f"models and checkpoints {stored.models}); {adds} more do not fit.",
        code="project_bytes_limit",
        hint="Delete files or models, or cancel an upload.",
    )


async def require_bytes(pool: Pool, project: str, adds: int, most: int | None) -> None:
    """Refuse early what would be refused in the end. Raises: ProjectFull; Unavailable."""
    if most is not None and (await storage.of_project(pool, project)).total + adds > most:
        raise await too_many_bytes(pool, project, adds, most)
