"""Builds the HTTP application from its parts; opens nothing and closes nothing."""

from __future__ import annotations

from importlib.metadata import version

from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import ASGIApp

from rose.api import (
    chat,
    content,
    documents,
    files,
    fine_tuning,
    graders,
    health,
    metrics,
    models,
    organization,
    permissions,
    preview,
    uploads,
    usage,
    webhooks,
)
from rose.api.access import PUBLIC, check_access
from rose.api.errors import EXCEPTION_HANDLERS
from rose.api.options import options
from rose.api.principal import principal_of
from rose.api.services import Services
from rose.api.transport import request_envelope

MAX_BODY_BYTES = 16 << 20
"""Largest JSON body; uploads have a setting of their own."""
EXPOSED_HEADERS = [
    *("x-request-id", "openai-processing-ms", "openai-version"),
    *("retry-after", "retry-after-ms", "x-should-retry"),
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
    "x-rose-adapter",
    *("etag", "accept-ranges", "content-range", "content-disposition"),
]


def create_app(services: Services) -> ASGIApp:
    """Return the ASGI application for uvicorn.

    The caller opens and closes what is in `services`. On a stop signal it calls `services.tailer.stop()` first, which
    ends every event stream at once, and then lets uvicorn stop with a graceful timeout.
    """
    return request_envelope(litestar_app(services))


def litestar_app(services: Services) -> Litestar:
    """Return the application without its envelope, to be described or wrapped."""
    origins = list(services.settings.cors_origins)
    handlers = [
        *health.HANDLERS,
        *documents.HANDLERS,
        *files.HANDLERS,
        *content.HANDLERS,
        *uploads.HANDLERS,
        *preview.HANDLERS,
        *fine_tuning.HANDLERS,
        *graders.HANDLERS,
        *metrics.HANDLERS,
        *models.HANDLERS,
        *organization.HANDLERS,
        *permissions.HANDLERS,
        *usage.HANDLERS,
        *webhooks.HANDLERS,
        *chat.HANDLERS,
    ]
    return Litestar(
        [options(handlers), *handlers],  # in this order: else the framework makes its own
        state=State({"services": services}),
        dependencies={
            "services": Provide(lambda: services, sync_to_thread=False, use_cache=True),
            "principal": Provide(principal_of, sync_to_thread=False),
        },
        guards=[check_access],
        exception_handlers=EXCEPTION_HANDLERS,
        request_max_body_size=MAX_BODY_BYTES,
        cors_config=CORSConfig(allow_origins=origins, expose_headers=EXPOSED_HEADERS) if origins else None,
        openapi_config=OpenAPIConfig(
            title="ROSE",
            version=version("rose"),
            components=Components(
                security_schemes={
                    "key": SecurityScheme(type="http", scheme="bearer", description="An API key, where keys are set.")
                }
            ),
            security=[{"key": []}, {}],
            render_plugins=[JsonRenderPlugin(path="/")],
            openapi_router=Router(
                documents.OPENAPI,
                route_handlers=[],
                include_in_schema=False,
                opt={PUBLIC: True},
                before_request=documents.refuse_below,
            ),
        ),
        logging_config=None,
        debug=False,
    )
