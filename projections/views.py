"""What an asynchronous view is: the events it takes and how it writes them. The list of all is in runner.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from projections.positions import wait_until
from rose.log.pool import AnyConnection, Pool, fetch_row
from rose.log.read import Recorded

ACTIVE = "(select version from rose.projections where name = '{name}' and status <> 'building')"
END_OF_STREAM = "select coalesce(max(position), 0) as position from rose.events where stream_id = $1"


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A table that is made from events. Its rows carry the version of rose.projections that they belong to."""

    name: str
    """Name in rose.projections; the table is rose.<name>."""
    takes: frozenset[str]
    """Wire names of the events that it is made from; of others nothing is read."""
    key: tuple[str, ...]
    """Columns that tell its rows apart within a version."""
    apply: Callable[[AnyConnection, int, Sequence[Recorded]], Awaitable[None]]
    """Write what the events, in order, mean for the rows of a version. The same events again change nothing."""

    @property
    def table(self) -> str:
        """Qualified name of the table."""
        return f"rose.{self.name}"


def active(name: str) -> str:
    """Return the SQL for the version of a view that readers see: one statement sees one version, whole."""
    return ACTIVE.format(name=name)


async def caught_up(pool: Pool, name: str, stream_id: str, timeout_seconds: float = 1.0) -> bool:
    """Wait until the view shows all that the stream's entity row shows; False after `timeout_seconds`.

    Raises: Unavailable.
    """
    row = await fetch_row(pool, END_OF_STREAM, stream_id)
    assert row is not None, "an aggregate always has a row"
    return await wait_until(pool, name, row["position"], timeout_seconds)
