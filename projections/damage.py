"""Rows whose document does not decode any more: shown as what is left of them, refused where they are needed whole.

One damaged row must not hide the others of a list. Nothing that is put together here is ever stored.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from rose.errors import RoseError

DAMAGED_ROW = "damaged_row"
"""Error code of a job or model whose row is damaged."""

State = TypeVar("State", bound=msgspec.Struct)

logger = logging.getLogger(__name__)


class DamagedRow(RoseError):
    """A row of a view is damaged."""

    default_code = DAMAGED_ROW
    should_retry = False

    def __init__(self, view: str, id: str, remains: Any) -> None:
        super().__init__(
            f"The row of {id} in the view {view} is damaged.",
            hint=f"On the server: `rose projections rebuild {view}` makes it anew from the log.",
        )
        self.remains = remains
        """A state with those fields that can be read; the others as they are at first."""


def whole(view: str, id: str, doc: str | bytes, initial: State) -> State:
    """Return the state in the document of a row; `initial` is the state before any event. Raises: DamagedRow."""
    try:
        return msgspec.json.decode(doc, type=type(initial))
    except msgspec.DecodeError as error:
        logger.warning("the row of %s in the view %s is damaged: %s", id, view, error)
        raise DamagedRow(view, id, _remains(doc, initial)) from error


def _remains(doc: str | bytes, initial: State) -> State:
    fields: Any = None
    with suppress(msgspec.DecodeError):  # a number that no program can hold
        fields = msgspec.json.decode(doc)
    if not isinstance(fields, dict):
        return initial
    readable: dict[str, Any] = {}
    for field in msgspec.structs.fields(initial):
        if field.encode_name in fields:
            with suppress(msgspec.ValidationError):
                readable[field.name] = msgspec.convert(fields[field.encode_name], field.type)
    return msgspec.structs.replace(initial, **readable)
