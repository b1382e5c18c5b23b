"""Builds each process of ROSE from its settings: api, projections (with the relay), trainer, inference.

The one place that wires the parts. `python -m rose.app KIND` and `rose serve KIND` end here. It never imports torch:
the engine, which does, is loaded by name in its own process.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio

from rose import leases, settings
from rose.bus import Bus
from rose.errors import InvalidRequest, RoseError, Unavailable
from rose.http_server import http_server, spare_full_collections
from rose.ids import new_id
from rose.local import logs, ports, state
from rose.log.migrate import migrate
from rose.log.pool import open_pool

if TYPE_CHECKING:
    from rose.inference.generation import Engine
    from rose.log.pool import Pool

PASSIVE_WAITING = ("OMP_WAIT_POLICY", "passive")
"""Set before torch is imported, which reads it then: threads that wait by spinning slow each other and neighbours."""
DATABASE_SECONDS = 60.0
"""How long a starting process waits for Postgres."""
GRACEFUL_SECONDS = 5
"""How long requests in progress may take after a stop signal. Streams have ended before."""
ENGINE_CHECK_SECONDS = 1.0
"""How soon a process whose engine has died ends too, so that its supervisor starts another."""
ENGINE_STOP_SECONDS = 10.0
"""How long the engine's thread may take for its last step."""
OTHER_ENGINE_PORT = "Change ROSE_INFERENCE_HOST or ROSE_INFERENCE_PORT; port 0 takes a free one."

logger = logging.getLogger("rose.app")


def main(kind: str | None = None, given: settings.Settings | None = None) -> int:
    """Run one process until a signal ends it and return its exit status."""
    kind = kind or (sys.argv[1] if len(sys.argv) == 2 else "")
    if kind == "inference":
        os.environ.setdefault(*PASSIVE_WAITING)
    given = given or settings.load()
    logs.configure(given.log_level)
    try:
        anyio.run(run, kind, given)
    except RoseError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


async def run(kind: str, given: settings.Settings) -> None:
    """Run the process `kind` until SIGTERM or Ctrl-C; a second one ends it at once.

    Raises: InvalidRequest for an unknown kind; Unavailable when a service that it cannot do without stays away.
    """
    if kind not in PROCESSES:
        raise InvalidRequest(
            f"There is no service {kind!r}.", code="unknown_service", hint=f"One of: {', '.join(PROCESSES)}"
        )
    given = await anyio.to_thread.run_sync(state.connection, given)
    stop = anyio.Event()
    failure: RoseError | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_obey_signals, stop, tasks.cancel_scope)
        try:
            await _wait_for_database(given, stop)
            if not stop.is_set():
                await PROCESSES[kind](given, stop)
        except* RoseError as group:  # the parts' own task groups wrap what they raise
            failure = _first(group)
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    logger.info("%s ended", kind)


