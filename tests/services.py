"""Real Postgres and NATS servers for tests, as direct children of the test process that end with it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rose.local.nats import Nats
from rose.local.postgres import Postgres

START_SECONDS = 60.0


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a fresh folder with mode 700 and a short path, directly in /tmp; removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rose-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class Server:
    """A started server: `stop` ends it gently, `kill` as a crash would, `start` brings it back on the same data."""

    def __init__(self, service: Postgres | Nats) -> None:
        self.service = service
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.service.prepare()
        command, fds = self.service.command()
        with open(self.service.data_dir / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.service.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.service.data_dir / "server.log").read_text()[-4000:])
            time.sleep(0.01)  # the probe of a process that cannot tell us: nothing to wait on

    def stop(self) -> None:
        """End the server gently; nothing when it does not run."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill the server as a crash would."""
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Stop the server's clock (SIGSTOP)."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a suspended server go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        self.process.wait(timeout=30)
        self.process = None


class NatsServer(Server):
    """A nats-server with JetStream and a token; its port stays the same over restarts."""

    service: Nats

    @property
    def url(self) -> str:
        """Address of the server."""
        return self.service.url


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Yield a running Postgres on a fresh data folder."""
    with private_folder() as folder:
        service = Postgres(folder)
        server = Server(service)
        try:
            server.start()
            yield service
        finally:
            server.stop()


@contextmanager
def running_nats() -> Iterator[NatsServer]:
    """Yield a running nats-server on a fresh data folder."""
    with private_folder() as folder:
        server = NatsServer(Nats(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()
