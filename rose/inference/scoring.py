"""A request that writes nothing: how likely a model finds given tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rose.errors import InvalidRequest, RoseError
from rose.inference.decoding import adapter_key
from rose.inference.generation import Failed, Scored, ScoringRequest
from rose.inference.resident import Resident
from rose.inference.rows import Row


class Scoring:
    """The life of one such request; as Decoding, with one row at a time."""

    def __init__(self, request: ScoringRequest, sink: Callable[[Scored | Failed], None]) -> None:
        self.request = request
        self.target = request.target
        self.sink = sink
        self.cancelled = False
        self.resident: Resident | None = None
        self.unplaced: list[Row] = []
        self._going: list[Row] = []
        self._logprobs: list[list[float]] = []

    def start(self, resident: Resident) -> None:
        """Check the rows. Raises: InvalidRequest."""
        for number, row in enumerate(self.request.rows):
            if not 2 <= len(row) <= resident.context_tokens or not all(0 <= id < resident.vocabulary for id in row):
                raise InvalidRequest(
                    f"Row {number} must have 2 to {resident.context_tokens} tokens from 0 to {resident.vocabulary - 1}."
                )
        self.resident = resident
        self._next()

    def _next(self) -> None:
        rows = self.request.rows[len(self._logprobs) :][:1]
        self._going = [Row(row, adapter=adapter_key(self.target), most_tokens=len(row), scored=True) for row in rows]
        self.unplaced = list(self._going)

    def going(self) -> list[Row]:
        """See Decoding.going."""
        return [] if self.unplaced else self._going

    def rows(self) -> int:
        """See Decoding.rows."""
        return len(self.going())

    def take(self, row: Row, logits: Tensor, best: tuple[float, int]) -> int:
        """Keep the scores of a row that is read and go on to the next one."""
        assert self.resident is not None
        self._logprobs.append(row.logprobs or [])
        self.resident.runner.release(row)
        self._next()
        return 0

    def finish(self) -> bool:
        """See Decoding.finish."""
        if self._going:
            return False
        assert self.resident is not None
        self.sink(
            Scored(
                logprobs=self._logprobs,
                adapter=self.resident.weights_of(adapter_key(self.target)),
                weights=self.resident.runner.weights,
                dtype=self.resident.dtype,
            )
        )
        return True

    def release(self) -> None:
        """See Decoding.release."""
        for row in self._going:
            if self.resident is not None:
                self.resident.runner.release(row)
        self.resident = None
        self.unplaced, self._going = [], []

    def fail(self, error: RoseError) -> None:
        """Say that the request cannot be answered."""
        self.sink(Failed(error=error))
