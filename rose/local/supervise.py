"""`rose up`: everything on this machine, started in order, kept running, ended in order.

Start: Postgres and NATS (those that are not given by URL), migrations, then projections, API, trainer, inference.
End: the trainer first (it makes its recovery point), then the others, NATS, and Postgres last. When this process is
killed, every child is signalled by the kernel (see launcher.py), so nothing is left behind.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec

from rose import leases
from rose.errors import RoseError, Unavailable
from rose.local import account, launcher, logs, ports, state
from rose.local.child import Child
from rose.local.nats import Nats
from rose.local.postgres import Postgres, make_private
from rose.log.migrate import migrate
from rose.log.pool import Pool, open_pool
from rose.settings import Settings, to_environment

SERVICES = ("projections", "api", "trainer", "inference")
NEEDS_TORCH = ("trainer", "inference")
SERVER_SECONDS = 60.0
"""How long Postgres (crash recovery included) and NATS may take to answer."""
READY_SECONDS = 120.0
HOPELESS_STARTS = 3
"""A process that ended so often before everything was ready will not start at all."""
PROBE_SECONDS = 0.05
LOOK_SECONDS = 1.0

logger = logging.getLogger(__name__)


async def up(
    settings: Settings, *, detach: bool = False, on_line: Callable[[str], object] = print, next_step: str | None = None
) -> None:
    """Run everything until a signal ends it; with `detach` return as soon as it is ready, leaving it running.

    `next_step` is told once all of it answers: what a person may do then.

    Raises: InvalidState when ROSE runs on this data folder already; Unavailable with what keeps it from starting.
    """
    if detach:
        from rose.local.detach import start

        await start(settings, on_line)
        if next_step is not None:
            on_line(next_step)
        return
    await anyio.to_thread.run_sync(prepare_folder, settings)
    logs.configure(settings.log_level, settings.logs / "up.log")
    await run(settings, on_line, next_step=next_step)


async def run(
    settings: Settings,
    on_line: Callable[[str], object],
    on_ready: Callable[[], object] | None = None,
    next_step: str | None = None,
) -> None:
    """Run everything in this process until a signal ends it; `on_ready` is called once all of it answers."""
    await anyio.to_thread.run_sync(prepare_folder, settings)
    with state.hold(settings):
        supervisor = Supervisor(settings, on_line, on_ready, next_step)
        await supervisor.run()


def prepare_folder(settings: Settings) -> None:
    """Make the data folder where it is missing, and refuse one that cannot work. Raises: Unavailable."""
    try:
        make_private(settings.data_dir)
    except OSError as error:
        raise Unavailable(
            f"The data folder {settings.data_dir} cannot be made: {error.strerror}.",
            code="data_folder",
            hint="Name another one with ROSE_DATA_DIR.",
        ) from None
    if not os.access(settings.data_dir, os.W_OK | os.X_OK):
        raise Unavailable(
            f"The data folder {settings.data_dir} cannot be written to.",
            code="data_folder",
            hint="Name another one with ROSE_DATA_DIR, or change its owner.",
        )
    owner = account.needed() if settings.database_url is None else None
    if owner:
        account.let_through(owner, settings.data_dir)


class Supervisor:
    """The children of one `rose up` and their order."""

    def __init__(
        self,
        settings: Settings,
        on_line: Callable[[str], object],
        on_ready: Callable[[], object] | None = None,
        next_step: str | None = None,
    ) -> None:
        self.settings = settings
        self.children: list[Child] = []
        self._show = on_line
        self._on_ready = on_ready
        self._next_step = next_step
        self._stop = anyio.Event()
        self._starting = anyio.CancelScope()
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._ready = False
        self._killed = False
        self._probes: dict[str, Callable[[], bool]] = {}
        self._stack = AsyncExitStack()

    async def run(self) -> None:
        """Start everything, wait for a signal, end everything.

        Raises: RoseError with what kept it from starting; KeyboardInterrupt when a second Ctrl-C killed it.
        """
        failure: RoseError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._obey_signals)
            try:
                with self._starting:
                    await self._start(tasks)
                    self._say_ready()
                await self._stop.wait()
            except RoseError as error:
                failure = error
            except OSError as error:  # of a folder or the disk; the children's own are theirs to mend
                failure = _local_failure(error)
            finally:
                with anyio.CancelScope(shield=True):
                    await self._stack.aclose()
                    await self._end()
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if self._killed:
            raise KeyboardInterrupt

    def _on_line(self, line: str) -> None:
        """Tell people; a terminal or pipe that has gone must not end anything."""
        logger.info("%s", line)
        try:
            self._show(line)
        except (OSError, ValueError) as error:
            logger.warning("nobody listens any more: %s", error)
            self._show = lambda _: None

    async def _obey_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                if not self._stop.is_set():
                    logger.info("ending after %s", number.name)
                    self._on_line("Stopping: a running job makes its recovery point first. Ctrl-C again kills.")
                    self._stop.set()
                    self._starting.cancel()
                elif number == signal.SIGINT:
                    self._on_line("Killing everything. The job goes on from its last recovery point at the next start.")
                    self._killed = True
                    for child in self.children:
                        child.kill()

    async def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        self._write_state()
        ports.refuse_open_door(self.settings)
        ports.listen(self.settings.host, self.settings.port).close()
        settings = await self._start_servers(tasks)
        assert settings.database_url is not None
        await migrate(settings.database_url)
        state.store(
            settings,
            state.Connection(
                database_url=settings.database_url, nats_url=settings.nats_url, nats_token=settings.nats_token
            ),
        )
        environment = child_environment(settings)
        for kind in SERVICES:
            if kind in NEEDS_TORCH and not _has_torch():
                self._on_line(f"No {kind}: torch is not installed. Install it with: pip install 'rose[trainer]'")
                continue
            await self._start_service(kind, environment, tasks)
        pool = await self._stack.enter_async_context(_pool(settings))
        await self._wait_for_services(pool)
        tasks.start_soon(self._keep_looking, pool)

    async def _start_servers(self, tasks: anyio.abc.TaskGroup) -> Settings:
        """Start the embedded servers that are not given by URL; return the settings with their addresses."""
        settings = self.settings
        servers: list[Child] = []
        if settings.database_url is None:
            postgres = await anyio.to_thread.run_sync(Postgres, settings.data_dir)
            servers.append(self._server("postgres", postgres))
            settings = msgspec.structs.replace(settings, database_url=postgres.dsn())
        nats: Nats | None = None
        if settings.nats_url is None:
            nats = Nats(settings.data_dir)
            servers.append(self._server("nats", nats))
        for child in servers:
            await self._launch(child, tasks)
        for child in servers:
            await self._wait_for_server(child)
        if nats is not None:
            settings = msgspec.structs.replace(
                settings, nats_url=nats.url, nats_token=None, nats_users_file=nats.users_file
            )
        return settings

    def _server(self, kind: str, service: Postgres | Nats) -> Child:
        gently = signal.SIGINT if kind == "postgres" else signal.SIGTERM
        self._probes[kind] = service.answers
        return Child(
            kind,
            service.command,
            prepare=service.prepare,
            log=self.settings.logs / f"{kind}.log",
            stop_signal=gently,
            stop_seconds=60.0 if kind == "postgres" else 15.0,
            kill_signal=signal.SIGQUIT if kind == "postgres" else signal.SIGKILL,
            on_change=self._write_state,
            on_line=self._on_line,
        )

    async def _start_service(self, kind: str, environment: Mapping[str, str], tasks: anyio.abc.TaskGroup) -> None:
        def command() -> tuple[list[str], tuple[int, ...]]:
            return launcher.command([sys.executable, "-m", "rose.app", kind])

        child = Child(
            kind,
            command,
            log=self.settings.logs / f"{kind}.log",
            environment=environment,
            stop_seconds=self.settings.drain_seconds + 10 if kind == "trainer" else 15.0,
            on_change=self._write_state,
            on_line=self._on_line,
        )
        await self._launch(child, tasks)

    async def _launch(self, child: Child, tasks: anyio.abc.TaskGroup) -> None:
        """Start a child and its supervision as one step: a Ctrl-C in between would leave a process without an owner."""
        with anyio.CancelScope(shield=True):
            await child.start()
            self.children.append(child)
            tasks.start_soon(child.run)
        self._write_state()
        await anyio.lowlevel.checkpoint()

    async def _wait_for_server(self, child: Child) -> None:
        with anyio.move_on_after(SERVER_SECONDS):
            while not await anyio.to_thread.run_sync(self._probes[child.kind]):
                if child.restarts:
                    break
                await anyio.sleep(PROBE_SECONDS)
            else:
                child.ready = True
                self._write_state()
                return
        raise Unavailable(
            f"{child.kind} does not start. The end of its log ({child.log}):\n{logs.last_lines(child.log)}",
            code=f"{child.kind}_failed",
            hint=f"The whole log: {child.log}",
        )

    async def _wait_for_services(self, pool: Pool) -> None:
        """Wait until every process has announced itself in the table `workers`, or say which one does not."""
        started = anyio.current_time()
        with anyio.move_on_after(READY_SECONDS):
            while not any(child.refused or child.restarts >= HOPELESS_STARTS for child in self._services()):
                await self._look_who_is_ready(pool)
                if all(child.ready for child in self._services()):
                    return
                await anyio.sleep(PROBE_SECONDS)
        late = [child for child in self._services() if not child.ready]
        shown = "\n".join(f"{child.kind} ({child.log}):\n{logs.last_lines(child.log, 10)}" for child in late)
        raise Unavailable(
            f"Not ready after {anyio.current_time() - started:.0f} s: "
            f"{', '.join(child.kind for child in late)}.\n{shown}",
            code="not_ready",
            hint="The logs say why.",
        )

    async def _look_who_is_ready(self, pool: Pool) -> None:
        announced = {worker.pid for worker in await leases.workers(pool)}
        for child in self.children:
            process = child.process
            if child.ready or process is None:
                continue
            answers = self._probes.get(child.kind)
            if await anyio.to_thread.run_sync(answers) if answers else process.pid in announced:
                child.ready = child.process is process  # else it has ended while it was asked
                self._write_state()

    async def _keep_looking(self, pool: Pool) -> None:
        """Notice when what has crashed answers again."""
        while True:
            await anyio.sleep(LOOK_SECONDS)
            if all(child.ready for child in self.children):
                continue
            try:
                await self._look_who_is_ready(pool)
            except Exception as error:  # Postgres away, the disk full, …: looking must not end what runs
                logger.warning("cannot tell yet who is ready: %s", error)

    def _services(self) -> list[Child]:
        return [child for child in self.children if child.kind in SERVICES]

    def _say_ready(self) -> None:
        self._ready = True
        self._write_state()
        self._on_line(f"ROSE answers at {self.settings.url} (data: {self.settings.data_dir})")
        if self._next_step is not None:
            self._on_line(self._next_step)
        if self._on_ready is not None:
            self._on_ready()

    async def _end(self) -> None:
        for group in (("trainer",), ("api", "inference", "projections"), ("nats",), ("postgres",)):
            async with anyio.create_task_group() as tasks:
                for child in self.children:
                    if child.kind in group:
                        tasks.start_soon(child.stop)

    def _write_state(self) -> None:
        """Tell others what runs. A full disk must not end what runs: the file is written again at the next change."""
        running = state.Running(
            pid=os.getpid(),
            url=self.settings.url,
            data_dir=str(self.settings.data_dir),
            started_at=self._started_at,
            ready=self._ready,
            processes=tuple(child.shown() for child in self.children),
        )
        try:
            state.store(self.settings, running)
        except OSError as error:
            logger.warning("what `rose status` shows is out of date: %s", error)


@asynccontextmanager
async def _pool(settings: Settings) -> AsyncGenerator[Pool]:
    pool = await open_pool(settings, min_size=1, max_size=1)
    try:
        yield pool
    finally:
        pool.terminate()  # nothing is in progress on it that matters


def child_environment(settings: Settings) -> dict[str, str]:
    """Return the environment from which a child loads exactly these settings."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("ROSE_") or name == "ROSE_CONFIG"
    }
    return {**inherited, **to_environment(settings), "PYTHONUNBUFFERED": "1"}


def _local_failure(error: OSError) -> Unavailable:
    where = f"{error.filename}: " if error.filename else ""
    return Unavailable(
        f"ROSE cannot start: {where}{error.strerror or error}.",
        code="not_started",
        hint="`rose doctor` looks at the folder, the disk and the address.",
    )


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None
