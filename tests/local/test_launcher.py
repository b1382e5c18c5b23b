"""A launched program ends with whoever launched it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rose.local import launcher

pytestmark = pytest.mark.anyio

LAUNCH_AND_WAIT = """
import signal, subprocess, sys
from rose.local import launcher
command, fds = launcher.command(["sleep", "600"], death_signal=signal.{name}, watch_pipe={watch})
child = subprocess.Popen(command, pass_fds=fds)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("watch", [False, True], ids=["pdeathsig", "pipe"])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_the_program_ends_when_its_parent_is_killed(name: str, watch: bool) -> None:
    if not watch and sys.platform != "linux":
        pytest.skip("PDEATHSIG is Linux's; elsewhere the pipe is used")
    parent = subprocess.Popen(
        [sys.executable, "-c", LAUNCH_AND_WAIT.format(name=name, watch=watch)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    with parent.stdout:
        program = psutil.Process(int(parent.stdout.readline()))
    assert program.is_running()
    parent.kill()
    parent.wait()
    program.wait(timeout=10)


def test_the_watcher_ends_with_the_program() -> None:
    command, fds = launcher.command(["sleep", "600"], watch_pipe=True)
    with subprocess.Popen(command, pass_fds=fds) as program:
        watcher = _watcher_of(program.pid)
        program.terminate()
        program.wait(timeout=10)
        watcher.wait(timeout=10)
    assert program.returncode == -signal.SIGTERM


def _watcher_of(pid: int) -> psutil.Process:
    """Return the process that was forked from the launcher before it became the program."""
    started = psutil.Process(pid)
    found: list[psutil.Process] = []
    while not found:
        assert started.is_running()
        found = [
            process
            for process in psutil.process_iter(["cmdline"])
            if launcher.__file__ in (process.info["cmdline"] or [])
            and "sleep" in process.info["cmdline"]
            and f"--parent={os.getpid()}" in process.info["cmdline"]
            and process.pid != pid
            and process.ppid() != pid
        ]
    return found[0]


def test_nothing_is_started_for_a_parent_that_has_gone(tmp_path: Path) -> None:
    command, _ = launcher.command(["touch", tmp_path / "started"])
    command = [f"--parent={2**22 - 1}" if word.startswith("--parent=") else word for word in command]
    assert subprocess.run(command, check=False).returncode == 1
    assert not (tmp_path / "started").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
def test_root_gives_up_its_rights_for_good() -> None:
    command, _ = launcher.command(["id"], account="nobody")
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "uid=65534(nobody)" in shown
    assert "root" not in shown
