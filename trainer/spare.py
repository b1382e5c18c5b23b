"""Keeps one training child waiting (trainer/warm.py), so that a claimed job need not wait for torch to be imported.

The supervisor's side: never torch. A spare is used once; whenever there is none that answers, the caller starts a
child of its own, and nobody notices more than some seconds.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from rose.bus import Wake
from trainer import child_process
from trainer.child_process import BrokenReport, Child, Launch
from trainer.specifications import WARM_MODULE

log = logging.getLogger(__name__)

REPLACE_SECONDS = 120.0
"""After a spare was used or died: the longest time until the next is started, when no run reports a step before."""

COMMAND = (sys.executable, "-m", WARM_MODULE, "-" * 240)
"""The dashes are room for the path of a specification, which the process list shows once there is one."""


class Spare:
    """The child that waits. `run` keeps it; `begin` gives it a run, and `replace` says that the next may be started.

    `threads` is what every spare is good for: a run that wants another number gets none.
    """

    def __init__(self, launch: Launch, threads: int | None) -> None:
        self._launch = launch
        self._threads = threads
        self._waiting: _Waiting | None = None
        self._wanted = Wake()

    @property
    def pid(self) -> int | None:
        """Process id of the child that is ready for a run; None while there is none."""
        return self._waiting.child.pid if self._waiting is not None else None

    @property
    def memory_bytes(self) -> int | None:
        """Resident memory of the child that is ready; None while there is none, or where the system does not tell."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return None

    async def run(self) -> None:
        """Start one child after another until cancelled, at which those that live are killed."""
        async with anyio.create_task_group() as children:
            while True:
                gone = anyio.Event()
                children.start_soon(self._hold, gone)
                await gone.wait()
                self._wanted = Wake()
                await self._wanted.wait(REPLACE_SECONDS)

    def replace(self) -> None:
        """Start the next child now, if the former one is gone; the run it went to is past its first seconds."""
        self._wanted.set()

    @asynccontextmanager
    async def begin(
        self, specification: Path, *, threads: int | None, log_path: Path
    ) -> AsyncGenerator[Child | None, None]:
        """Give the spare this run and yield it; None when there is none for it. At the block's end it is dead."""
        waiting = self._waiting
        if waiting is None or threads != self._threads:
            yield None
            return
        self._waiting = None
        waiting.taken.set()
        try:
            await waiting.released.wait()
            begun = await waiting.child.begin(specification, log_path)
            if not begun:
                log.warning("The waiting child %d did not answer; a new one is started.", waiting.child.pid)
                await waiting.end()  # before another child runs the same specification
            yield waiting.child if begun else None
        finally:
            await waiting.end()

    async def _hold(self, gone: anyio.Event) -> None:
        """See a child through to its end, in one task, as its scope demands; `gone` is set once it is no spare."""
        waiting = None
        try:
            async with child_process.start(COMMAND, None, launch=self._launch) as child:
                waiting = _Waiting(child)
                await self._wait(waiting)
                gone.set()
                waiting.released.set()
                if waiting.taken.is_set():
                    await waiting.done.wait()
                else:
                    log.warning("The waiting child %d is gone: %s", child.pid, child.log.last_line or "it said nothing")
        except Exception:  # a trainer works without a spare
            log.exception("No training child could be kept waiting.")
        finally:
            gone.set()
            if waiting is not None:
                self._waiting = None if self._waiting is waiting else self._waiting
                waiting.released.set()
                waiting.dead.set()

    async def _wait(self, waiting: _Waiting) -> None:
        """Return when the child was taken or has ended."""
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                try:
                    if await waiting.child.next_report() is not None:
                        log.info("Child %d waits for the next run.", waiting.child.pid)
                        self._waiting = waiting
                        await waiting.child.next_report()  # it says nothing while it waits: this is its end
                except BrokenReport as error:
                    log.warning("The waiting child %d: %s", waiting.child.pid, error)
                if self._waiting is waiting:
                    self._waiting = None
                tasks.cancel_scope.cancel()

            tasks.start_soon(listen)
            await waiting.taken.wait()
            tasks.cancel_scope.cancel()


class _Waiting:
    """A child and how far it is: taken by a run, released by its keeper, done with, dead."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.taken = anyio.Event()
        self.released = anyio.Event()
        self.done = anyio.Event()
        self.dead = anyio.Event()

    async def end(self) -> None:
        """Let the keeper kill the child, and wait until it is dead; again, it does nothing."""
        self.done.set()
        with anyio.CancelScope(shield=True):
            await self.dead.wait()
