"""Start a program that ends with the process that started it.

Run as a script between a supervisor and the program: it gives up root's rights when told to, arranges that the
program is signalled when the supervisor dies (Linux: PDEATHSIG, elsewhere a watcher on a pipe), then becomes the
program by exec. It imports nothing but the standard library, so that it starts in a few milliseconds.

PDEATHSIG belongs to the *thread* that started the launcher: that thread must live as long as the supervisor.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 10.0
"""How long the watcher waits after its signal before it kills."""

_life_pipe: tuple[int, int] | None = None


def command(
    program: Sequence[str | Path],
    *,
    death_signal: signal.Signals = signal.SIGKILL,
    account: str | None = None,
    watch_pipe: bool = sys.platform != "linux",
) -> tuple[list[str], tuple[int, ...]]:
    """Return the arguments that start `program` through the launcher, and the file descriptors to pass on.

    `death_signal` is what the program gets when the calling process dies; `account` is who it runs as (root only).
    """
    fds: tuple[int, ...] = (_life(),) if watch_pipe else ()
    arguments = [sys.executable, "-I", "-S", __file__, f"--parent={os.getpid()}", f"--signal={int(death_signal)}"]
    arguments += [f"--account={account}"] if account else []
    arguments += [f"--life={fds[0]}"] if fds else []
    return [*arguments, "--", *map(str, program)], fds


def _life() -> int:
    """Return the reading end of a pipe whose writing end is open exactly as long as this process lives."""
    global _life_pipe
    if _life_pipe is None:
        _life_pipe = os.pipe()
    return _life_pipe[0]


def main(arguments: Sequence[str]) -> None:
    """Become the program after `--`; never returns."""
    parser = argparse.ArgumentParser(prog="launcher")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--signal", type=int, default=int(signal.SIGKILL))
    parser.add_argument("--account")
    parser.add_argument("--life", type=int)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args(arguments)
    if options.account:
        _drop_to(options.account)
    # After the change of account: the kernel forgets PDEATHSIG when the credentials change.
    if options.life is not None:
        _watch(options.life, options.signal)
    else:
        _ask_for_death_signal(options.signal)
    if os.getppid() != options.parent:  # it died before the request above was in place
        os._exit(1)
    os.execvp(options.program[0], options.program)


def _drop_to(account: str) -> None:
    import pwd

    entry = pwd.getpwnam(account)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ.update(HOME=entry.pw_dir, USER=account, LOGNAME=account)


def _ask_for_death_signal(number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _watch(life: int, number: int) -> None:
    """Leave a process behind that signals this one when `life` closes, and that ends when this one does.

    Forked twice, so that the program does not find a child it never started. The program inherits the writing end of
    a second pipe; its closing tells the watcher that the program has ended and its number may belong to another.
    """
    target = os.getpid()
    ended, keep = os.pipe()
    os.set_inheritable(keep, True)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(ended)
        os.close(life)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(keep)
    for step in (number, signal.SIGKILL):
        deadline = None if step == number else time.monotonic() + GRACE_SECONDS
        waiting = [life, ended] if deadline is None else [ended]
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(waiting, [], [], timeout)
        if ended in ready:
            break
        os.kill(target, step)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
