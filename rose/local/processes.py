"""Find and end processes that are not our children: the leftovers of a killed `rose up`.

A process is found by connecting to its socket or by its command line, never by a bare number from a file.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

_LOCAL_PEERPID = 2  # macOS, sys/un.h


def listener(path: Path) -> int | None:
    """Return the number of the process that listens on the unix socket `path`; None when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(2.0)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        if sys.platform == "linux":
            # The kernel stores the credentials of whoever called listen(), also when that process is stopped.
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return struct.unpack("3i", raw)[0]
        return connection.getsockopt(0, _LOCAL_PEERPID)


def arguments(pid: int) -> list[str]:
    """Return the command line of a process; empty when there is none (or it is a zombie)."""
    if sys.platform == "linux":
        try:
            raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [os.fsdecode(part) for part in raw.split(b"\0") if part]
    shown = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.split()


def runs(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(arguments(pid))


def end(pid: int, number: signal.Signals = signal.SIGTERM, *, grace_seconds: float = 10.0) -> None:
    """Signal a process, wait for its end and kill it when it takes longer than `grace_seconds`."""
    for step, seconds in ((number, grace_seconds), (signal.SIGKILL, 10.0)):
        try:
            os.kill(pid, signal.SIGCONT)  # a stopped process would not see the signal
            os.kill(pid, step)
        except ProcessLookupError:
            return
        if wait(pid, seconds):
            return
    raise TimeoutError(f"process {pid} does not end")


def wait(pid: int, seconds: float) -> bool:
    """Wait for the end of any process, also of one that is not our child; return whether it ended."""
    if hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            ready, _, _ = select.select([fd], [], [], seconds)
        finally:
            os.close(fd)
        return bool(ready)
    deadline = time.monotonic() + seconds
    while runs(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
