"""Runs `rose up` as people do, and sees what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from cli.commands.server import NEXT_STEP
from rose.local import state
from rose.settings import Settings, load

START_SECONDS = 180
KINDS = ["postgres", "nats", "projections", "api", "trainer", "inference"]


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RoseUp:
    """`rose up` on a data folder of its own."""

    def __init__(self, data_dir: Path, environment: Mapping[str, str] | None = None) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "ROSE_TEST_DATABASE_URL"}
        self.environment = {
            **inherited,
            "ROSE_DATA_DIR": str(data_dir),
            "ROSE_PORT": str(free_port()),
            "ROSE_WARM_CHILD": "0",  # where few jobs run, it only takes the cores from other tests
            **(environment or {}),
        }
        self.settings: Settings = load(self.environment)
        self.process: subprocess.Popen[str] | None = None
        self.lines: list[str] = []

    def rose(self, *arguments: str, seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run a command against this data folder."""
        return subprocess.run(
            [sys.executable, "-m", "cli.app", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def start(self) -> None:
        """Start `rose up` and wait until it says where it answers."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.app", "up"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.rstrip() == NEXT_STEP:
                return
        self.process.stdout.close()
        status = self.process.wait()
        raise AssertionError(f"rose up ended with status {status}: " + "\n".join(self.lines))

    def running(self) -> state.Running:
        """Return what `rose status` knows."""
        found = state.status(self.settings)
        assert found is not None
        return found

    def pid_of(self, kind: str) -> int | None:
        """Return the number of a supervised process."""
        return next(one.pid for one in self.running().processes if one.kind == kind)

    def family(self) -> list[psutil.Process]:
        """Return `rose up` and everything below it."""
        parent = psutil.Process(self.running().pid)
        return [parent, *parent.children(recursive=True)]

    def end(self, number: signal.Signals = signal.SIGINT, seconds: float = 60) -> int:
        """Signal `rose up`, as Ctrl-C does, and return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        assert self.process.stdout is not None
        with self.process.stdout:
            self.lines += self.process.stdout.read().splitlines()
        return self.process.wait(timeout=seconds)


def command_of(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty when it has ended, also while nobody has waited for it."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def assert_all_end(processes: list[psutil.Process], seconds: float = 30) -> None:
    """Fail unless all of the processes end soon."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    shown = [process.name() for process in left]
    for process in left:
        process.kill()
    assert shown == []


@contextmanager
def rose_up(data_dir: Path, environment: Mapping[str, str] | None = None) -> Iterator[RoseUp]:
    """Yield a running `rose up`; whatever the test does with it, nothing is left afterwards."""
    up = RoseUp(data_dir, environment)
    try:
        up.start()
        yield up
    finally:
        if up.process is not None and up.process.poll() is None:
            family = up.family()
            up.end()
            assert_all_end(family)
        if up.process is not None and up.process.stdout is not None:
            up.process.stdout.close()


def json(text: str) -> dict[str, object]:
    """Return the object in a command's output."""
    return msgspec.json.decode(text, type=dict[str, object])
