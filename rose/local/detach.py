"""`rose up --detach`: run `rose up` in a session of its own and return once it is ready.

The parent reads from a pipe what the detached process says until it is ready, or why it could not start.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import anyio
import msgspec

from rose import settings
from rose.errors import RoseError, Unavailable, error_of
from rose.local import logs, supervise

_PIPE = "ROSE_REPORT_FD"

logger = logging.getLogger(__name__)


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line on the pipe."""

    line: str | None = None
    ready: bool = False
    error: str | None = None
    status: int = Unavailable.status
    code: str | None = None
    hint: str | None = None


async def start(given: settings.Settings, on_line: Callable[[str], object]) -> None:
    """Start a detached `rose up` and return when it is ready; a cancelled start (Ctrl-C) takes it back.

    Raises: whatever kept it from starting.
    """
    await anyio.to_thread.run_sync(supervise.prepare_folder, given)
    log = given.logs / "up.log"
    reading, writing = os.pipe()
    try:
        process = _spawn(given, writing, log)
        try:
            async for said in _lines(reading):
                if said.error is not None:
                    raise _error(said)
                if said.line is not None:
                    on_line(said.line)
                if said.ready:
                    on_line("It runs in the background: rose status, rose down")
                    return
        except anyio.get_cancelled_exc_class():
            process.terminate()
            raise
        finally:
            process.returncode = 0  # it is meant to outlive this process: no warning that nobody waited for it
    finally:
        os.close(reading)
    raise Unavailable(
        f"ROSE ended while it started. The end of its log:\n{logs.last_lines(log)}",
        code="not_started",
        hint=f"The whole log: {log}",
    )


def _spawn(given: settings.Settings, writing: int, log: Path) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, with the writing end of the pipe, which is closed here."""
    output = logs.open_log(log)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "rose.local.detach"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**supervise.child_environment(given), _PIPE: str(writing)},
            cwd="/",
            start_new_session=True,
            pass_fds=(writing,),
        )
    finally:
        os.close(writing)
        os.close(output)


async def _lines(reading: int) -> AsyncGenerator[Said]:
    """Yield what comes through the pipe until its other end is closed."""
    os.set_blocking(reading, False)
    rest = b""
    while True:
        await anyio.wait_readable(reading)
        piece = os.read(reading, 65536)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line, type=Said)


def _error(said: Said) -> RoseError:
    return error_of(said.status, said.code)(said.error, code=said.code, hint=said.hint)


def main() -> None:
    """Be the detached `rose up`."""
    given = settings.load()
    logs.configure(given.log_level)
    pipe = os.fdopen(int(os.environ[_PIPE]), "wb", buffering=0)

    def say(said: Said) -> None:
        if not pipe.closed:
            try:
                pipe.write(msgspec.json.encode(said) + b"\n")
            except BrokenPipeError:  # whoever started this did not wait for it to be ready
                pipe.close()

    def on_line(line: str) -> None:
        say(Said(line=line))

    def on_ready() -> None:
        say(Said(ready=True))
        pipe.close()

    try:
        anyio.run(supervise.run, given, on_line, on_ready)
    except RoseError as error:
        logger.error("%s", error)
        say(Said(error=error.message, status=error.status, code=error.code, hint=error.hint))
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
