"""One child process of a supervisor: start, reports, orders, its capped log file, kill. Decides nothing, knows no job.

The child's standard output and error are always drained, whoever watches, so that it can never block on them. It runs
in a session of its own (Ctrl-C in the terminal is the supervisor's business) and dies with its supervisor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT

import anyio
import msgspec
from anyio.abc import ByteReceiveStream, Process

from rose.errors import RoseError
from trainer.child import REPORT_FD
from trainer.protocol import Begin, Order, Report

log = logging.getLogger(__name__)

Launch = Callable[[Sequence[str]], tuple[list[str], tuple[int, ...]]]
"""Returns the command line that runs a program so that it dies with this process, and the descriptors it needs; that
is `rose.local.launcher.command`, passed in because the trainer stands below `rose.local`."""
LOG_CAP_BYTES = 8 << 20
"""A run's log holds the newest one to two times this much, in the file and its `.1`."""
KEPT_TAIL_BYTES = 4096
READ_BYTES = 1 << 16
MAX_REPORT_BYTES = 1 << 22
"""Far above the longest honest report; more without a newline is not a report."""
ORDER_SECONDS = 1.0
"""A working child takes an order at once; a stopped one leaves the pipe full."""
BEGIN_SECONDS = 5.0
"""A waiting child answers in milliseconds, unless it was stopped; a cold one starts in about this time."""
OOM_SOURCES = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
"""Where the kernel counts what it killed: on the machine, and in this container."""
KILL_SECONDS = 10.0
"""SIGKILL ends even a stopped process at once; only a process inside a broken driver takes longer."""


class BrokenReport(RoseError):
    """The child wrote something that is not a report."""

    default_code = "broken_report"


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a child ended."""

    status: int
    """Exit status, or minus the signal's number."""
    out_of_memory: bool = False
    """The kernel killed a process for memory while this one ran, and this one died by SIGKILL."""

    def __str__(self) -> str:
        if self.out_of_memory:
            return "killed by the kernel because the machine (or its container) ran out of memory"
        if self.status >= 0:
            return f"exit status {self.status}"
        try:
            return f"killed by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"killed by signal {-self.status}"


class RunLog:
    """The log file of one run: it keeps the newest output and never grows beyond two caps.

    A full disk loses log lines, never the run. Writes go to the page cache, so they are made in the event loop.
    Without a path the newest KEPT_TAIL_BYTES wait in memory until `open`: a child that waits has no run yet.
    """

    def __init__(self, path: Path | None = None, cap_bytes: int = LOG_CAP_BYTES) -> None:
        self.path: Path | None = None
        self._cap_bytes = cap_bytes
        self._tail = b""
        self._descriptor = -1
        self._bytes = 0
        if path is not None:
            self.open(path)

    def open(self, path: Path) -> None:
        """Write to `path` from now on, beginning with what waited in memory. Raises: OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._bytes = os.fstat(self._descriptor).st_size
        self.path = path
        waiting, self._tail = self._tail, b""
        self.write(waiting)

    @property
    def last_line(self) -> str:
        """The newest line that is not blank, without control characters; empty when there is none."""
        for line in reversed(self._tail.decode(errors="replace").splitlines()):
            text = "".join(character for character in line if character.isprintable()).strip()
            if text:
                return text[:500]
        return ""

    def write(self, data: bytes) -> None:
        """Append `data`, moving the file to `.1` when it is full."""
        self._tail = (self._tail + data)[-KEPT_TAIL_BYTES:]
        if self.path is None:
            return
        try:
            if self._bytes + len(data) > self._cap_bytes:
                self._rotate(self.path)
            self._bytes += os.write(self._descriptor, data)
        except OSError as error:
            log.debug("%s could not be written: %s", self.path, error)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _rotate(self, path: Path) -> None:
        path.replace(path.with_name(path.name + ".1"))
        fresh = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fresh, self._descriptor)
        os.close(fresh)
        self._bytes = 0


class Child:
    """A running child. Made by `start`; one task reads `reports`, any task may give orders or kill."""

    def __init__(self, process: Process, report_fd: int, run_log: RunLog) -> None:
        self.log = run_log
        self._process = process
        self._report_fd = report_fd
        self._oom_kills = oom_kills()
        self._killed_by_us = False
        self._lines: deque[bytes] = deque()
        self._unfinished = b""
        self._decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)

    @property
    def pid(self) -> int:
        """Process id, which is also its group's."""
        return self._process.pid

    async def reports(self) -> AsyncIterator[Report]:
        """Yield the child's reports until it closes the pipe, which a dying child always does.

        Raises: BrokenReport.
        """
        while (report := await self.next_report()) is not None:
            yield report

    async def next_report(self) -> Report | None:
        """Return the next report, None at the end of the pipe; a cancelled wait loses none. Raises: BrokenReport."""
        while not self._lines:
            await anyio.wait_readable(self._report_fd)
            chunk = os.read(self._report_fd, READ_BYTES)
            if not chunk:
                return None
            *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
            self._lines.extend(lines)
            if len(self._unfinished) > MAX_REPORT_BYTES:
                raise BrokenReport(f"The child wrote {len(self._unfinished)} bytes without a newline.")
        line = self._lines.popleft()
        try:
            return self._decoder.decode(line)
        except msgspec.DecodeError as error:
            raise BrokenReport(f"The child wrote {line[:200]!r}: {error}.") from None

    async def begin(self, specification: Path, log_path: Path) -> bool:
        """Let a waiting child run a specification, with its output in `log_path`; False when it does not answer.

        Then it has to be killed, since it may still begin. Raises: OSError when the log cannot be opened.
        """
        self.log.open(log_path)
        self._oom_kills = oom_kills()
        if not await self.order(Begin(specification=str(specification))):
            return False
        with anyio.move_on_after(BEGIN_SECONDS):
            try:
                return await self.next_report() is not None
            except BrokenReport as error:
                log.warning("The waiting child %d is not used: %s", self.pid, error)
        return False

    async def order(self, order: Order | Begin) -> bool:
        """Send an order. False when the child is gone or does not read (then the watchdog finds it)."""
        stdin = self._process.stdin
        assert stdin is not None
        with anyio.move_on_after(ORDER_SECONDS) as scope:
            try:
                await stdin.send(msgspec.json.encode(order) + b"\n")
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
                return False
        return not scope.cancelled_caught

    async def feed(self, message: msgspec.Struct) -> None:
        """Send a message, however long the child takes to read it. Raises: BrokenResourceError when it is gone."""
        assert self._process.stdin is not None
        await self._process.stdin.send(msgspec.json.encode(message) + b"\n")

    def dump_stack(self) -> None:
        """Ask for the stack of every thread in the log; a stopped child does not answer."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End the child and everything it started, at once."""
        self._killed_by_us = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def wait(self) -> Exit:
        """Wait until the child is gone and say how it ended."""
        status = await self._process.wait()
        memory = status == -signal.SIGKILL and not self._killed_by_us and oom_kills() > self._oom_kills
        return Exit(status=status, out_of_memory=memory)


