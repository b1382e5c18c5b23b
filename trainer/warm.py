"""A training child that waits: `python -m trainer.warm ROOM` imports what a run needs, then runs the one it is given.

Started by trainer/spare.py; from the specification on it is trainer/run.py and nothing else. It waits for any length of
time, and ends when its standard input closes, that is, with its supervisor. Holds no data and no model while it waits.
Its argument is only room for the command line by which people find the child of a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from pathlib import Path

import msgspec

from trainer.child import REPORT_FD, Channel, stop_abandoned
from trainer.protocol import Begin, PhaseChanged

MODULES = (
    "trainer.run",
    # What a run imports later, by the kind of its base: those of the built-in models, which are the most used.
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)
LOWEST_PRIORITY = 19
OOM_SCORE = Path("/proc/self/oom_score_adj")
FIRST_TO_DIE = "1000"


def main() -> int:
    """Wait for a specification, run it and return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(int(os.environ[REPORT_FD]), 0, 0.0)
    with _first_to_die():
        imports = threading.Thread(target=_import, args=(channel,), name="imports", daemon=True)
        imports.start()
        begin = msgspec.json.decode(_read_line(), type=Begin)
        imports.join()
    channel.report(PhaseChanged(phase="load"))
    _show_as(sys.executable, "-m", "trainer.run", begin.specification)
    from trainer import run

    return run.main([begin.specification])


def _import(channel: Channel) -> None:
    """Import everything and say so; in a thread, because only a thread's low priority can be left behind again."""
    if sys.platform == "linux":  # elsewhere a priority belongs to the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    try:
        for name in MODULES:
            importlib.import_module(name)
    except BaseException:  # whatever it is: a cold child will say it to the user
        traceback.print_exc()
        os._exit(1)
    channel.report(PhaseChanged(phase="wait"))


def _read_line() -> bytes:
    """Read one line from standard input, byte by byte: what follows it are the run's orders."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            stop_abandoned("the supervisor closed the pipe")
        line += byte
    return line


def _show_as(*arguments: str) -> None:
    """Let the process list show another command line, cut to the room there is; only Linux has a way."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Fields 48 and 49 of proc_pid_stat(5); the first two are cut off, since a name may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        room = end - start - 1
        if ctypes.string_at(start, room + 1) == Path("/proc/self/cmdline").read_bytes():
            ctypes.memmove(start, "\0".join(arguments).encode()[:room].ljust(room), room)


@contextlib.contextmanager
def _first_to_die() -> Generator[None]:
    """Offer this process to the kernel first when memory runs out: no run may fail because a child waits."""
    former = ""
    with contextlib.suppress(OSError):
        former = OOM_SCORE.read_text()
        OOM_SCORE.write_text(FIRST_TO_DIE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            OOM_SCORE.write_text(former)


if __name__ == "__main__":
    sys.exit(main())
