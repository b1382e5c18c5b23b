"""From a request to its frame at 2,000 clients of event streams while a small model trains beside them.

Every process is one of its own, as with `rose up`: Postgres, NATS, API, projections, trainer with its child, clients.
100 clients watch the job that trains; the others watch 100 jobs that requests pause and resume, five a second. Each
round measures this tree and the tree of BEFORE, on the same machine one after the other.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx2
import msgspec
import psutil

from benchmarks.record import record
from benchmarks.stream_clients import Load, Measured, percentiles
from benchmarks.streams import wait_until_ready
from rose.commands import Commands
from rose.language_models.tiny import build_fixture
from rose.log.append import Actor
from rose.log.pool import open_pool
from tests.acceptance.seed import training_data
from tests.api.running import Trainer
from tests.local.rose_up import free_port
from tests.services import private_folder, running_nats, running_postgres

ROOT = Path(__file__).parent.parent
BEFORE = "c7f6a93"
"""The last commit that encoded each frame once for each client."""
ROUNDS = 3
JOBS = 100
LOAD = Load(trained="", trained_clients=100, others=(), other_clients=1900, requests_per_second=5.0, seconds=40.0)
EXAMPLES = 2000
EPOCHS = 10
STEP_SECONDS = 180.0
ACTOR = Actor(kind="system", name="benchmark")
SERVICES = ("api", "projections")


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One contestant in one round."""

    measured: Measured
    steps_per_second: float
    load_average: float
    api_seconds: float
    """Processor time of the API while the load lasted."""


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit."""
    with private_folder() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(folder, filter="data")
        yield folder


@contextmanager
def process(tree: Path, kind: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run one process of ROSE from `tree`."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "rose.app", kind],
            cwd=tree,
            env={**environment, "PYTHONPATH": str(tree)},
            stdout=output,
            stderr=output,
        )
    try:
        yield started
    finally:
        started.terminate()
        started.wait(60)


async def paused_jobs(dsn: str, port: int, file_id: str, model: Path) -> tuple[str, ...]:
    """Create jobs through the API, pass their validation as a trainer would, and pause them."""
    pool = await open_pool(dsn, min_size=1, max_size=4)
    commands = Commands(pool)
    services: Any = SimpleNamespace(pool=pool, commands=commands)
    jobs: list[str] = []
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as http:
            for _ in range(JOBS):
                body = {"training_file": file_id, "model": str(model)}
                job_id = (await http.post("/fine_tuning/jobs", json=body)).json()["id"]
                await Trainer(services, job_id).validate()
                # By the tree itself: an older one cannot read the event that this one would write.
                (await http.post(f"/fine_tuning/jobs/{job_id}/pause")).raise_for_status()
                jobs.append(job_id)
    finally:
        await pool.close()
    return tuple(jobs)


def trained_job(http: httpx2.Client, file_id: str, model: Path) -> str:
    """Create the job that trains all the while, and return its id."""
    parameters = {"n_epochs": EPOCHS, "batch_size": 1}
    body = {"training_file": file_id, "model": str(model), "hyperparameters": parameters}
    answer = http.post("/fine_tuning/jobs", json=body)
    answer.raise_for_status()
    return answer.json()["id"]


def last_step(http: httpx2.Client, job_id: str) -> int:
    """Return the newest step that the job has told of."""
    events = http.get(f"/fine_tuning/jobs/{job_id}/events", params={"limit": 1}).json()["data"]
    return events[0]["data"].get("step", 0) if events else 0


def wait_for_steps(http: httpx2.Client, job_id: str) -> None:
    """Wait until the job trains. Raises: TimeoutError."""
    deadline = time.monotonic() + STEP_SECONDS
    while not last_step(http, job_id):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} does not train: {http.get(f'/fine_tuning/jobs/{job_id}').text}")
        time.sleep(0.2)


def measure(tree: Path, model: Path, load: Load, profile: str | None = None) -> Round:
    """Measure the processes of `tree`. `profile`: a command that gets the API's number while the load lasts."""
    port = free_port()
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        postgres = stack.enter_context(running_postgres())
        nats = stack.enter_context(running_nats())
        dsn = postgres.dsn("postgres")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ROSE_")},
            "ROSE_CONFIG": "/nonexistent",
            "ROSE_DATABASE_URL": dsn,
            "ROSE_NATS_URL": nats.url,
            "ROSE_DATA_DIR": str(folder),
            "ROSE_PORT": str(port),
        }
        started = [stack.enter_context(process(tree, kind, environment, folder / f"{kind}.log")) for kind in SERVICES]
        wait_until_ready(port)
        http = stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=60))
        content = training_data().encode() * (EXAMPLES // 2)
        sent = http.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})
        file_id = sent.json()["id"]
        others = anyio.run(paused_jobs, dsn, port, file_id, model)
        trained = trained_job(http, file_id, model)
        stack.enter_context(process(tree, "trainer", environment, folder / "trainer.log"))
        wait_for_steps(http, trained)
        load = msgspec.structs.replace(load, trained=trained, others=others)
        command = [sys.executable, "-m", "benchmarks.stream_clients", str(port)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as clients:
            assert clients.stdin is not None
            assert clients.stdout is not None
            clients.stdin.write(msgspec.json.encode(load) + b"\n")
            clients.stdin.flush()
            assert clients.stdout.readline() == b"ready\n"
            first, began, before = last_step(http, trained), time.monotonic(), os.getloadavg()[0]
            api = psutil.Process(started[0].pid)
            used = sum(api.cpu_times()[:2])
            profiling = subprocess.Popen(profile.format(pid=started[0].pid), shell=True) if profile else None
            measured = msgspec.json.decode(clients.stdout.readline(), type=Measured)
            used = sum(api.cpu_times()[:2]) - used
            rate = (last_step(http, trained) - first) / (time.monotonic() - began)
            if profiling is not None:
                profiling.wait(60)
        assert len(measured.arrivals) == measured.expected, (len(measured.arrivals), measured.expected)
        assert not measured.ended_early
        return Round(measured=measured, steps_per_second=rate, load_average=before, api_seconds=used)


COLUMNS = (
    *("tree", "rounds", "p50 ms", "p99 ms", "worst ms", "answer p50 ms", "answer p99 ms"),
    *("step burst, first to last client ms", "API processor s", "steps/s", "load before"),
)


def row(name: str, rounds: list[Round]) -> list[str]:
    """Return a line of the table: medians over the rounds, but the worst of all."""

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    return [
        name,
        str(len(rounds)),
        f"{median(lambda one: percentiles(one.measured.arrivals)[0]):.1f}",
        f"{median(lambda one: percentiles(one.measured.arrivals)[1]):.1f}",
        f"{max(percentiles(one.measured.arrivals)[2] for one in rounds):.1f}",
        f"{median(lambda one: percentiles(one.measured.answers)[0]):.1f}",
        f"{median(lambda one: percentiles(one.measured.answers)[1]):.1f}",
        f"{median(lambda one: percentiles(one.measured.step_spread)[0]):.1f}",
        f"{median(lambda one: one.api_seconds):.1f}",
        f"{median(lambda one: one.steps_per_second):.0f}",
        f"{median(lambda one: one.load_average):.1f}",
    ]


def main() -> None:
    """Measure both trees in turns and record the medians; with `--only` or `--profile` nothing is recorded."""
    options = argparse.ArgumentParser()
    options.add_argument("--only", choices=("before", "now"))
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--profile", help="command that gets the API's number as {pid} while the load lasts")
    given, _ = options.parse_known_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    found: dict[str, list[Round]] = {"before": [], "now": []}
    with private_folder() as folder, tree_of(BEFORE) as old:
        model = build_fixture(folder / "model")
        for _ in range(given.rounds):
            for name, tree in (("before", old), ("now", ROOT)):
                if given.only in (None, name):
                    found[name].append(measure(tree, model, LOAD, given.profile))
                    print(*row(name, found[name][-1:]), flush=True)
    rows = [row(name, rounds) for name, rounds in found.items() if rounds]
    if given.only is None and given.profile is None:
        what = (
            f"{__doc__.splitlines()[0]} `before` is {BEFORE}, the last commit that encoded a frame for each client; "
            "the goal is a p99 below 50 ms. Frames come while the request still waits for its own answer, which has "
            "the same delays: what is left is the append itself, on two cores that training, Postgres and the clients "
            "share. Of the 40 seconds the API works for about three."
        )
        print("written to", record("streams_under_training", what, COLUMNS, rows))


if __name__ == "__main__":
    main()
