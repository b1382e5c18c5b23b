"""Turns a run's reports into appends: in order, none lost, each once, about one append a second.

Steps that follow each other become one append; whatever comes between them is appended in its place. What is not yet
appended stays here, bounded, while Postgres is away. Outcomes are not written here: the supervision decides them.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque

import anyio
import anyio.to_thread

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.domain.job_commands import (
    ChangePhase,
    NoteResume,
    ReportSteps,
    SaveCheckpoint,
    SaveRecoveryPoint,
    Warn,
)
from rose.ids import new_id
from trainer.ownership import OwnedJob
from trainer.protocol import CheckpointMade, PhaseChanged, RecoveryPointMade, Resumed, StepDone, Warned

log = logging.getLogger(__name__)

Entry = PhaseChanged | Resumed | StepDone | RecoveryPointMade | CheckpointMade | Warned

PACE_SECONDS = 1.0
"""Least time between two rounds of appends, unless something urgent came."""
MAX_STEPS = 200
"""Steps in one event; at some 500 bytes each that is well under the 256 kB an event may have."""
MAX_PENDING = 50_000
"""Reports that wait while Postgres is away (some 25 MB); a child that makes more has to wait."""


class Journal:
    """The reports of one run on their way into the log. One task runs `write`."""

    def __init__(self, owned: OwnedJob, blobs: Blobs) -> None:
        self._owned = owned
        self._blobs = blobs
        self._pending: deque[Entry] = deque()
        self._appended = 0
        self._urgent = False
        self._news = anyio.Event()
        self._progress = anyio.Event()
        self._recovery_points = {point.artifact for point in owned.state.recovery_points}

    @property
    def full(self) -> bool:
        """True while `put` has to wait."""
        return len(self._pending) >= MAX_PENDING

    async def put(self, entry: Entry) -> None:
        """Take a report; waits only when very many are pending."""
        while self.full:
            await self._progress.wait()
        self._pending.append(entry)
        self._urgent = self._urgent or not isinstance(entry, StepDone | PhaseChanged)
        self._news.set()

    async def flush(self) -> None:
        """Return once everything that was put is in the log."""
        self._urgent = True
        self._news.set()
        while self._pending:
            await self._progress.wait()

    async def write(self) -> None:
        """Append what comes in, until cancelled. Raises: StaleEpoch."""
        while True:
            while not self._pending:
                await self._hear()
            began = anyio.current_time()
            self._urgent = False
            await self._write(len(self._pending))
            with anyio.move_on_after(began + PACE_SECONDS - anyio.current_time()):
                while not self._urgent:
                    await self._hear()

    async def _hear(self) -> None:
        self._news = anyio.Event()
        await self._news.wait()

    async def _write(self, count: int) -> None:
        """Append the oldest `count` reports; what comes meanwhile is for the next round."""
        done = self._appended + count
        while self._appended < done:
            entries = self._next(done - self._appended)
            name = f"{self._appended + 1}-{self._appended + len(entries)}"
            await self._owned.append(self._command(entries), name)
            if isinstance(entries[0], RecoveryPointMade):
                await self._sweep(entries[0].artifact)
            self._appended += len(entries)
            for _ in entries:
                self._pending.popleft()
            self._progress.set()
            self._progress = anyio.Event()

    def _next(self, at_most: int) -> list[Entry]:
        """Return the reports of the next append: the oldest, or as many as are steps in a row."""
        oldest = itertools.islice(self._pending, min(at_most, MAX_STEPS))
        steps: list[Entry] = list(itertools.takewhile(lambda entry: isinstance(entry, StepDone), oldest))
        return steps or [self._pending[0]]

    def _command(
        self, entries: list[Entry]
    ) -> ChangePhase | NoteResume | ReportSteps | SaveRecoveryPoint | SaveCheckpoint | Warn:
        epoch = self._owned.lease.epoch
        match entries[0]:
            case PhaseChanged(phase=phase):
                return ChangePhase(epoch=epoch, phase=clean(phase))
            case Resumed(from_step=step, rejected=rejected, anew=anew):
                return NoteResume(epoch=epoch, from_step=step, rejected=tuple(map(clean, rejected)), anew=anew)
            case RecoveryPointMade(step=step, artifact=artifact, trained_tokens=tokens):
                return SaveRecoveryPoint(epoch=epoch, step=step, artifact=artifact, trained_tokens=tokens)
            case CheckpointMade(step=step, epoch_number=number, artifact=artifact, metrics=metrics):
                return SaveCheckpoint(
                    epoch=epoch,
                    at=int(time.time()),
                    checkpoint_id=new_id("ftckpt_"),
                    step=step,
                    epoch_number=number,
                    artifact=artifact,
                    metrics=metrics,
                )
            case Warned(code=code, message=message):
                return Warn(epoch=epoch, code=clean(code), message=clean(message))
            case StepDone():
                steps = tuple(entry.metrics for entry in entries if isinstance(entry, StepDone))
                return ReportSteps(epoch=epoch, steps=steps)

    async def _sweep(self, newest: Artifact) -> None:
        """Delete recovery points that the job no longer names. A failure only costs disk space."""
        self._recovery_points.add(newest)
        named = {point.artifact for point in self._owned.state.recovery_points}
        for artifact in self._recovery_points - named:
            try:
                await anyio.to_thread.run_sync(self._blobs.delete, artifact.path)
            except OSError as error:
                log.warning("The old recovery point %s could not be deleted: %s", artifact.path, error)
        self._recovery_points &= named


def clean(text: str) -> str:
    """Return text that the log can hold: no NUL, no lone surrogates, bounded."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()[:4000]
