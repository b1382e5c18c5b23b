"""The unprivileged account that Postgres runs as when ROSE is started by root, and what that account may reach."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import msgspec

from rose.errors import Unavailable

CANDIDATES = ("postgres", "nobody")


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """An existing account without rights of its own."""

    name: str
    uid: int
    gid: int


def needed() -> Account | None:
    """Return the account to drop to, or None when this process is not root's.

    Raises: Unavailable when there is no such account.
    """
    if os.geteuid() != 0:
        return None
    for name in CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid)
    raise Unavailable(
        "Postgres does not run as root, and there is neither an account postgres nor one called nobody.",
        code="no_account",
        hint="Run rose as another user, or give a Postgres with ROSE_DATABASE_URL.",
    )


def may_enter(account: Account, path: Path) -> bool:
    """Return whether the account can pass through the folder, or run the file, at `path`; asked of the kernel."""
    program = shutil.which("test") or "/bin/test"
    answer = subprocess.run(
        [program, "-x", str(path)], user=account.uid, group=account.gid, extra_groups=[], cwd="/", check=False
    )
    return answer.returncode == 0


def closed_folder(account: Account, path: Path) -> Path | None:
    """Return the outermost folder on the way to `path` that the account cannot pass, or None."""
    for folder in (*reversed(path.parents), path):
        if not may_enter(account, folder):
            return folder
    return None


def let_through(account: Account, data_dir: Path) -> None:
    """Make the data folder itself passable for the account; folders above it are left alone.

    Raises: Unavailable naming the folder above it that is closed.
    """
    if data_dir.stat().st_uid == os.geteuid() and not may_enter(account, data_dir):
        data_dir.chmod(data_dir.stat().st_mode & 0o7777 | 0o011)
    closed = closed_folder(account, data_dir)
    if closed is not None:
        raise Unavailable(
            f"The data folder {data_dir} lies below {closed}, which only root can enter; "
            f"Postgres runs as {account.name} and cannot reach it.",
            code="data_folder_closed",
            hint=f"Use another folder (ROSE_DATA_DIR=/var/lib/rose), or open this one: chmod o+x {closed}",
        )
