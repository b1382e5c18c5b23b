"""`rose doctor`: what this machine and installation have, and for each problem the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli.options import COMMON, Common
from cli.output import size
from rose import settings as settings_module
from rose.errors import RoseError

if TYPE_CHECKING:
    from rose.settings import Settings

Verdict = Literal["ok", "warn", "fail"]
OLDEST_PYTHON = (3, 11)
NEEDED_MODULES = ("asyncpg", "nats", "litestar", "uvicorn", "msgspec", "anyio", "httpx2", "stamina")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    verdict: Verdict
    text: str
    mend: str | None = None
    """Command or setting that mends it."""


def doctor(*, common: Common = COMMON) -> int:
    """Check this machine and this installation, and say what mends each problem; exit 1 when something fails."""
    findings = examine()
    shown = [{"name": one.name, "verdict": one.verdict, "text": one.text, "mend": one.mend} for one in findings]
    lines: list[str] = []
    for one in findings:
        lines.append(f"{one.verdict:<5} {one.name:<12} {one.text}")
        if one.mend and one.verdict != "ok":
            lines.append(f"{'':<18} mend: {one.mend}")
    failed = [one.name for one in findings if one.verdict == "fail"]
    lines.append("Everything that ROSE needs is there." if not failed else f"To mend: {', '.join(failed)}")
    common.output.show(shown, identity="ok" if not failed else "fail", lines=lines)
    return 1 if failed else 0


def examine() -> list[Finding]:
    """Run every check; one that breaks is itself a finding."""
    findings = [_python(), _modules()]
    try:
        settings = settings_module.load()
    except RoseError as problem:
        return [*findings, Finding("settings", "fail", problem.message, "correct that setting")]
    findings.append(Finding("settings", "ok", f"data folder {settings.data_dir}, address {settings.url}"))
    checks: tuple[Callable[[Settings], Iterable[Finding]], ...] = (
        _data_folder,
        _space,
        _embedded,
        _port,
        _services,
        _training,
        _models,
    )
    for check in checks:
        findings.extend(_all_of(check, settings))
    return findings


def _all_of(check: Callable[[Settings], Iterable[Finding]], settings: Settings) -> list[Finding]:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        return list(check(settings))
    except RoseError as problem:
        return [Finding(name, "fail", problem.message, problem.hint)]
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        return [Finding(name, "fail", f"{where}{problem.strerror or problem}", "give this account the rights to it")]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "fail", f"Python {version} is too old", "use Python 3.11 or newer")
    return Finding("python", "ok", f"Python {version}")


def _modules() -> Finding:
    missing = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("packages", "fail", f"not installed: {', '.join(missing)}", "pip install --force-reinstall rose")
    return Finding("packages", "ok", "all packages of the server are installed")


def _data_folder(settings: Settings) -> Iterable[Finding]:
    folder = settings.data_dir
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("data folder", "fail", f"{existing} cannot be written to", "ROSE_DATA_DIR=~/rose rose up")
    elif folder.exists() and folder.stat().st_mode & 0o022:
        yield Finding("data folder", "fail", f"{folder} can be written to by others", f"chmod go-w {folder}")
    elif closed := _closed_to_postgres(settings):
        yield Finding(
            "data folder",
            "fail",
            f"only root can enter {closed}, and as root Postgres runs under another account",
            f"ROSE_DATA_DIR=/var/lib/rose rose up, or chmod o+x {closed}",
        )
    else:
        yield Finding("data folder", "ok", f"{folder} can be written to")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _closed_to_postgres(settings: Settings) -> Path | None:
    """Return the folder above the data folder that the embedded Postgres could not pass, or None."""
    from rose.local import account

    owner = account.needed() if settings.database_url is None else None
    return account.closed_folder(owner, _existing(settings.data_dir.parent)) if owner else None


def _space(settings: Settings) -> Iterable[Finding]:
    folder = _existing(settings.blobs)
    free = shutil.disk_usage(folder).free
    if free < settings.min_free_bytes:
        yield Finding(
            "space",
            "fail",
            f"{size(free)} are free in {folder}, under the floor of {size(settings.min_free_bytes)}",
            "rose models delete NAME, rose files delete ID, or set ROSE_DATA_DIR to a larger disk",
        )
    else:
        yield Finding("space", "ok", f"{size(free)} are free in {folder}")


def _embedded(settings: Settings) -> Iterable[Finding]:
    from rose.local.nats import packaged_binary
    from rose.local.postgres import packaged_binaries

    for name, given, find in (
        ("postgres", settings.database_url, packaged_binaries),
        ("nats", settings.nats_url, packaged_binary),
    ):
        if given is not None:
            yield Finding(name, "ok", "given by URL")
            continue
        try:
            found = find()
        except RoseError as problem:
            variable = "ROSE_DATABASE_URL" if name == "postgres" else "ROSE_NATS_URL"
            yield Finding(name, "fail", problem.message, f"pip install 'rose[local]', or set {variable}")
        else:
            yield Finding(name, "ok", f"the embedded server is installed: {found}")


def _port(settings: Settings) -> Iterable[Finding]:
    from rose.local import state

    running = state.status(settings)
    url = running.url if running else settings.url
    if _answers(url):
        yield Finding("address", "ok", f"ROSE answers at {url}")
        return
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as problem:
            yield Finding(
                "address",
                "fail",
                f"port {settings.port} on {settings.host} cannot be taken: {problem.strerror}",
                f"rose up --port {settings.port + 1}, or stop what uses it",
            )
            return
    yield Finding("address", "ok", f"port {settings.port} on {settings.host} is free")


def _answers(url: str) -> bool:
    import httpx2

    try:
        body: Any = httpx2.get(f"{url}/health", timeout=5.0, trust_env=False).json()
    except (httpx2.HTTPError, ValueError):
        return False
    return isinstance(body, dict) and "status" in body


def _services(settings: Settings) -> Iterable[Finding]:
    from rose.local import state

    try:
        connected = state.connection(settings)
    except RoseError as problem:
        yield Finding("database", "warn", problem.message, problem.hint)
        return
    import anyio

    yield from anyio.run(_examine_services, connected)


async def _examine_services(settings: Settings) -> list[Finding]:
    from rose import leases
    from rose.log import migrate
    from rose.log.pool import open_pool

    findings: list[Finding] = []
    try:
        pool = await open_pool(settings, min_size=1, max_size=2)
    except RoseError as problem:
        mend = "start that Postgres, correct ROSE_DATABASE_URL, or unset it and run: rose up"
        return [Finding("database", "fail", problem.message, mend), *await _examine_nats(settings)]
    try:
        behind = [one.name for one in await migrate.status(pool) if one.state != "applied"]
        if behind:
            findings.append(
                Finding("database", "fail", f"migrations are missing: {', '.join(behind)}", "rose db migrate")
            )
            return [*findings, *await _examine_nats(settings)]
        findings.append(Finding("database", "ok", "Postgres answers, all migrations are in"))
        live = [worker.kind for worker in await leases.workers(pool)]
    finally:
        await pool.close()
    for kind in ("trainer", "inference", "projections"):
        if kind in live:
            findings.append(Finding(kind, "ok", f"{live.count(kind)} connected"))
        else:
            findings.append(Finding(kind, "fail", f"no {kind} process is connected", f"rose serve {kind} (or rose up)"))
    return [*findings, *await _examine_nats(settings)]


async def _examine_nats(settings: Settings) -> list[Finding]:
    from urllib.parse import urlsplit

    import anyio

    if settings.nats_url is None:
        return [Finding("events", "warn", "no NATS is given, so other services cannot follow", "set ROSE_NATS_URL")]
    address = urlsplit(settings.nats_url)
    shown = settings.nats_url.rpartition("@")[2]  # without the password
    try:
        with anyio.fail_after(5.0):
            stream = await anyio.connect_tcp(address.hostname or "127.0.0.1", address.port or 4222)
            greeting = await stream.receive(64)
            await stream.aclose()
    except (OSError, TimeoutError, anyio.EndOfStream) as problem:
        mend = "start that NATS, or correct ROSE_NATS_URL; jobs go on without it"
        return [Finding("events", "fail", f"no NATS answers at {shown}: {problem}", mend)]
    if not greeting.startswith(b"INFO "):
        return [Finding("events", "fail", f"what answers at {shown} is no NATS", "correct ROSE_NATS_URL")]
    return [Finding("events", "ok", f"NATS answers at {shown}")]


def _training(settings: Settings) -> Iterable[Finding]:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding(
            "training",
            "warn",
            f"not installed: {', '.join(missing)}; this machine can serve the API but not train or chat",
            "pip install 'rose[trainer]'",
        )
        return
    yield Finding("training", "ok", f"torch is installed; device setting: {settings.device}")


def _models(settings: Settings) -> Iterable[Finding]:
    return [_model(alias, settings) for alias in sorted(settings.model_aliases)]


def _model(alias: str, settings: Settings) -> Finding:
    from rose.domain.bases import resolve_alias, source_kind
    from rose.language_models.locate import imported_names, locate

    name = f"model {alias}"
    try:
        source = resolve_alias(alias, settings.model_aliases)
    except RoseError as problem:
        return Finding(name, "fail", problem.message, "correct model_aliases (ROSE_MODEL_ALIASES)")
    kind = source_kind(source, imported_names(settings.models))
    if kind is None:
        return Finding(name, "fail", f"{source!r} is no model", f"ROSE_MODEL_ALIASES={alias}=/folder")
    try:
        found = locate(source, models_dir=settings.models, offline=True)
    except ModuleNotFoundError:  # no hub library without the trainer extra, and then no models either
        return Finding(name, "ok", f"{source} (the trainers' machines have it or not)")
    except RoseError as problem:
        return _missing_model(name, alias, source, kind, settings, problem)
    return Finding(name, "ok", f"{source} is at {found.path}")


def _missing_model(name: str, alias: str, source: str, kind: str, settings: Settings, problem: RoseError) -> Finding:
    if kind == "folder":
        return Finding(name, "fail", problem.message, f"ROSE_MODEL_ALIASES={alias}=/folder/of/a/model")
    if kind == "built_in":
        return Finding(name, "ok", f"{source} is built before its first job, in about a minute")
    if kind == "imported":
        what = f"{source} is not on this machine; the first job fetches it from the Python package index"
        return Finding(name, "warn", what, f"rose models pull {source}")
    if settings.hub_offline or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return Finding(
            name,
            "fail",
            f"{source} is not in the hub's cache, and offline mode is on",
            f"HF_HUB_OFFLINE=0 ROSE_HUB_OFFLINE=0 rose models pull {alias}, or ROSE_MODEL_ALIASES={alias}=/folder",
        )
    return Finding(
        name,
        "warn",
        f"{source} is not on this machine; the first job downloads it from the hub",
        f"rose models pull {alias}, or where there is no hub ROSE_MODEL_ALIASES={alias}=/folder",
    )