def _first(group: BaseExceptionGroup[RoseError]) -> RoseError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _obey_signals(stop: anyio.Event, everything: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            if stop.is_set():
                everything.cancel()
                return
            logger.info("ending after %s", number.name)
            stop.set()


async def _wait_for_database(given: settings.Settings, stop: anyio.Event) -> None:
    """Bring the database to this version's schema, as soon as there is one."""
    assert given.database_url is not None
    deadline = anyio.current_time() + DATABASE_SECONDS
    while not stop.is_set():
        try:
            await migrate(given.database_url)
            return
        except Unavailable as error:
            if anyio.current_time() > deadline:
                raise
            logger.warning("waiting for Postgres: %s", error.message)
            with anyio.move_on_after(1.0):
                await stop.wait()


# --- api


async def _api(given: settings.Settings, stop: anyio.Event) -> None:
    from rose import sweeper
    from rose.api.app import create_app
    from rose.api.limits import Limits
    from rose.api.line import Line
    from rose.api.services import Services
    from rose.blobs import Blobs
    from rose.commands import Commands
    from rose.inference.client import EngineClient
    from rose.log.tail import Tailer
    from rose.usage import Meter

    ports.refuse_open_door(given)
    listener = ports.listen(given.host, given.port)
    async with AsyncExitStack() as stack:
        stack.callback(listener.close)
        pool = await _pool(given, stack, max_size=16)
        tailer = await stack.enter_async_context(Tailer(pool))
        engines = await stack.enter_async_context(EngineClient(token=given.inference_token))
        meter = await stack.enter_async_context(Meter(pool))
        blobs = Blobs(given.blobs)
        app = create_app(
            Services(
                settings=given,
                pool=pool,
                tailer=tailer,
                blobs=blobs,
                commands=Commands(pool),
                engines=engines,
                line=Line(engines),
                limits=Limits(given),
                meter=meter,
            )
        )
        await stack.enter_async_context(http_server(app, listener, lifespan="on", graceful_seconds=GRACEFUL_SECONDS))
        spare_full_collections()
        logger.info("the API answers at %s", given.url)
        async with _announced(pool, "api", url=given.url), anyio.create_task_group() as tasks:
            tasks.start_soon(sweeper.run, pool, blobs, stop, given.idempotency_seconds)
            await stop.wait()
            tailer.stop()  # ends every event stream at once
            tasks.cancel_scope.cancel()


# --- projections, trainer, inference


async def _projections(given: settings.Settings, stop: anyio.Event) -> None:
    from projections import runner
    from rose import nats_readers, relay
    from rose.webhooks import delivery

    async with AsyncExitStack() as stack:
        pool = await _pool(given, stack)
        bus = await stack.enter_async_context(Bus(given.nats_url, token=given.nats_token, name="rose relay"))
        await stack.enter_async_context(_announced(pool, "projections"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run, pool, bus, given, stop)
            tasks.start_soon(nats_readers.run, pool, bus, stop, _let_read(given))
            tasks.start_soon(runner.run, pool, stop)
            tasks.start_soon(delivery.run, pool, given, stop)


def _let_read(given: settings.Settings) -> Callable[[Any], Awaitable[object]] | None:
    """Return what tells the NATS server of `rose up` who may read; None for a server that somebody else runs."""
    from rose.local.nats import Nats

    if given.nats_users_file is None:
        return None
    return Nats(given.nats_users_file.parent.parent).let_read


async def _trainer(given: settings.Settings, stop: anyio.Event) -> None:
    from rose.blobs import Blobs
    from rose.local import launcher
    from trainer import worker

    async with AsyncExitStack() as stack:
        pool = await _pool(given, stack)
        bus = await stack.enter_async_context(Bus(given.nats_url, token=given.nats_token, name="rose trainer"))
        await worker.run(given, pool, bus, Blobs(given.blobs), stop, launch=launcher.command)


async def _inference(given: settings.Settings, stop: anyio.Event) -> None:
    from rose.inference.server import EngineApp

    ports.refuse_open_engine(given)
    listener = ports.listen(given.inference_host, given.inference_port, way_out=OTHER_ENGINE_PORT)
    async with AsyncExitStack() as stack:
        stack.callback(listener.close)
        pool = await _pool(given, stack, max_size=2)
        engine, previews, threads = importlib.import_module("rose.inference.making").make(given)
        stack.push_async_callback(_end_engine, engine)
        app = EngineApp(engine, given.inference_token, previews.preview, {"threads": threads})
        url = ports.reachable_url(given.inference_host, listener.getsockname()[1])
        logger.info("the inference engine answers at %s on %s", url, engine.status().device)
        await stack.enter_async_context(_announced(pool, "inference", url=url, capabilities=app.status))
        await stack.enter_async_context(http_server(app, listener))
        while not stop.is_set() and not engine.join(0):
            with anyio.move_on_after(ENGINE_CHECK_SECONDS):
                await stop.wait()
        engine.stop()  # every answer ends at once, while there is still a server to say so
    if not stop.is_set():
        raise RoseError("The engine's thread has ended by itself; its log says why.", code="engine_error")


async def _end_engine(engine: Engine) -> None:
    engine.stop()
    with anyio.CancelScope(shield=True):
        if not await anyio.to_thread.run_sync(engine.join, ENGINE_STOP_SECONDS):
            logger.warning("the engine's thread is still in a step; the process ends without it")


PROCESSES: dict[str, Callable[[settings.Settings, anyio.Event], Awaitable[None]]] = {
    "api": _api,
    "projections": _projections,
    "trainer": _trainer,
    "inference": _inference,
}


def _announced(
    pool: Pool, kind: str, *, url: str | None = None, capabilities: Callable[[], dict[str, Any]] = dict
) -> AbstractAsyncContextManager[None]:
    """Keep this process in the table `workers`, with what it can and has, as long as the context lasts."""
    worker_id, host, pid = new_id(f"{kind}_"), platform.node(), os.getpid()
    return leases.announced(
        pool,
        lambda: leases.Worker(id=worker_id, kind=kind, host=host, url=url, capabilities=capabilities(), pid=pid),
    )


async def _pool(given: settings.Settings, stack: AsyncExitStack, *, max_size: int = 8) -> Pool:
    pool = await open_pool(given, min_size=1, max_size=max_size)

    async def close() -> None:
        with anyio.move_on_after(5.0, shield=True):
            await pool.close()
            return
        pool.terminate()

    stack.push_async_callback(close)
    return pool


if __name__ == "__main__":
    sys.exit(main())
