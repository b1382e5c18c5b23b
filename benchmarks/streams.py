"""Time from the call of an append to its arrival at clients of event streams: with 1, 100 and 2,000 clients.

The API is a process of its own on a Postgres with fsync; the clients share this process, so the figures hold its
time too. The peer is a client that asks the list every 250 ms, as a script without streams does.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from uuid import uuid4

import anyio
import httpx2
import msgspec

from benchmarks.record import record
from rose.domain.job_events import JobWarned
from rose.domain.job_values import Warning
from rose.log.append import Actor, StreamWrite, append
from rose.log.pool import Pool, open_pool
from tests.acceptance.seed import training_data
from tests.eventually import eventually
from tests.local.rose_up import free_port
from tests.services import private_folder, running_postgres

CLIENTS = (1, 100, 2000)
JOBS = 100
EVENTS_PER_SECOND = 50
SECONDS = 8.0
POLL_SECONDS = 0.25
READY_SECONDS = 60.0
ACTOR = Actor(kind="system", name="benchmark")
MARK = "sent at "


class Client:
    """One event stream; keeps the latency in seconds of every event that it receives."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.ready = asyncio.Event()

    async def follow(self, port: int, job_id: str) -> None:
        """Read the stream until cancelled."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = f"GET /v1/fine_tuning/jobs/{job_id}/events?stream=true HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writer.write(request.encode())
        try:
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    self._take(msgspec.json.decode(line[6:]))
        finally:
            writer.close()

    def _take(self, event: dict[str, str]) -> None:
        self.ready.set()
        if event["message"].startswith(MARK):
            self.latencies.append(time.time() - float(event["message"].removeprefix(MARK)))


class Writer:
    """Appends an event a time to one job after another, at a steady rate."""

    def __init__(self, pool: Pool, jobs: Sequence[str]) -> None:
        self._pool = pool
        self._versions = dict.fromkeys(jobs, 1)

    async def write(self) -> None:
        """Write for SECONDS."""
        jobs = list(self._versions)
        begin = time.perf_counter()
        for number in range(int(SECONDS * EVENTS_PER_SECOND)):
            await asyncio.sleep(max(0.0, begin + number / EVENTS_PER_SECOND - time.perf_counter()))
            await self._append(jobs[number % len(jobs)])

    async def _append(self, job_id: str) -> None:
        event = JobWarned(epoch=0, warning=Warning(code="benchmark", message=f"{MARK}{time.time()}"))
        version = self._versions[job_id]
        write = StreamWrite(stream_id=f"job/{job_id}", expected_version=version, events=(event,), row=None)
        await append(self._pool, [write], command_id=str(uuid4()), actor=ACTOR)
        self._versions[job_id] = version + 1


async def streams(pool: Pool, port: int, count: int) -> list[float]:
    """Return the latencies of `count` clients on new jobs."""
    jobs = await new_jobs(port, min(count, JOBS))
    clients = [Client() for _ in range(count)]
    tasks = [asyncio.create_task(client.follow(port, jobs[i % len(jobs)])) for i, client in enumerate(clients)]
    try:
        async with asyncio.timeout(READY_SECONDS):
            for client in clients:
                await client.ready.wait()
        await Writer(pool, jobs).write()
        expected = sum(int(SECONDS * EVENTS_PER_SECOND / len(jobs)) for _ in clients)
        await eventually(lambda: sum(len(client.latencies) for client in clients) >= expected)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [latency for client in clients for latency in client.latencies]


async def polling(pool: Pool, port: int) -> list[float]:
    """Return the latencies of one client that asks the list again and again."""
    [job_id] = await new_jobs(port, 1)
    latencies: list[float] = []
    writing = asyncio.create_task(Writer(pool, [job_id]).write())
    after: str | None = None
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        while not writing.done():
            answer = await http.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100})
            now = time.time()
            for event in answer.json()["data"]:
                if after is not None and event["id"] <= after:
                    break
                if event["message"].startswith(MARK):
                    latencies.append(now - float(event["message"].removeprefix(MARK)))
            after = answer.json()["data"][0]["id"]
            await asyncio.sleep(POLL_SECONDS)
    await writing
    return latencies


async def new_jobs(port: int, count: int) -> list[str]:
    """Create jobs through the API and return their ids."""
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as http:
        content = training_data().encode()
        file = await http.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})
        body = {"training_file": file.json()["id"], "model": "tiny"}
        return [(await http.post("/fine_tuning/jobs", json=body)).json()["id"] for _ in range(count)]


async def measure(dsn: str, port: int) -> list[list[str]]:
    """Return the table's rows."""
    pool = await open_pool(dsn, min_size=2, max_size=4)
    try:
        rows = [row("list, asked every 250 ms", 1, await polling(pool, port))]
        for count in CLIENTS:
            rows.append(row("stream", count, await streams(pool, port, count)))
    finally:
        await pool.close()
    return rows


def row(way: str, clients: int, latencies: list[float]) -> list[str]:
    """Return one line of the table, times in milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    worst = max(latencies)
    return [way, str(clients), str(len(latencies)), *(f"{1000 * one:.1f}" for one in (cuts[49], cuts[98], worst))]


def main() -> None:
    """Run on a Postgres and an API of its own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    port = free_port()
    with private_folder() as folder, running_postgres() as service:
        dsn = service.dsn("postgres")
        environment = {**os.environ, "ROSE_DATABASE_URL": dsn, "ROSE_DATA_DIR": str(folder), "ROSE_PORT": str(port)}
        log = (folder / "api.log").open("wb")
        with log, subprocess.Popen([sys.executable, "-m", "rose.app", "api"], env=environment, stderr=log) as api:
            try:
                wait_until_ready(port)
                rows = anyio.run(measure, dsn, port)
            finally:
                api.terminate()
                api.wait(30)
    columns = ("way", "clients", "deliveries", "p50 ms", "p99 ms", "worst ms")
    print("written to", record("streams", __doc__.splitlines()[0], columns, rows))


def wait_until_ready(port: int) -> None:
    """Wait until the API answers. Raises: TimeoutError."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with suppress(httpx2.TransportError):
            if httpx2.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError("the API does not answer")


if __name__ == "__main__":
    main()
