"""Says which format a whole source has: one that no row speaks against, and that at least one row bears the mark of."""

from __future__ import annotations

from collections.abc import Iterable

from rose.conversion.pairs import MarkerSurvey
from rose.conversion.rows import Markers, Row, shortened
from rose.domain.formats import FORMATS, Fit, recognise
from rose.errors import InvalidDataset, InvalidRequest


class Survey:
    """What all rows together say about the format."""

    def __init__(self) -> None:
        self.rows = 0
        """Rows that could be read."""
        self._markers = MarkerSurvey()
        self._fits = dict.fromkeys(FORMATS, Fit.COULD)
        self._broken: tuple[Row, list[str]] | None = None
        self._first: Row | None = None
        self._problem: Row | None = None

    def see(self, rows: Iterable[Row]) -> None:
        """Take rows into account; those that could not be read say nothing."""
        for row in rows:
            if row.value is None:
                self._problem = self._problem or row
            else:
                self.rows += 1
                self._first = self._first or row
                self._see(row, recognise(row.value))
                self._markers.see(row.value)

    def _see(self, row: Row, fits: dict[str, Fit]) -> None:
        before = [name for name, fit in self._fits.items() if fit is Fit.MARKED]
        self._fits = {name: max(self._fits[name], fit) for name, fit in fits.items() if name in self._fits}
        if not self._fits and self._broken is None:
            self._broken = (row, before)

    @property
    def markers(self) -> Markers:
        """The marks of old completion models that every row bears."""
        return self._markers.markers

    def format(self) -> str:
        """Return the format's name.

        Raises: InvalidDataset when none fits, naming the row that broke the last one; InvalidRequest when several fit.
        """
        marked = [name for name, fit in self._fits.items() if fit is Fit.MARKED]
        if len(marked) == 1:
            return marked[0]
        if marked:
            raise InvalidRequest(
                f"The rows fit {' and '.join(FORMATS[name].title for name in marked)}.",
                code="ambiguous_format",
                param="from",
                hint=f"Say which it is: --from {' or --from '.join(marked)}",
            )
        raise self._unknown()

    def _unknown(self) -> InvalidDataset:
        if self._broken is not None and self._broken[1]:
            row, before = self._broken
            what = " and ".join(FORMATS[name].title for name in before)
            return InvalidDataset(
                f"The rows before are {what}, and {row.place} is not: it has {_keys(row)}.",
                code="unknown_format",
                hint=f"Mend that row, or leave such rows out with --from {before[0]} --allow-drops.",
            )
        if self._first is None:
            why = f" {self._problem.place}: {self._problem.problem}." if self._problem else ""
            return InvalidDataset(f"There are no rows that can be read.{why}", code="unknown_format")
        return InvalidDataset(
            f"No format that is known has rows like {self._first.place}: it has {_keys(self._first)}.",
            code="unknown_format",
            hint=f"Name its columns (--map user=COLUMN,assistant=COLUMN) or its format (--from: {', '.join(FORMATS)}).",
        )


def _keys(row: Row) -> str:
    names = [repr(shortened(name)) for name in row.value or {}]
    return "no columns" if not names else ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
