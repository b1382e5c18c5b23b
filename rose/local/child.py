"""One supervised process: started through the launcher, started again when it crashes, stopped when told to."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
from anyio.abc import Process

from rose.errors import InvalidRequest, RoseError
from rose.local import state
from rose.local.logs import open_log

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""A process that ran this long is taken for sound: its next crash starts with the shortest pause again."""

logger = logging.getLogger(__name__)


class Child:
    """A process of `rose up`. `run` it in a task; `stop` and `kill` end it for good."""

    def __init__(
        self,
        kind: str,
        command: Callable[[], tuple[list[str], tuple[int, ...]]],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], object] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_seconds: float = 15.0,
        kill_signal: signal.Signals = signal.SIGKILL,
        on_change: Callable[[], None],
        on_line: Callable[[str], object],
    ) -> None:
        self.kind = kind
        self.log = log
        self.process: Process | None = None
        self.restarts = 0
        self.ready = False
        """True once whoever knows how to ask has found that it answers; false again after a crash."""
        self.refused = False
        """True after it ended because of what it was given (exit status 2): no start without a change will help."""
        self._failure = ""
        self._command = command
        self._environment = environment
        self._prepare = prepare
        self._stop_signal = stop_signal
        self._stop_seconds = stop_seconds
        self._kill_signal = kill_signal
        self._on_change = on_change
        self._on_line = on_line
        self._stopping = anyio.Event()
        self._ended = anyio.Event()

    @property
    def pid(self) -> int | None:
        """Number of the process, None when it does not run."""
        return self.process.pid if self.process else None

    def shown(self) -> state.Process:
        """Return what `rose status` shows."""
        if self._ended.is_set():
            now = "stopped"
        elif self.process is None:
            now = "waiting"
        else:
            now = "running" if self.ready else "starting"
        return state.Process(kind=self.kind, state=now, pid=self.pid, restarts=self.restarts, log=str(self.log))

    async def start(self) -> None:
        """Start the process. Call it in the main thread: PDEATHSIG belongs to the thread that starts."""
        if self._prepare is not None:
            await anyio.to_thread.run_sync(self._prepare)
        command, fds = self._command()
        log = open_log(self.log)
        try:
            self.process = await anyio.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
                pass_fds=fds,
            )
        finally:
            os.close(log)
        if self._stopping.is_set():  # told to stop while it was being started
            self._signal(self._stop_signal)
        self._on_change()

    async def run(self) -> None:
        """Keep the process running until `stop` or `kill`; it must have been started."""
        pause = FIRST_PAUSE_SECONDS
        try:
            while True:
                started = anyio.current_time()
                why = await self._wait()
                if self._stopping.is_set():
                    return
                if anyio.current_time() - started > STEADY_SECONDS:
                    pause = FIRST_PAUSE_SECONDS
                self.restarts += 1
                self._on_change()
                self._on_line(f"{self.kind} {why}; starting it again in {pause:.1f} s (log: {self.log})")
                with anyio.move_on_after(pause):
                    await self._stopping.wait()
                    return
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                await self._start_again()
        finally:
            self._ended.set()
            self._on_change()

    async def _start_again(self) -> None:
        try:
            await self.start()
        except (RoseError, OSError) as error:
            logger.error("%s cannot be started: %s", self.kind, error)
            self._failure = f"cannot be started: {error}"

    async def _wait(self) -> str:
        """Wait for the end of the process and return how it ended."""
        if self.process is None:
            return self._failure
        code = await self.process.wait()
        self.process, self.ready, self.refused = None, False, code == InvalidRequest.exit_code
        return f"ended with {_meaning(code)}"

    async def stop(self) -> None:
        """End the process gently, or with force when it takes longer than its time; returns when it has ended."""
        self._stopping.set()
        self._signal(self._stop_signal)
        with anyio.move_on_after(self._stop_seconds):
            await self._ended.wait()
            return
        logger.warning("%s does not end within %.0f s; killing it", self.kind, self._stop_seconds)
        self.kill()
        with anyio.move_on_after(10):
            await self._ended.wait()
            return
        self._signal(signal.SIGKILL)
        with anyio.fail_after(10):
            await self._ended.wait()

    def kill(self) -> None:
        """End the process with force, at once."""
        self._stopping.set()
        self._signal(self._kill_signal)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)  # a stopped process would not see the next one
            self.process.send_signal(number)


def _meaning(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"status {code}"
