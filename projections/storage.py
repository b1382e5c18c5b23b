"""What a project stores, added up over the rows that appends write (migrations/append.sql)."""

from __future__ import annotations

import msgspec

from rose.log.pool import Pool, fetch_row

STORED = "select file_bytes as files, upload_bytes as uploads, model_bytes as models from rose.stored_bytes($1)"


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a project."""

    files: int
    """Usable ones, also those that jobs made."""
    uploads: int
    """Announced by uploads in parts that are neither completed nor over."""
    models: int
    """Models that answer and the checkpoints of all jobs."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.files + self.uploads + self.models


async def of_project(pool: Pool, project: str) -> Stored:
    """Return what a project stores now. Raises: Unavailable."""
    row = await fetch_row(pool, STORED, project)
    assert row is not None, "a function of sums always has a row"
    return Stored(**dict(row))
