"""What a running `rose up` leaves in the data folder for others: its lock, its addresses, its processes.

`lock` is held as long as `rose up` lives (the kernel lets go of it, also after a kill -9); the other files count only
while it is held. All of them are private.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from rose.errors import InvalidState, Unavailable
from rose.local import processes
from rose.local.nats import write_private
from rose.settings import Settings


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One supervised process."""

    kind: str
    """postgres, nats, api, projections, trainer or inference."""
    state: str
    """starting, running, waiting (crashed, started again soon) or stopped."""
    pid: int | None
    restarts: int
    log: str
    """Path of its log file."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A running `rose up`."""

    pid: int
    url: str
    """Address of the API."""
    data_dir: str
    started_at: str
    """ISO 8601, UTC."""
    ready: bool = False
    processes: tuple[Process, ...] = ()


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses and token of the services of a running `rose up`."""

    database_url: str
    nats_url: str | None
    nats_token: str | None


Stored = TypeVar("Stored", Running, Connection)


@contextmanager
def hold(settings: Settings) -> Generator[None]:
    """Hold the lock on the data folder.

    Raises: InvalidState naming where the other `rose up` answers.
    """
    fd = os.open(settings.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise already_running(settings) from None
        _forget(settings)  # what a killed one left names processes that may be anybody's by now
        try:
            yield
        finally:
            _forget(settings)
    finally:
        os.close(fd)


def _forget(settings: Settings) -> None:
    for name in ("running.json", "connection.json"):
        (settings.data_dir / name).unlink(missing_ok=True)


def already_running(settings: Settings) -> InvalidState:
    """Return the error for a second `rose up` on the same data folder."""
    other = _read(settings.data_dir / "running.json", Running)
    where = f"and answers at {other.url} (process {other.pid})" if other else "and is just starting"
    return InvalidState(
        f"ROSE already runs on the data folder {settings.data_dir} {where}.",
        code="already_running",
        hint="See it with `rose status`, end it with `rose down`, or use another folder: ROSE_DATA_DIR=…",
    )


def held(settings: Settings) -> bool:
    """Return whether a `rose up` lives on the data folder."""
    try:
        fd = os.open(settings.data_dir / "lock", os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def status(settings: Settings) -> Running | None:
    """Return the `rose up` that runs on the data folder, or None."""
    return _read(settings.data_dir / "running.json", Running) if held(settings) else None


def down(settings: Settings) -> bool:
    """End the `rose up` that runs on the data folder and wait for its end; return whether there was one.

    Raises: Unavailable when it does not end in time.
    """
    running = status(settings)
    if running is None:
        return False
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(running.pid, signal.SIGTERM)
    if not processes.wait(running.pid, settings.drain_seconds + 90):
        raise Unavailable(
            f"ROSE (process {running.pid}) does not end.",
            code="does_not_end",
            hint=f"Its run makes a recovery point first; to end it at once: kill {running.pid}",
        )
    return True


def connection(settings: Settings) -> Settings:
    """Return the settings with the addresses of a running `rose up` filled in where none are given.

    Raises: Unavailable when there is no database to use.
    """
    stored = _read(settings.data_dir / "connection.json", Connection) if held(settings) else None
    if stored is not None and settings.database_url in (None, stored.database_url):
        settings = msgspec.structs.replace(settings, database_url=stored.database_url)
        if settings.nats_url is None:
            settings = msgspec.structs.replace(settings, nats_url=stored.nats_url, nats_token=stored.nats_token)
    if settings.database_url is None:
        raise Unavailable(
            f"There is no database: nothing runs on the data folder {settings.data_dir}.",
            code="no_database",
            hint="Start ROSE with `rose up`, or give a Postgres with ROSE_DATABASE_URL.",
        )
    return settings


def store(settings: Settings, value: Running | Connection) -> None:
    """Write what others may know; only the holder of the lock calls this."""
    name = "running.json" if isinstance(value, Running) else "connection.json"
    write_private(settings.data_dir / name, msgspec.json.encode(value).decode())


def _read(path: Path, kind: type[Stored]) -> Stored | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
