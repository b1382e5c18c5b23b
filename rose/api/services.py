"""What the handlers work with, made once by whoever starts the process and passed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from litestar import Litestar
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from rose.api.limits import Limits
from rose.api.line import Line
from rose.blobs import Blobs
from rose.commands import Commands
from rose.log.tail import Tailer
from rose.settings import Settings
from rose.usage import Meter

if TYPE_CHECKING:
    from rose.inference.client import EngineClient
    from rose.log.pool import Pool


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of ROSE that the API uses."""

    settings: Settings
    pool: Pool
    tailer: Tailer
    blobs: Blobs
    commands: Commands
    engines: EngineClient
    line: Line
    limits: Limits
    meter: Meter


TheServices = NamedDependency[SkipValidation[Services]]
"""The type under which a handler asks for the services."""


def services_of(app: Litestar) -> Services:
    """Return the services that `create_app` gave to `app`."""
    return app.state["services"]
