"""What every child process of a trainer's supervisor does first: write reports, obey orders, notice abandonment.

Shared by the training child and the validation child; imports no torch. A child never outlives its supervisor: it
leaves when its standard input closes, when that stays silent for `abandon_seconds`, or when nobody reads its reports.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import msgspec

from rose.errors import RoseError
from trainer.protocol import Alive, Drain, Failed, Order, Report

EXIT_ABANDONED = 69
"""Exit status of a child whose supervisor is gone or silent (BSD's EX_UNAVAILABLE)."""

REPORT_FD = "ROSE_REPORT_FD"

log = logging.getLogger(__name__)
Spec = TypeVar("Spec", bound=msgspec.Struct)


class Channel:
    """The pipe to the supervisor: reports out, orders in.

    `report` may be called from any thread. `draining` is set once the supervisor asked for a recovery point and an
    exit; look at it between micro-batches. Orders are read in a daemon thread, which ends the whole process at once
    (`os._exit`, EXIT_ABANDONED) when there is no supervisor any more.
    """

    def __init__(
        self,
        report_fd: int,
        order_fd: int,
        abandon_seconds: float,
        leave: Callable[[str], None] | None = None,
    ) -> None:
        self.draining = threading.Event()
        self._report_fd = report_fd
        self._order_fd = order_fd
        self._abandon_seconds = abandon_seconds
        self._leave = leave or stop_abandoned
        self._writing = threading.Lock()
        self._encoder = msgspec.json.Encoder()
        self._orders: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)

    def report(self, report: Report) -> None:
        """Send one report as one line; it is in the pipe when this returns."""
        line = self._encoder.encode(report) + b"\n"
        with self._writing:
            try:
                while line:
                    line = line[os.write(self._report_fd, line) :]
            except BrokenPipeError:
                self._leave("nobody reads the reports any more")

    def watch(self) -> None:
        """Read orders in the background until the process ends."""
        threading.Thread(target=self._read_orders, name="orders", daemon=True).start()

    def _read_orders(self) -> None:
        pending = b""
        last_word = time.monotonic()
        while True:
            patience = last_word + self._abandon_seconds - time.monotonic()
            if patience <= 0:
                return self._leave(f"no word from the supervisor for {self._abandon_seconds:g} s")
            if not select.select([self._order_fd], [], [], patience)[0]:
                continue
            chunk = os.read(self._order_fd, 65536)
            if not chunk:
                return self._leave("the supervisor closed the pipe")
            last_word = time.monotonic()
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._obey(line)

    def _obey(self, line: bytes) -> None:
        try:
            order: Order = self._orders.decode(line)
        except msgspec.DecodeError as error:
            log.warning("An order could not be read and is ignored: %s", error)
            return
        match order:
            case Alive():
                pass
            case Drain():
                self.draining.set()


def stop_abandoned(reason: str) -> NoReturn:
    """End the process now: torch's threads and open files need no farewell, and nothing of it counts any more."""
    with contextlib.suppress(OSError):
        os.write(2, f"The child stops: {reason}.\n".encode())
    os._exit(EXIT_ABANDONED)


def open_channel(abandon_seconds: float) -> Channel:
    """Connect to the supervisor that started this process and watch for its orders.

    The report descriptor is not passed on to processes that the child starts. SIGINT is ignored: Ctrl-C reaches the
    whole terminal group, and it is the supervisor who decides to drain. SIGUSR1 prints the stack of every thread to
    standard error, that is, into the run's log.
    """
    descriptor = os.environ.get(REPORT_FD)
    if descriptor is None:
        raise SystemExit(f"{REPORT_FD} is not set: this program is started by a trainer's supervisor, not by hand.")
    os.set_inheritable(int(descriptor), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    channel = Channel(int(descriptor), 0, abandon_seconds)
    channel.watch()
    return channel


def read_spec(arguments: Sequence[str], kind: type[Spec]) -> Spec:
    """Read the specification named by the only command line argument."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m trainer.run SPEC.json (or trainer.validate)")
    with open(arguments[0], "rb") as file:
        return msgspec.json.decode(file.read(), type=kind)


def failed(error: RoseError, *, code: str | None = None, param: str | None = None) -> Failed:
    """Make the report of an error that ROSE explains; `code` and `param` replace missing ones."""
    return Failed(
        code=error.code or code or "internal_error",
        message=str(error),
        param=error.param or param,
        retryable=error.status >= 500,
    )


def log_to_standard_error() -> None:
    """Send log records to standard error, which the supervisor drains into the run's log file."""
    logging.basicConfig(
        level=os.environ.get("ROSE_LOG_LEVEL", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
