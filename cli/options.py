"""Options that most commands share, and the way from them to a client and an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from cli.output import Output

if TYPE_CHECKING:
    from cli.client import Client

_GROUP = Group("Common options", sort_key=99)


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options of every command that talks to a server."""

    url: Annotated[str | None, Parameter(env_var="ROSE_URL", group=_GROUP)] = None
    """Address of the ROSE server; default: the one that runs on the data folder."""
    api_key: Annotated[str | None, Parameter(env_var=("ROSE_API_KEY", "OPENAI_API_KEY"), group=_GROUP)] = None
    """Key for the server, where it wants one."""
    json: Annotated[bool, Parameter(env_var="ROSE_JSON", negative="", group=_GROUP)] = False
    """Print the API's object unchanged."""
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], env_var="ROSE_QUIET", negative="", group=_GROUP)] = False
    """Print only ids and names."""

    @property
    def output(self) -> Output:
        """The output as asked for."""
        return Output(json=self.json, quiet=self.quiet)

    def client(self) -> Client:
        """Return a client of the server that is meant."""
        from cli.client import Client

        return Client(self.url or _local_url(), self.api_key)


def _local_url() -> str:
    """Return where the ROSE of this data folder answers, or where it would."""
    from rose import settings
    from rose.local import state

    given = settings.load()
    running = state.status(given)
    return running.url if running else given.url


COMMON = Common()
