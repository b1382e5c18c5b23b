"""`/`, `/health` and `/ready`: what this is, whether it lives, whether it can work."""

from __future__ import annotations

from importlib.metadata import version

import anyio
from litestar import Response
from litestar.openapi.datastructures import ResponseSpec

from projections.positions import list_projections
from rose import leases
from rose.api import schema
from rose.api.access import PUBLIC
from rose.api.routes import get
from rose.api.services import TheServices
from rose.errors import RoseError
from rose.log import migrate

CHECK_SECONDS = 3.0
RELAY = "relay"


@get("/", opt={PUBLIC: True})
async def welcome(services: TheServices) -> schema.Welcome:
    """Say what this is."""
    url = services.settings.url
    return schema.Welcome(
        name="ROSE",
        version=version("rose"),
        about="The fine-tuning API on your own hardware: upload a JSONL, create a job, watch it train, chat with it.",
        base_url=f"{url}/v1",
        openapi=f"{url}/openapi.json",
        documentation=f"{url}/docs",
        try_this="rose quickstart",
    )


@get("/health", opt={PUBLIC: True})
async def health() -> schema.Health:
    """Say that the process answers."""
    return schema.Health(status="ok")


NOT_READY = ResponseSpec(schema.Readiness, generate_examples=False, description="Requests cannot be served.")


@get("/ready", opt={PUBLIC: True}, responses={503: NOT_READY})
async def ready(services: TheServices) -> Response[schema.Readiness]:
    """Say whether requests can be served: 200, also when degraded, else 503."""
    postgres, migrations, nats = "away", "unknown", "unknown"
    views: dict[str, str] = {}
    kinds: list[str] = []
    with anyio.move_on_after(CHECK_SECONDS):
        try:
            pending = [one.name for one in await migrate.status(services.pool) if one.state != "applied"]
            postgres = "connected"
            migrations = f"not applied: {', '.join(pending)}" if pending else "applied"
            views = {one.name: one.status for one in await list_projections(services.pool)}
            kinds = [worker.kind for worker in await leases.workers(services.pool)]
        except RoseError:
            postgres = "away"
    relay = views.pop(RELAY, None) if "projections" in kinds else None
    nats = {None: "unknown", "running": "connected"}.get(relay, "away")
    can_work = postgres == "connected" and migrations == "applied"
    whole = nats == "connected" and "stopped" not in views.values()
    report = schema.Readiness(
        status=("ready" if whole else "degraded") if can_work else "not_ready",
        postgres=postgres,
        migrations=migrations,
        nats=nats,
        projections=views,
        trainers=kinds.count("trainer"),
        engines=kinds.count("inference"),
        waiting_for_engine=len(services.line),
    )
    return Response(report, status_code=200 if can_work else 503)


HANDLERS = (welcome, health, ready)
