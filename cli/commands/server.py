"""`rose up`, `down`, `status`, `serve` and `logs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from cli.options import COMMON, Common
from cli.output import Output
from rose import settings as settings_module
from rose.errors import InvalidState, NotFound, Unavailable

if TYPE_CHECKING:
    from rose.leases import Worker
    from rose.settings import Settings

NEXT_STEP = "Next, in another terminal: rose upload training_data.jsonl"
Service = Literal["api", "projections", "trainer", "inference"]


def up(
    *,
    detach: Annotated[bool, Parameter(name=["--detach", "-d"], env_var="ROSE_DETACH", negative="")] = False,
    host: Annotated[str | None, Parameter(env_var="ROSE_HOST")] = None,
    port: Annotated[int | None, Parameter(env_var="ROSE_PORT")] = None,
    data_dir: Annotated[Path | None, Parameter(env_var="ROSE_DATA_DIR")] = None,
) -> None:
    """Start everything on this machine: Postgres, NATS, API, trainer and inference.

    Ctrl-C lets a running job make its recovery point and stops; the job goes on at the next start.

    Parameters
    ----------
    detach
        Return once everything answers and leave it running; `rose down` stops it.
    host
        Address that the API listens on.
    port
        Port of the API.
    data_dir
        Folder of the database, files, models and logs.
    """
    import anyio

    from rose.local import supervise

    settings = settings_module.load(host=host, port=port, data_dir=str(data_dir) if data_dir else None)
    output = Output()

    async def run() -> None:
        await supervise.up(settings, detach=detach, on_line=output.line, next_step=NEXT_STEP)

    anyio.run(run)


def down(*, data_dir: Annotated[Path | None, Parameter(env_var="ROSE_DATA_DIR")] = None) -> None:
    """Stop the ROSE that runs on a data folder; a running job makes its recovery point first.

    Parameters
    ----------
    data_dir
        Folder of the database, files, models and logs.
    """
    from rose.local import state

    settings = settings_module.load(data_dir=str(data_dir) if data_dir else None)
    if not state.down(settings):
        raise InvalidState(
            f"No ROSE runs on {settings.data_dir}.", code="not_running", hint="Start one with `rose up`."
        )
    Output().line("ROSE has stopped.")


def status(*, common: Common = COMMON) -> int:
    """Say what runs here and how it is; exit 7 when nothing does.

    Where the services run apart, with ROSE_DATABASE_URL: which of them are there.
    """
    from cli.engines import engine_lines, facts
    from rose.local import state

    settings = settings_module.load()
    running = state.status(settings)
    if running is None and settings.database_url is None:
        common.output.show(None, lines=[f"No ROSE runs on {settings.data_dir}. Start one with: rose up"])
        return 7
    workers, away = _workers(settings)
    engines = [one for one in workers if one.kind == "inference"]
    children: dict[int | None, str] = {one.pid: _waiting_child(one) for one in workers}
    if running is None:
        services = [{"kind": one.kind, "host": one.host, "pid": one.pid} for one in workers]
        lines = [
            "The services at ROSE_DATABASE_URL:" if workers else away or "No service is there. Start them: rose serve",
            *(f"  {one.kind:<12}process {one.pid} on {one.host}  {_waiting_child(one)}".rstrip() for one in workers),
            *engine_lines(engines),
        ]
        common.output.show({"processes": services, "engines": facts(engines)}, lines=lines)
        return 0 if workers else 7
    lines = [
        f"ROSE {'answers' if running.ready else 'is starting'} at {running.url} (process {running.pid})",
        f"data folder {running.data_dir}, started {running.started_at}",
        *(
            f"  {one.kind:<12}{one.state:<10}{f'process {one.pid}' if one.pid else '':<16}"
            f"{', '.join(filter(None, (_restarts(one.restarts), children.get(one.pid))))}".rstrip()
            for one in running.processes
        ),
        *engine_lines(engines),
        *([away] if away and running.ready else []),
    ]
    shown = {**msgspec.to_builtins(running), "engines": facts(engines)}
    common.output.show(shown, identity=running.url, lines=lines)
    return 0


def _waiting_child(worker: Worker) -> str:
    """Say what the training child takes that waits in a trainer (ROSE_WARM_CHILD); empty when there is none."""
    resident = worker.capabilities.get("waiting_child_bytes")
    return f"a child of {resident >> 20} MiB waits for a run" if isinstance(resident, int) else ""


def _workers(settings: Settings) -> tuple[list[Worker], str | None]:
    """Return the services that are there, and why that cannot be seen."""
    import anyio

    from rose import leases
    from rose.local import state
    from rose.log.pool import open_pool

    async def work() -> list[Worker]:
        pool = await open_pool(state.connection(settings), min_size=1, max_size=1)
        try:
            return await leases.workers(pool)
        finally:
            pool.terminate()

    try:
        return anyio.run(work), None
    except Unavailable as error:
        return [], error.message


def _restarts(count: int) -> str:
    return f"restarted {count} time{'' if count == 1 else 's'}" if count else ""


def serve(service: Service, /) -> int:
    """Run one service against ROSE_DATABASE_URL, ROSE_NATS_URL and a shared blob folder.

    Parameters
    ----------
    service
        api, projections, trainer or inference; any number of each may run.
    """
    from rose.app import main

    return main(service)


def logs(
    which: str | None = None,
    /,
    *,
    lines: Annotated[int, Parameter(name=["--lines", "-n"], env_var="ROSE_LINES", validator=Number(gte=0))] = 50,
    common: Common = COMMON,
) -> None:
    """Print the end of a service's or a run's log; without a name, list the log files.

    Parameters
    ----------
    which
        A service (api, trainer, postgres, …), or a job's id or `last` for its newest run.
    lines
        How many lines from the end.
    """
    settings = settings_module.load()
    known = _log_files(settings)
    if which is None:
        rows = [(path.stem, str(path)) for path in known]
        common.output.table(("log", "file"), rows, things=dict(rows), empty=f"No logs in {settings.logs} yet.")
        return
    wanted = which
    if which == "last" or which.startswith("ftjob_"):
        with common.client() as client:
            wanted = client.resolve(which, "ftjob_")
    fitting = [path for path in known if path.stem == wanted or path.stem.startswith(f"{wanted}-")]
    if not fitting:
        raise NotFound(f"There is no log of {which} in {settings.logs}.", hint="`rose logs` lists those there are.")
    newest = max(fitting, key=lambda path: path.stat().st_mtime)
    common.output.talk(str(newest))
    for line in _tail(newest, lines):
        common.output.piece(line + "\n")


def _log_files(settings: Settings) -> list[Path]:
    return sorted(settings.logs.rglob("*.log")) if settings.logs.is_dir() else []


def _tail(path: Path, count: int) -> Iterator[str]:
    from collections import deque

    with path.open(encoding="utf-8", errors="replace") as content:
        yield from (line.rstrip("\n") for line in deque(content, maxlen=count))
