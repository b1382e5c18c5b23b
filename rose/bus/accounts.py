"""What nats-server is told of the keys that read: an account of its own for each, as text of its configuration.

Permissions alone would not confine a reader: JetStream answers to whatever reply subject a request names, so one that
shared ROSE's account could let it publish on any subject, also into the stream (docs/adr/0011-an-account-per-reader.md).
"""

from __future__ import annotations

import contextlib
import json

import anyio
import msgspec
import nats.errors
from nats.aio.client import Client

from rose.bus.answers import BusRefused, translated
from rose.bus.connection import CLOSE_SECONDS, CONNECT_SECONDS, REQUEST_SECONDS, without_password
from rose.subjects import READER_API, STREAM, inbox_prefix, project_subjects

ACCOUNT = "ROSE"
"""The account of ROSE's own users and of the stream."""
EXPORTS = f"""\
    exports: [
      {{ service: "$JS.API.CONSUMER.INFO.{STREAM}.*" }}
      {{ service: "$JS.API.CONSUMER.MSG.NEXT.{STREAM}.*", response_type: stream }}
      {{ service: "$JS.ACK.{STREAM}.>" }}
      {{ stream: "rose.v2.>" }}
    ]
"""
"""What the readers' accounts import from."""
READER = """\
{key} {{
  users: [ {{
    user: {key}, password: {bcrypt}
    permissions: {{
      publish: [
        "{api}.CONSUMER.INFO.{stream}.{key}", "{api}.CONSUMER.MSG.NEXT.{stream}.{key}", "$JS.ACK.{stream}.{key}.>"
      ]
      subscribe: ["{subjects}", "{inbox}.>"]
    }}
  }} ]
  imports: [
    {{ service: {{ account: {account}, subject: "$JS.API.CONSUMER.INFO.{stream}.{key}" }}
      to: "{api}.CONSUMER.INFO.{stream}.{key}" }}
    {{ service: {{ account: {account}, subject: "$JS.API.CONSUMER.MSG.NEXT.{stream}.{key}" }}
      to: "{api}.CONSUMER.MSG.NEXT.{stream}.{key}" }}
    {{ service: {{ account: {account}, subject: "$JS.ACK.{stream}.{key}.>" }} }}
    {{ stream: {{ account: {account}, subject: "{subjects}" }} }}
  ]
}}
"""
HEAD = "# Written by ROSE from its keys, whenever they change: an account for each key that reads.\n"


def reader(key_id: str, project: str, bcrypt: str) -> str:
    """Return the account of a key that reads the subjects of its project."""
    return READER.format(
        key=key_id,
        bcrypt=json.dumps(bcrypt),
        account=ACCOUNT,
        api=READER_API,
        stream=STREAM,
        subjects=project_subjects(project),
        inbox=inbox_prefix(key_id),
    )


class _Error(msgspec.Struct, frozen=True):
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: _Error | None = None


async def reload(system_url: str) -> None:
    """Let the server read its configuration again; `system_url` has a user of its system account.

    Connections of users that are gone end with it. Raises: BusUnavailable; BusRefused when the configuration is wrong.
    """
    client = Client()

    async def ignore(_: Exception) -> None:
        """What goes wrong is raised by the calls themselves."""

    try:
        with translated():
            await client.connect(
                system_url, name="rose keys", allow_reconnect=False, connect_timeout=CONNECT_SECONDS, error_cb=ignore
            )
            # nats-server 2.15 brings the imports of a new account to life only when it reads them a second time.
            for _ in range(2):
                await _reload(client, system_url)
    finally:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True), contextlib.suppress(nats.errors.Error, OSError):
            await client.close()


async def _reload(client: Client, system_url: str) -> None:
    subject = f"$SYS.REQ.SERVER.{client._server_info['server_id']}.RELOAD"  # pyright: ignore[reportPrivateUsage]
    try:
        response = await client.request(subject, b"", timeout=REQUEST_SECONDS)
    except nats.errors.NoRespondersError:
        raise BusRefused(
            "The user of ROSE_NATS_SYSTEM_URL is not in NATS' system account, so the server cannot be told to reload."
        ) from None
    error = msgspec.json.decode(response.data, type=_Answer).error
    if error is not None:
        raise BusRefused(f"NATS at {without_password(system_url)}: {error.description}")
