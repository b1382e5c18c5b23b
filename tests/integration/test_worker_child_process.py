"""Child processes of a supervisor, with small real programs: reports, orders, logs, kills."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from rose.local import launcher
from tests.eventually import eventually
from trainer import child_process
from trainer.child_process import BrokenReport, Child, Exit, RunLog
from trainer.protocol import Alive, Drain, PhaseChanged, Report, Warned

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 120.0


@asynccontextmanager
async def running(code: str, log_path: Path) -> AsyncGenerator[Child, None]:
    """Run Python `code` as a child; everything in the block has to end in time."""
    with anyio.fail_after(DEADLINE_SECONDS):
        arguments = [sys.executable, "-c", code]
        async with child_process.start(arguments, log_path, launch=launcher.command) as child:
            yield child


async def reports_of(child: Child) -> list[Report]:
    return [report async for report in child.reports()]


async def first_report(child: Child) -> Report:
    async for report in child.reports():
        return report
    raise AssertionError("the child said nothing")


WITH_CHANNEL = """
import threading
from trainer.child import open_channel
from trainer.protocol import *
channel = open_channel(30.0)
"""


async def test_reports_arrive_in_order_and_the_exit_status_is_known(tmp_path: Path) -> None:
    code = (
        WITH_CHANNEL
        + "for n in range(5000): channel.report(Warned(code=str(n), message='x' * 100))\nraise SystemExit(7)"
    )
    async with running(code, tmp_path / "run.log") as child:
        reports = await reports_of(child)
        ended = await child.wait()
    assert [report.code for report in reports if isinstance(report, Warned)] == [str(n) for n in range(5000)]
    assert (ended.status, str(ended)) == (7, "exit status 7")


async def test_orders_reach_the_child(tmp_path: Path) -> None:
    code = WITH_CHANNEL + "channel.draining.wait()\nchannel.report(PhaseChanged(phase='drained'))"
    async with running(code, tmp_path / "run.log") as child:
        assert await child.order(Alive())
        assert await child.order(Drain())
        assert await reports_of(child) == [PhaseChanged(phase="drained")]
        assert (await child.wait()).status == 0


async def test_output_beyond_the_pipe_never_blocks_the_child_and_ends_in_its_log(tmp_path: Path) -> None:
    code = "import sys\nfor n in range(20000): print('line', n)\nprint('the last word\\x07', file=sys.stderr)"
    log_path = tmp_path / "runs" / "run.log"
    async with running(code, log_path) as child:
        assert (await child.wait()).status == 0
    assert child.log.last_line == "the last word"
    lines = log_path.read_text().splitlines()
    assert lines[0] == "line 0"
    assert lines[19999] == "line 19999"


async def test_a_child_that_dies_closes_its_reports_and_names_the_signal(tmp_path: Path) -> None:
    code = WITH_CHANNEL + "channel.report(PhaseChanged(phase='load'))\nthreading.Event().wait()"
    async with running(code, tmp_path / "run.log") as child:
        assert await first_report(child) == PhaseChanged(phase="load")
        os.kill(child.pid, signal.SIGKILL)
        assert await reports_of(child) == []
        assert str(await child.wait()) == "killed by SIGKILL"


async def test_what_is_no_report_is_refused_with_its_text(tmp_path: Path) -> None:
    code = "import os\nos.write(int(os.environ['ROSE_REPORT_FD']), b'hello\\n')"
    async with running(code, tmp_path / "run.log") as child:
        with pytest.raises(BrokenReport, match="hello"):
            await reports_of(child)


async def test_the_stack_of_a_hung_child_lands_in_its_log(tmp_path: Path) -> None:
    code = (
        WITH_CHANNEL
        + "def hangs_here():\n  threading.Event().wait()\nchannel.report(PhaseChanged(phase='train'))\nhangs_here()"
    )
    log_path = tmp_path / "run.log"
    async with running(code, log_path) as child:
        await first_report(child)

        def dumped() -> bool:
            child.dump_stack()  # the first ones may still find it on its way there
            return "in hangs_here" in log_path.read_text()

        await eventually(dumped)


@pytest.mark.parametrize("stopped", [False, True])
async def test_leaving_the_block_kills_the_child_and_what_it_started(tmp_path: Path, stopped: bool) -> None:
    code = WITH_CHANNEL + (
        "import subprocess, sys\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait()'])\n"
        "channel.report(Warned(code=str(other.pid), message=''))\nother.wait()"
    )
    async with running(code, tmp_path / "run.log") as child:
        report = await first_report(child)
        assert isinstance(report, Warned)
        grandchild = psutil.Process(int(report.code))
        if stopped:
            os.kill(child.pid, signal.SIGSTOP)
    assert not psutil.pid_exists(child.pid)
    await eventually(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)


async def test_an_order_to_a_child_that_is_gone_is_not_an_error(tmp_path: Path) -> None:
    async with running("", tmp_path / "run.log") as child:
        await child.wait()
        assert await child.order(Drain()) is False


async def test_orders_to_a_stopped_child_do_not_block_the_supervisor(tmp_path: Path) -> None:
    code = WITH_CHANNEL + "channel.report(PhaseChanged(phase='train'))\nthreading.Event().wait()"
    async with running(code, tmp_path / "run.log") as child:
        await first_report(child)
        os.kill(child.pid, signal.SIGSTOP)
        while await child.order(Alive()):
            pass


def test_a_log_keeps_the_newest_output_below_two_caps(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    run_log = RunLog(path, cap_bytes=1000)
    for number in range(1000):
        run_log.write(f"line {number}\n".encode())
    run_log.close()
    former = path.with_name("run.log.1")
    assert path.stat().st_size <= 1000
    assert former.stat().st_size <= 1000
    lines = (former.read_text() + path.read_text()).splitlines()
    assert lines == [f"line {number}" for number in range(1000 - len(lines), 1000)]
    assert run_log.last_line == "line 999"


def test_a_log_on_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.symlink_to("/dev/full")
    run_log = RunLog(path)
    run_log.write(b"the disk is full\n")
    run_log.close()
    assert run_log.last_line == "the disk is full"


def test_a_kill_for_memory_is_named_when_the_kernel_counted_one(tmp_path: Path) -> None:
    machine, container = tmp_path / "vmstat", tmp_path / "memory.events"
    machine.write_text("nr_free_pages 12\noom_kill 3\noom_kill_x 9\n")
    container.write_text("oom 1\noom_kill 1\n")
    assert child_process.oom_kills((machine, container, tmp_path / "none")) == 4
    assert "ran out of memory" in str(Exit(status=-9, out_of_memory=True))
    assert str(Exit(status=-9)) == "killed by SIGKILL"
