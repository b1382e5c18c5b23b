"""What works straight on the database, for whoever runs ROSE: `rose db`, `projections`, `events`, `keys nats-users`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from cyclopts import Parameter

from cli.options import COMMON, Common
from rose import settings as settings_module

if TYPE_CHECKING:
    from rose.log.pool import Pool
    from rose.log.read import Recorded
    from rose.settings import Settings

Answer = TypeVar("Answer")
TAIL_POLL_SECONDS = 0.5


def migrate(*, common: Common = COMMON) -> None:
    """Bring the database to this version's tables; safe while ROSE runs."""
    import anyio

    from rose.local import state
    from rose.log import migrate as migrations

    applied = anyio.run(migrations.migrate, state.connection(settings_module.load()).database_url or "")
    lines = [f"applied {name}" for name in applied] or ["Nothing to do: all migrations are in."]
    common.output.show(applied, identity=str(len(applied)), lines=lines)


def status(*, common: Common = COMMON) -> int:
    """Show which migrations are in; exit 1 when some are not."""
    import anyio

    from rose.local import state
    from rose.log import migrate as migrations

    found = anyio.run(migrations.status, state.connection(settings_module.load()).database_url or "")
    rows = [(one.name, one.state) for one in found]
    common.output.table(("migration", "state"), rows, things=found, empty="There are no migrations.")
    behind = any(one.state != "applied" for one in found)
    if behind:
        common.output.talk("Bring it up to date with: rose db migrate")
    return 1 if behind else 0


def list_projections(*, common: Common = COMMON) -> None:
    """List the views and how far they have read."""
    from projections import positions

    async def work(pool: Pool, settings: Settings) -> list[positions.Progress]:
        return await positions.list_projections(pool)

    found = _on_database(work)
    rows = [
        (one.name, one.status, str(one.position), str(max(0, one.head - one.position)), one.error or "")
        for one in found
    ]
    common.output.table(
        ("view", "status", "position", "behind", "error"), rows, things=found, empty="No view has been made yet."
    )


def rebuild(name: str, /, *, common: Common = COMMON) -> None:
    """Make a view anew from the log; readers never see less meanwhile.

    Parameters
    ----------
    name
        jobs, files, models, metrics or checkpoints.
    """
    from projections import verify as verification

    async def work(pool: Pool, settings: Settings) -> list[verification.Difference]:
        return await verification.repair(pool, name)

    mended = _on_database(work)
    lines = [f"mended {one.view} {one.id}: {one.text}" for one in mended]
    common.output.show(mended, identity=name, lines=[*lines, f"{name} is made anew: {len(mended)} rows were different"])


def verify(name: str | None = None, /, *, common: Common = COMMON) -> int:
    """Compare the views with the log; exit 1 when they differ.

    Parameters
    ----------
    name
        One view; default: all.
    """
    from projections import verify as verification

    async def work(pool: Pool, settings: Settings) -> list[verification.Difference]:
        return await verification.verify(pool, name)

    differences = _on_database(work)
    lines = [f"{one.view} {one.id}: {one.text}" for one in differences]
    if differences:
        views = sorted({one.view for one in differences})
        lines += [f"Mend it with: rose projections rebuild {view}" for view in views]
    else:
        lines = ["Every view is what the log says."]
    common.output.show(differences, identity=str(len(differences)), lines=lines)
    return 1 if differences else 0


def tail(
    *,
    after: Annotated[int | None, Parameter(env_var="ROSE_AFTER")] = None,
    follow: Annotated[bool, Parameter(env_var="ROSE_FOLLOW")] = True,
    common: Common = COMMON,
) -> int:
    """Print events, and new ones as they come.

    Parameters
    ----------
    after
        Begin after this position; default: the last 20 events.
    follow
        Wait for new events; --no-follow prints those there are.
    """
    import anyio

    from rose.log import read

    async def work(pool: Pool, settings: Settings) -> None:
        position = max(0, await read.head(pool) - 20) if after is None else after
        while True:
            found = await read.read_all(pool, after_position=position)
            for event in found:
                common.output.piece(_event_text(event, json=common.json) + "\n")
                position = event.position
            if not found:
                if not follow:
                    return
                await anyio.sleep(TAIL_POLL_SECONDS)

    try:
        _on_database(work)
    except KeyboardInterrupt:
        return 130
    return 0


def rebuild_stream(
    *, first_position: Annotated[int, Parameter(env_var="ROSE_FIRST_POSITION")] = 1, common: Common = COMMON
) -> None:
    """Make the NATS stream anew from the log, after Postgres was restored or the stream was lost.

    Durable consumers of the stream have to be made again.

    Parameters
    ----------
    first_position
        Log position to begin with.
    """
    from rose import relay
    from rose.bus import Bus
    from rose.errors import Unavailable

    async def work(pool: Pool, settings: Settings) -> None:
        async with Bus(settings.nats_url, token=settings.nats_token, name="rose cli") as bus:
            if not await bus.wait_connected(10.0):
                address = (settings.nats_url or "").rpartition("@")[2]  # without the password
                hint = "Start ROSE with `rose up`, or set ROSE_NATS_URL."
                raise Unavailable(f"No NATS answers at {address}.", hint=hint)
            await relay.rebuild_stream(pool, bus, settings, first_position=first_position)

    _on_database(work)
    common.output.line(f"The stream begins anew at position {first_position}; the relay fills it.")


def nats_users(*, common: Common = COMMON) -> None:
    """Print the readers' accounts that a NATS server needs which ROSE does not run, for its configuration.

    `rose up` tells its own NATS without being asked.
    """
    import time

    from projections import keys
    from rose.nats_readers import accounts

    async def work(pool: Pool, settings: Settings) -> list[keys.NatsReader]:
        return await keys.nats_readers(pool, int(time.time()))

    readers = _on_database(work)
    common.output.show(readers, lines=accounts(readers) or ["# No key of NATS is in use."])


def _on_database(work: Callable[[Pool, Settings], Awaitable[Answer]]) -> Answer:
    import anyio

    from rose.local import state
    from rose.log.pool import open_pool

    settings = state.connection(settings_module.load())

    async def run() -> Answer:
        pool = await open_pool(settings, min_size=1, max_size=4)
        try:
            return await work(pool, settings)
        finally:
            with anyio.move_on_after(5.0, shield=True):
                await pool.close()

    return anyio.run(run)


def _event_text(event: Recorded, *, json: bool) -> str:
    data = msgspec.json.encode(event.event).decode()
    if json:
        return msgspec.json.encode(event, enc_hook=str).decode()
    shown = data if len(data) <= 200 else data[:197] + "…"
    return f"{event.position}\t{event.recorded_at:%Y-%m-%d %H:%M:%S}\t{event.stream_id}\t{event.type}\t{shown}"
