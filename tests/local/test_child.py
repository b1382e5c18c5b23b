"""A supervised process comes back when it crashes, and goes when it must."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from rose.errors import Unavailable
from rose.local import launcher
from rose.local.child import Child
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

DEAF = "trap '' TERM INT; echo up; while :; do read -t 600 line < /dev/zero; done"


class Shell:
    """Makes children that run a shell script."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "child.log"
        self.lines: list[str] = []

    def child(self, script: str, *, prepare: Callable[[], object] | None = None, stop_seconds: float = 10.0) -> Child:
        return Child(
            "shell",
            lambda: launcher.command(["bash", "-c", script]),
            log=self.log,
            prepare=prepare,
            stop_seconds=stop_seconds,
            on_change=lambda: None,
            on_line=self.lines.append,
        )

    def said(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@asynccontextmanager
async def running(child: Child) -> AsyncIterator[Child]:
    await child.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child.run)
        yield child
        await child.stop()


async def test_a_crash_is_told_and_mended(shell: Shell) -> None:
    async with running(shell.child("echo up; exec sleep 600")) as child:
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        second = await eventually(lambda: child.pid if child.pid != first else None)
        assert second != first
        assert child.restarts == 1
    assert shell.lines == [f"shell ended with signal SIGKILL; starting it again in 0.5 s (log: {shell.log})"]
    assert child.shown().state == "stopped"


async def test_the_pauses_grow_while_it_keeps_crashing(shell: Shell) -> None:
    async with running(shell.child("exit 3")):
        await eventually(lambda: len(shell.lines) >= 3)
    assert ["status 3" in line for line in shell.lines[:3]] == [True, True, True]
    assert [line.split(" in ")[1].split(" (")[0] for line in shell.lines[:3]] == ["0.5 s", "1.0 s", "2.0 s"]


async def test_a_failing_preparation_of_a_restart_is_tried_again(shell: Shell) -> None:
    tries: list[int] = []

    def prepare() -> None:
        tries.append(len(tries))
        if len(tries) == 2:
            raise Unavailable("the disk is away")

    async with running(shell.child("exec sleep 600", prepare=prepare)) as child:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await eventually(lambda: len(tries) == 3 and child.pid)
    assert "cannot be started: the disk is away" in shell.lines[1]


async def test_stop_is_gentle_first(shell: Shell) -> None:
    async with running(shell.child("trap 'echo bye; kill $!; exit 0' TERM; sleep 600 & echo up; wait")):
        await eventually(lambda: shell.said("up"))
    assert shell.said("bye")
    assert shell.lines == []


async def test_stop_kills_what_does_not_listen(shell: Shell) -> None:
    async with running(shell.child(DEAF, stop_seconds=0.2)) as child:
        await eventually(lambda: shell.said("up"))
        pid = child.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_kill_does_not_wait(shell: Shell) -> None:
    async with running(shell.child(DEAF, stop_seconds=600)) as child:
        await eventually(lambda: shell.said("up"))
        child.kill()
        with anyio.fail_after(10):
            await child.stop()
    assert child.shown().state == "stopped"


async def test_a_suspended_process_is_stopped_too(shell: Shell) -> None:
    async with running(shell.child("trap 'echo bye; kill $!; exit 0' TERM; sleep 600 & echo up; wait")) as child:
        await eventually(lambda: shell.said("up"))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
    assert shell.said("bye")


async def test_its_log_is_private_and_kept_over_restarts(shell: Shell) -> None:
    async with running(shell.child("echo once; exit 1")):
        await eventually(lambda: len(shell.lines) >= 2)
    assert shell.log.read_text().count("once") >= 2
    assert shell.log.stat().st_mode & 0o777 == 0o600