@asynccontextmanager
async def start(
    arguments: Sequence[str],
    log_path: Path | None,
    *,
    launch: Launch,
    environment: Mapping[str, str] | None = None,
) -> AsyncGenerator[Child, None]:
    """Run `arguments` as a child for the length of the block, at the end of which it is dead and its log complete.

    Enter it in the thread that lives as long as the supervisor: the child dies with the thread that started it.
    Without `log_path` it waits for `Child.begin`, which says where its output goes.
    """
    command, descriptors = launch(arguments)
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    run_log = RunLog(log_path)
    try:
        try:
            process = await anyio.open_process(
                command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=STDOUT,
                env={**os.environ, **(environment or {}), REPORT_FD: str(write_fd), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                pass_fds=(write_fd, *descriptors),
            )
        finally:
            os.close(write_fd)
        child = Child(process, read_fd, run_log)
        async with process, anyio.create_task_group() as drains:
            assert process.stdout is not None
            drains.start_soon(_drain, process.stdout, run_log)
            try:
                yield child
            finally:
                await _end(child, drains.cancel_scope)
    finally:
        run_log.close()
        os.close(read_fd)


async def _drain(output: ByteReceiveStream, run_log: RunLog) -> None:
    with contextlib.suppress(anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
        while True:
            run_log.write(await output.receive(READ_BYTES))


async def _end(child: Child, drains: anyio.CancelScope) -> None:
    """Kill what is left of the child and let its last output arrive; shielded, because the child must not live on."""
    with anyio.move_on_after(KILL_SECONDS, shield=True) as patience:
        child.kill()
        await child.wait()
    if patience.cancelled_caught:
        log.error("Process %d does not die by SIGKILL; it hangs inside the system.", child.pid)
    # The drain ends by itself at the end of the stream; this bounds it when somebody else holds the pipe.
    drains.deadline = anyio.current_time() + ORDER_SECONDS


def oom_kills(sources: Sequence[Path] = OOM_SOURCES) -> int:
    """Return how many processes the kernel killed for memory since it started; 0 where it does not tell."""
    total = 0
    for path in sources:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.split()[:1] == ["oom_kill"])
    return total
