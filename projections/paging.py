"""One page of a list query."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

Entry = TypeVar("Entry")


class Page(msgspec.Struct, Generic[Entry], frozen=True, kw_only=True):
    """Some entries of a list, in its order."""

    entries: list[Entry]
    has_more: bool
    """True when the list goes on behind the last entry."""

    @classmethod
    def cut(cls, entries: list[Entry], limit: int) -> Page[Entry]:
        """Make a page of at most `limit` from `entries`, of which one more than `limit` was asked for."""
        return Page(entries=entries[:limit], has_more=len(entries) > limit)
