"""Runs the source of a python grader in a child process that is shut off: see docs/graders.md for what it cannot do.

Linux only: a seccomp list of allowed system calls, which has no network, processes, signals or writing; namespaces with
an almost empty read-only root, or where they are refused Landlock in their place; no rights; limits of memory, time and
output. Where the machine refuses a part of that, nothing runs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from rose.errors import InvalidRequest
from rose.graders import seccomp
from rose.ids import new_id

SECONDS = 60.0
"""Longest run of a source, by the clock and of CPU time."""
MEMORY_BYTES = 1 << 30
"""Most address space."""
MAX_RESULT_BYTES = 64 << 10
START_SECONDS = 60.0
"""Longest wait for the sandbox itself, on a busy machine."""
WAYS = ("namespaces", "landlock")
"""How the files of the machine are kept out of reach; the first that the machine allows is taken."""
_STAGE = Path(__file__).with_name("stage.py")
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYSTEM_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
"""Shared libraries, which Python's own modules load."""
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    # No threads can be started in the sandbox; the libraries need not try.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
_PROBE = """
import os, socket

def refused(attempt):
    try:
        attempt()
    except (OSError, RuntimeError):
        return True
    return False

def grade(sample, item):
    attempts = [
        lambda: socket.socket(),
        lambda: socket.socket(socket.AF_UNIX),
        lambda: os.fork(),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.listdir("/proc"),
        lambda: open("/etc/passwd"),
        lambda: open(item["outside"]),
        lambda: open("/written", "w"),
        lambda: os.mkdir("/made"),
        lambda: os.kill(item["parent"], 0),
        lambda: os.setuid(0),
    ]
    return sum(refused(attempt) for attempt in attempts) / len(attempts)
"""
"""What must be refused before anything else is run on this machine."""


class Unavailable(InvalidRequest):
    """Python graders cannot run on this server."""

    default_code = "python_grader_unavailable"


class SandboxFailed(Exception):
    """The child could not be started now, through no fault of the source."""


class SourceFailed(Exception):
    """The source gave no reward; the message says why, for its writer."""


class _Said(msgspec.Struct):
    """What the child wrote."""

    refused: str | None = None
    error: str | None = None
    reward: float | None = None
    defined: bool = False


class Run:
    """One run of a source. `reward` blocks; `kill` may be called from another thread at any time."""

    def __init__(
        self,
        source: str,
        sample: dict[str, Any] | None,
        item: Any,
        *,
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        ways: Sequence[str] = WAYS,
    ) -> None:
        """With `sample` None the source is only loaded, and its function looked for."""
        self._ways = ways
        self._asked = {"source": source, "sample": sample, "item": item}
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._lock = threading.Lock()

    def reward(self) -> float:
        """Return what `grade` returns (0 when it is only looked for).

        Raises: Unavailable when this machine has no sandbox, SandboxFailed when it cannot be started now, SourceFailed
        for all that is up to the source.
        """
        require()
        return self.result()

    def kill(self) -> None:
        """End the run, started or not; idempotent."""
        with self._lock:
            self._killed = True
            if self._process is not None and self._process.returncode is None:
                # The child leads a group of its own, and what it has started cannot leave that.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def result(self) -> float:
        """Do as `reward`, without the check of the machine that comes before the first source."""
        with tempfile.TemporaryFile() as plan:
            plan.write(msgspec.json.encode(self._plan()))
            plan.seek(0)
            process = self._start(plan)
            assert process.stdout is not None
            try:
                data, in_time = _read(process.stdout.fileno(), self._seconds)
            finally:
                self.kill()
                process.stdout.close()
                process.wait()
        return self._understood(data, in_time)

    def _start(self, plan: Any) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._killed:
                raise SandboxFailed("The run was given up.")
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(_STAGE)],
                    stdin=plan,
                    stdout=subprocess.PIPE,
                    stderr=None,
                    env=ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxFailed(f"The child process cannot be started: {error.strerror}.") from error
            return self._process

    def _plan(self) -> dict[str, Any]:
        machine = platform.machine()
        return {
            **self._asked,
            "parent": os.getpid(),
            "ways": list(self._ways),
            "folders": _folders(),
            "paths": _paths(),
            "pivot_root": _PIVOT_ROOT[machine],
            "filter": seccomp.program(machine).hex(),
            "memory_bytes": self._memory_bytes,
            "cpu_seconds": math.ceil(self._seconds) + 1,
        }

    def _understood(self, data: bytes, in_time: bool) -> float:
        if not data.startswith(b"+"):
            said = _decoded(data)
            if said is not None and said.refused is not None:
                raise Unavailable(
                    f"Python graders cannot run on this server: it does not allow {said.refused}.",
                    hint="docs/graders.md says what the sandbox needs.",
                )
            raise SandboxFailed("The child process ended before its sandbox was closed.")
        if len(data) > MAX_RESULT_BYTES:
            raise SourceFailed(f"The grader wrote more than {MAX_RESULT_BYTES >> 10} kB in place of its result.")
        if not in_time:
            raise SourceFailed(f"The grader took more than {self._seconds:g} seconds.")
        said = _decoded(data[1:])
        if said is None or (said.reward is None and said.error is None and not said.defined):
            raise SourceFailed(
                "The grader's process ended without a result: it ended itself, or was killed for the memory or the "
                "CPU time that it used."
            )
        if said.error is not None:
            raise SourceFailed(said.error)
        return said.reward or 0.0


