"""A child reports, obeys and never outlives its supervisor: tried with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import msgspec
import pytest

from trainer.child import EXIT_ABANDONED
from trainer.protocol import Alive, Drain, PhaseChanged, Report

CHILD = """
import sys, threading
from trainer import child
from trainer.protocol import PhaseChanged
channel = child.open_channel(float(sys.argv[1]))
channel.report(PhaseChanged(phase="load"))
channel.draining.wait(60)
channel.report(PhaseChanged(phase="drained"))
threading.Event().wait(60)
"""
DEADLINE = 60


@contextmanager
def child(abandon_seconds: float) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start a child that reports `load`, waits for `Drain`, reports `drained` and hangs."""
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(abandon_seconds)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[write_fd],
        env={**os.environ, "ROSE_REPORT_FD": str(write_fd)},
    )
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as reports:
        try:
            yield process, reports
        finally:
            process.kill()
            process.communicate()


def next_report(reports: IO[bytes]) -> Report:
    return msgspec.json.decode(reports.readline(), type=Report)


def send(process: subprocess.Popen[bytes], *orders: Alive | Drain) -> None:
    assert process.stdin is not None
    process.stdin.write(b"".join(msgspec.json.encode(order) + b"\n" for order in orders))
    process.stdin.flush()


def test_orders_reach_the_child_and_unreadable_ones_are_ignored() -> None:
    with child(abandon_seconds=DEADLINE) as (process, reports):
        assert next_report(reports) == PhaseChanged(phase="load")
        assert process.stdin is not None
        process.stdin.write(b"no order\n")
        send(process, Alive(), Drain())
        assert next_report(reports) == PhaseChanged(phase="drained")


def test_a_closed_pipe_ends_the_child() -> None:
    with child(abandon_seconds=DEADLINE) as (process, reports):
        next_report(reports)
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert process.wait(DEADLINE) == EXIT_ABANDONED
        assert process.stderr is not None
        assert b"the supervisor closed the pipe" in process.stderr.read()


def test_silence_ends_the_child() -> None:
    with child(abandon_seconds=0.5) as (process, reports):
        next_report(reports)
        assert process.wait(DEADLINE) == EXIT_ABANDONED


def test_a_child_that_nobody_listens_to_ends() -> None:
    with child(abandon_seconds=DEADLINE) as (process, reports):
        next_report(reports)
        reports.close()
        send(process, Drain())
        assert process.wait(DEADLINE) == EXIT_ABANDONED


def test_ctrl_c_is_left_to_the_supervisor_and_sigusr1_prints_stacks() -> None:
    with child(abandon_seconds=DEADLINE) as (process, reports):
        next_report(reports)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGUSR1)
        send(process, Drain())
        assert next_report(reports) == PhaseChanged(phase="drained")
        assert process.poll() is None
        process.kill()
        _, errors = process.communicate(timeout=DEADLINE)
        assert b"Thread" in errors


def test_started_by_hand_it_says_what_it_is() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ROSE_REPORT_FD"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "1"], env=environment, capture_output=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 1
    assert b"started by a trainer's supervisor" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_the_specification_is_the_only_argument(arguments: list[str]) -> None:
    from trainer.child import read_spec

    with pytest.raises(SystemExit, match="usage"):
        read_spec(arguments, PhaseChanged)
