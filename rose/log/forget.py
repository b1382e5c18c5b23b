"""Forgets commands: a repetition is answered for a while, not for ever. The events that they led to stay."""

from __future__ import annotations

from rose.log.pool import Pool, fetch_row
from rose.log.queries import QUERIES

BATCH = 1000
"""Commands that one statement removes: few enough that nothing waits for it."""


async def forget_commands(pool: Pool, *, older_than_seconds: float) -> int:
    """Remove every command that was accepted so long ago and return how many. Any number of processes may at once.

    An equal request after that is a new one; the versions and epochs of the log still refuse what would happen twice.

    Raises: Unavailable.
    """
    total = 0
    while True:
        row = await fetch_row(pool, QUERIES["forget_commands"], older_than_seconds, BATCH)
        assert row is not None, "an aggregate always has a row"
        total += row["gone"]
        if row["gone"] < BATCH:
            return total
