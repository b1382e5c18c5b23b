"""Starts the services of compose.yaml on this machine, each by the command line and environment written there.

There is no Docker here, so this does what Docker would do: fill in variables, put a folder in a volume's place, map
addresses and ports. Postgres gets what its image's entry point does before the command: a cluster and a password.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import yaml

from rose.local import account, launcher, postgres
from rose.local.nats import packaged_binary
from tests.local.rose_up import free_port

COMPOSE = Path(__file__).parents[2] / "compose.yaml"
START_SECONDS = 120
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?:(:[-?])((?:[^{}]|\{[^{}]*\})*))?\}")


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Fill in `${NAME}`, `${NAME:-default}` and `${NAME:?message}` as docker compose does; `$$` is a dollar."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name, operator, rest = found.groups()
        if variables.get(name):
            return variables[name]
        if operator == ":?":
            raise KeyError(f"{name}: {rest}")
        return interpolated(rest or "", variables)

    return _VARIABLE.sub(value, text)


class Composed:
    """The services of compose.yaml below `folder`."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.variables = variables
        text = COMPOSE.read_text()
        self.parsed: dict[str, Any] = yaml.safe_load(text)
        self.ports = {"5432": free_port(), "4222": free_port(), "8004": free_port()}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.chmod(0o711)

    @property
    def url(self) -> str:
        """Address of the API."""
        return f"http://127.0.0.1:{self.ports['8004']}"

    def environment(self, service: str) -> dict[str, str]:
        """Return the environment of a service as it would be in its container, with this machine's addresses."""
        written: dict[str, str] = self.parsed["services"][service]["environment"]
        return {name: self._here(interpolated(value, self.variables)) for name, value in written.items()}

    def _here(self, value: str) -> str:
        for name, port in (("postgres", "5432"), ("nats", "4222")):
            value = value.replace(f"@{name}:{port}", f"@127.0.0.1:{self.ports[port]}")
        value = value.replace("/var/lib/rose", str(self.folder / "rose-data")).replace("0.0.0.0", "127.0.0.1")
        return re.sub(r"\b8004$", str(self.ports["8004"]), value)

    def start(self, service: str, name: str | None = None) -> None:
        """Start a service by its command; `name` tells several of one kind apart."""
        command: list[str] = self.parsed["services"][service]["command"]
        program, fds = self._command(service, command)
        environment = {"PATH": f"{sysconfig.get_path('scripts')}:/usr/bin:/bin", **self.environment(service)}
        environment |= {"OMP_NUM_THREADS": "1", "ROSE_TORCH_THREADS": "1", "ROSE_INFERENCE_THREADS": "1"}
        with self.log(name or service).open("ab") as log:
            self.processes[name or service] = subprocess.Popen(
                program, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds
            )

    def log(self, name: str) -> Path:
        """Return the log file of a service."""
        return self.folder / f"{name}.log"

    def _command(self, service: str, command: list[str]) -> tuple[list[str], tuple[int, ...]]:
        if service == "postgres":
            return self._postgres(command)
        if service == "nats":
            assert command[0] == "nats-server"
            return launcher.command([packaged_binary(), command[1], self._nats_configuration(command[2])])
        return launcher.command(command)

    def _nats_configuration(self, path: str) -> Path:
        """Write the configuration that compose.yaml puts at `path`."""
        [mounted] = self.parsed["services"]["nats"]["configs"]
        assert mounted["target"] == path
        text = interpolated(self.parsed["configs"][mounted["source"]]["content"], self.variables)
        text = text.replace('"0.0.0.0:4222"', f'"127.0.0.1:{self.ports["4222"]}"')
        text = text.replace('"/data"', f'"{self.folder / "nats-data"}"')
        configuration = self.folder / "nats.conf"
        configuration.write_text(text)
        return configuration

    def _postgres(self, command: list[str]) -> tuple[list[str], tuple[int, ...]]:
        """Do what the image's entry point does, and return its command for this machine."""
        given = self.environment("postgres")
        data = self.folder / "postgres-data"
        server = postgres.Postgres(self.folder)
        owner = server.account
        if owner:
            account.let_through(owner, self.folder)
        if not data.exists():
            postgres.own_folder(data, owner)
            password = self.folder / "password"
            password.write_text(given["POSTGRES_PASSWORD"])
            initdb, fds = launcher.command(
                [server.bin / "initdb", "-D", data, "-U", given["POSTGRES_USER"], f"--pwfile={password}",
                 "--auth=scram-sha-256", "--encoding=UTF8", *given["POSTGRES_INITDB_ARGS"].split()],
                account=owner and owner.name,
            )  # fmt: skip
            subprocess.run(initdb, pass_fds=fds, check=True, capture_output=True, cwd="/")
            single, fds = launcher.command(
                [server.bin / "postgres", "--single", "-D", data, "postgres"], account=owner and owner.name
            )
            statement = f"create database {given['POSTGRES_DB']}\n"
            subprocess.run(single, pass_fds=fds, input=statement.encode(), check=True, capture_output=True, cwd="/")
        assert command[0] == "postgres"
        here = ["-D", data, "-p", str(self.ports["5432"]), "-c", "listen_addresses=127.0.0.1", "-k", ""]
        return launcher.command(
            [server.bin / "postgres", *command[1:], *here], death_signal=signal.SIGINT, account=owner and owner.name
        )

    def ready(self) -> dict[str, Any]:
        """Return the API's readiness; empty while it does not answer."""
        try:
            return httpx2.get(f"{self.url}/ready", trust_env=False).json()
        except (httpx2.TransportError, ValueError):
            return {}

    def wait_until_ready(self, **wanted: int) -> None:
        """Wait until the API is ready and counts the wanted processes."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            found = self.ready()
            if found.get("status") == "ready" and all(found[name] == count for name, count in wanted.items()):
                return
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if time.monotonic() > deadline or len(ended) == len(self.processes):
                logs = "\n".join(f"{name}: {self.log(name).read_text()[-1500:]}" for name in self.processes)
                raise AssertionError(f"not ready: {found}; ended: {ended}\n{logs}")
            time.sleep(0.05)  # another process's state: nothing here can be waited on

    def stop(self, name: str) -> int:
        """Stop one service, as `docker compose stop` does; return its exit status."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        try:
            return process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def stop_all(self) -> dict[str, int]:
        """Stop everything in reverse order, Postgres last; return the exit statuses."""
        servers = [name for name in ("nats", "postgres") if name in self.processes]
        others = [name for name in reversed(self.processes) if name not in servers]
        return {name: self.stop(name) for name in (*others, *servers)}
