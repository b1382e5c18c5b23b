"""Whether the API and an engine may and can listen where the settings say, and who has the port when not."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from rose.errors import InvalidRequest, Unavailable
from rose.local import processes
from rose.settings import Settings, is_inside

_LISTEN = "0A"


def listen(host: str, port: int, *, backlog: int = 2048, way_out: str | None = None) -> socket.socket:
    """Return a listening socket. `way_out` is how to take another address than one that cannot be had.

    Raises: Unavailable naming who has the port and another one that is free.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise Unavailable(
            f"{host!r} is no address of this machine: {error.strerror}.",
            code="bad_host",
            hint=way_out or "Change --host.",
        ) from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise _refusal(host, port, error, way_out) from None
    return listener


def refuse_open_door(settings: Settings) -> None:
    """Refuse to serve other machines without keys. Raises: InvalidRequest."""
    if not is_inside(settings.host) and not settings.api_keys:
        raise InvalidRequest(
            f"The API would listen on {settings.host}, open to other machines, and no API keys are set.",
            code="no_api_keys",
            param="api_keys",
            hint="Set ROSE_API_KEYS=key1,key2 (clients send one as OPENAI_API_KEY), or listen on 127.0.0.1.",
        )


def refuse_open_engine(settings: Settings) -> None:
    """Refuse to answer other machines' requests to an engine without a token. Raises: InvalidRequest."""
    if not is_inside(settings.inference_host) and not settings.inference_token:
        raise InvalidRequest(
            f"The inference engine would listen on {settings.inference_host}, open to other machines, without a token.",
            code="no_inference_token",
            param="inference_token",
            hint="Set ROSE_INFERENCE_TOKEN, the same for the API and the engines, or listen on 127.0.0.1.",
        )


def reachable_url(host: str, port: int) -> str:
    """Return the address under which other processes reach what listens on `host`."""
    name = platform.node() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def _refusal(host: str, port: int, error: OSError, way_out: str | None) -> Unavailable:
    if isinstance(error, PermissionError):
        return Unavailable(
            f"Port {port} needs rights that this account lacks.",
            code="port_refused",
            hint=way_out or "Use --port 8004.",
        )
    owner = owner_of(port)
    return Unavailable(
        f"Port {port} on {host} cannot be used: {f'{owner} has it' if owner else error.strerror}.",
        code="port_taken",
        hint=way_out or f"End that program, or take another port: rose up --port {port + 1}",
    )


def owner_of(port: int) -> str | None:
    """Return `name (process N)` of who listens on a TCP port, or None when it cannot be seen."""
    if sys.platform == "linux":
        pid = _listener_on_linux(port)
        return f"{Path(processes.arguments(pid)[0]).name} (process {pid})" if pid else None
    program = shutil.which("lsof")
    if program is None:
        return None
    shown = subprocess.run(
        [program, "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"], capture_output=True, text=True, check=False
    )
    fields = {line[:1]: line[1:] for line in shown.stdout.splitlines()}
    return f"{fields['c']} (process {fields['p']})" if {"c", "p"} <= fields.keys() else None


def _listener_on_linux(port: int) -> int | None:
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        for fields in map(str.split, rows):
            if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(str(link.readlink()) in inodes for link in folder.iterdir()):
                return int(folder.parent.name)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # somebody else's process, or one that has just ended
    return None