def _read(descriptor: int, seconds: float) -> tuple[bytes, bool]:
    """Return what comes until the end, the limit or the deadline, and whether the end came in time."""
    data = b""
    deadline = time.monotonic() + START_SECONDS
    while len(data) <= MAX_RESULT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return data, False
        piece = os.read(descriptor, MAX_RESULT_BYTES)
        if not piece:
            return data, True
        if not data:
            deadline = time.monotonic() + seconds
        data += piece
    return data, True


def _decoded(data: bytes) -> _Said | None:
    try:
        return msgspec.json.decode(data, type=_Said)
    except msgspec.DecodeError:
        return None


def require() -> None:
    """Check, once, that this machine closes the sandbox.

    Raises: Unavailable; SandboxFailed when it cannot be said now.
    """
    reason = _reason()
    if reason is not None:
        raise Unavailable(reason)


def forget() -> None:
    """Check this machine anew before the next source."""
    _reason.cache_clear()


@functools.cache
def _reason() -> str | None:
    """Return why nothing can run here, or None when all that must be refused is refused."""
    if sys.platform != "linux":
        return f"Python graders need Linux, whose sandbox they run in; this server is {platform.system()}."
    if platform.machine() not in seccomp.MACHINES:
        return f"Python graders run on {' and '.join(seccomp.MACHINES)}; this server is {platform.machine()}."
    outside = Path(tempfile.gettempdir()) / new_id("rose-outside-")
    outside.touch()
    try:
        probe = Run(_PROBE, {}, {"outside": str(outside), "parent": os.getpid()})
        held = probe.result()
    except Unavailable as error:
        return str(error)
    except SourceFailed as error:
        return f"Python graders cannot run on this server: the check of its sandbox failed: {error}"
    finally:
        outside.unlink()
    if held != 1.0:
        return f"Python graders cannot run on this server: its sandbox holds {held:.0%} of what it must hold."
    return None


def _folders() -> list[str]:
    """Return the folders that the sandbox shows: shared libraries, Python's own, and installed packages."""
    python = [*_paths(), f"{sys.base_prefix}/lib", f"{sys.prefix}/lib"]
    wanted = [path for path in (*_SYSTEM_FOLDERS, *python) if os.path.isdir(path)]
    real = sorted({path if path in _SYSTEM_FOLDERS else os.path.realpath(path) for path in wanted})
    return [path for path in real if not any(path.startswith(f"{other}/") for other in real)]


def _paths() -> list[str]:
    """Return where the source's imports are looked for: the standard library, then installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = [sysconfig.get_path(name) for name in names]
    dynamic = [f"{found[1]}/lib-dynload", *(path for path in sys.path if path.endswith("lib-dynload"))]
    ordered = [*found[:2], *dynamic, *found[2:]]
    return list(dict.fromkeys(os.path.realpath(path) for path in ordered if os.path.isdir(path)))
