"""A waiting child, started as a supervisor does it: it ends with the pipe, and says when it is ready."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO

import msgspec
import pytest

from trainer.child import EXIT_ABANDONED
from trainer.protocol import PhaseChanged, Report

DEADLINE = 120


@contextmanager
def waiting() -> Generator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start a child that waits; give it and its reports."""
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.warm"],
        stdin=subprocess.PIPE,
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


@pytest.mark.parametrize("loaded", [False, True])
def test_it_ends_when_its_supervisor_does(loaded: bool) -> None:
    with waiting() as (process, reports):
        if loaded:
            assert msgspec.json.decode(reports.readline(), type=Report) == PhaseChanged(phase="wait")
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert process.wait(DEADLINE) == EXIT_ABANDONED
