"""`rose up`: one command starts everything, one ends everything, and nothing survives its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from cli.commands.server import NEXT_STEP
from rose.local import state
from tests import services
from tests.eventually import eventually
from tests.in_own_loop import in_own_loop
from tests.local.rose_up import KINDS, RoseUp, assert_all_end, command_of, rose_up

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def up() -> Iterator[RoseUp]:
    """A detached `rose up` that the tests of this module share; each leaves it running and whole."""
    with services.private_folder() as folder:
        started = RoseUp(folder)
        told = started.rose("up", "--detach")
        try:
            assert told.returncode == 0, told.stderr
            started.lines = told.stdout.splitlines()
            yield started
        finally:
            family = started.family()
            assert started.rose("down").returncode == 0
            assert_all_end(family, 0)
            assert started.rose("status").returncode == 7
            assert not (folder / "connection.json").exists()


def wait_until(condition) -> Any:
    return in_own_loop(eventually(condition))


def test_detached_it_says_where_it_answers_and_everybody_finds_it(up: RoseUp) -> None:
    where, how, following = up.lines
    assert where == f"ROSE answers at {up.settings.url} (data: {up.settings.data_dir})"
    assert following == NEXT_STEP
    assert "rose down" in how
    assert psutil.Process(up.running().pid).ppid() != os.getpid()
    assert len(up.family()) > len(KINDS)
    assert [one.kind for one in up.running().processes] == KINDS
    assert {one.state for one in up.running().processes} == {"running"}
    assert httpx2.get(f"{up.settings.url}/ready").json()["status"] == "ready"
    for kind in KINDS:
        assert (up.settings.logs / f"{kind}.log").stat().st_mode & 0o777 == 0o600

    second = up.rose("up")
    detached = up.rose("up", "--detach")
    assert (second.returncode, detached.returncode) == (5, 5)
    assert f"answers at {up.settings.url}" in second.stderr
    assert "error[already_running]" in detached.stderr
    status = up.rose("status")
    assert status.returncode == 0
    assert up.settings.url in status.stdout


def test_everything_that_crashes_comes_back_even_while_the_disk_is_full(up: RoseUp) -> None:
    before = {kind: up.pid_of(kind) for kind in KINDS}
    nats_url = state.connection(up.settings).nats_url
    supervisor = psutil.Process(up.running().pid)
    # A limit of 0 bytes a file stands for a disk without room; only what `rose up` itself writes meets it, and its
    # new children's logs.
    supervisor.rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))
    first = psutil.Process(before["projections"])
    first.kill()
    wait_until(lambda: not first.is_running() and running_below(supervisor, "projections"))
    supervisor.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    # Asked again: between a launcher and the program that it becomes a process has no command for a moment.
    [second] = wait_until(lambda: running_below(supervisor, "projections"))
    for pid in (second.pid, *(pid for kind, pid in before.items() if kind != "projections" and pid)):
        os.kill(pid, signal.SIGKILL)

    def all_new() -> bool:
        now = up.running().processes
        return all(
            one.pid not in (None, before[one.kind], second.pid) and one.restarts >= 1 and one.state == "running"
            for one in now
        )

    wait_until(all_new)
    assert state.connection(up.settings).nats_url == nats_url, "clients come back to the address they know"
    log = (up.settings.logs / "up.log").read_text()
    assert "Traceback" not in log.replace("Failed to restore the pool connection floor; retrying\nTraceback", "")

    def answers() -> bool:
        try:
            return httpx2.get(f"{up.settings.url}/ready").json()["status"] == "ready"
        except httpx2.TransportError:
            return False

    wait_until(answers)


def running_below(supervisor: psutil.Process, kind: str) -> list[psutil.Process]:
    """Return the processes of a kind that run, past their launcher."""
    return [one for one in supervisor.children() if command_of(one)[-3:] == ["-m", "rose.app", kind]]


def test_a_taken_port_is_a_sentence_and_leaves_nothing(private_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port: int = taken.getsockname()[1]
        up = RoseUp(private_folder, {"ROSE_PORT": str(port)})
        for arguments in (("up",), ("up", "--detach")):
            refused = up.rose(*arguments)
            assert refused.returncode == 7
            assert f"Port {port} on 127.0.0.1 cannot be used" in refused.stderr
            assert f"rose up --port {port + 1}" in refused.stderr
    assert state.status(up.settings) is None


def test_a_process_that_cannot_start_is_shown_with_its_reason(private_folder: Path) -> None:
    up = RoseUp(private_folder, {"ROSE_INFERENCE_HOST": "0.0.0.0"})  # without a token, which the engine refuses
    refused = up.rose("up")
    assert refused.returncode == 7
    assert "inference" in refused.stderr
    assert "ROSE_INFERENCE_TOKEN" in refused.stderr
    assert state.status(up.settings) is None


def test_an_open_door_is_refused_before_anything_starts(private_folder: Path) -> None:
    refused = RoseUp(private_folder, {"ROSE_HOST": "0.0.0.0"}).rose("up")
    assert refused.returncode == 2
    assert "ROSE_API_KEYS" in refused.stderr
    assert not (private_folder / "postgres").exists()


def test_given_services_are_used_and_it_goes_on_when_its_terminal_is_gone(
    private_folder: Path, database_dsn_for_processes: str, nats_url: str, nats_token: str | None
) -> None:
    environment = {"ROSE_DATABASE_URL": database_dsn_for_processes, "ROSE_NATS_URL": nats_url}
    if nats_token:
        environment["ROSE_NATS_TOKEN"] = nats_token
    with rose_up(private_folder, environment) as up:
        assert [one.kind for one in up.running().processes] == KINDS[2:]
        assert not (private_folder / "postgres").exists()
        assert not (private_folder / "nats").exists()
        assert httpx2.get(f"{up.settings.url}/ready").json()["postgres"] == "connected"

        assert up.process is not None
        assert up.process.stdout is not None
        up.process.stdout.close()
        before = up.pid_of("projections")
        assert before is not None
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: up.pid_of("projections") not in (None, before))
        family = up.family()
        up.process.send_signal(signal.SIGHUP)
        up.process.wait(timeout=60)
        assert_all_end(family, 0)
        log = (up.settings.logs / "up.log").read_text()
        assert "projections ended with signal SIGKILL" in log
        assert "Traceback" not in log


@pytest.mark.parametrize(("arguments", "status"), [(("up",), 0), (("up", "--detach"), 130)])
def test_ctrl_c_while_it_starts_ends_what_had_started(
    private_folder: Path, arguments: tuple[str, ...], status: int
) -> None:
    up = RoseUp(private_folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.app", *arguments],
        env=up.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        wait_until(lambda: state.status(up.settings) is not None and len(up.running().processes) >= 3)
        family = up.family()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.wait(timeout=60) == status
    assert_all_end(family)
