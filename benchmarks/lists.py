"""Lists, reads and event pages with 10,000 jobs and a million events, beside a hundredth of that.

Both logs are copies of the same jobs, which were written through the API; each has an API process of its own on the
same Postgres. The two are asked in turns, and the medians compared. The goal is 1.5 times at most.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import anyio
import asyncpg
import httpx2
import msgspec

from benchmarks.large_log import multiply, template
from benchmarks.record import record
from benchmarks.streams import wait_until_ready
from benchmarks.streams_under_training import process
from projections import jobs as jobs_view
from projections.positions import wait_until
from projections.runner import VIEWS
from projections.verify import verify
from rose.commands import Request
from rose.domain.artifacts import Artifact
from rose.domain.files import AddFile
from rose.domain.jobs import JobState
from rose.domain.projects import DEFAULT_PROJECT
from rose.ids import new_id
from rose.log.append import Actor
from rose.log.migrate import migrate
from rose.log.pool import Pool, open_pool
from rose.log.read import head
from rose.settings import load
from tests.api.conftest import serving
from tests.api.running import SEED, Running, Trainer
from tests.eventually import eventually
from tests.local.rose_up import free_port
from tests.services import private_folder, running_postgres

ROOT = Path(__file__).parent.parent
LARGE = 5000
SMALL = 50
STEPS = 190
ROUNDS = 60
WARM = 10
ACTOR = Actor(kind="system", name="benchmark")
RUN = "run_of_its_own"


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """What was written once, and is copied."""

    first: int
    """Position of its first event."""
    last: int
    succeeded: str
    """Id of a job with STEPS events of steps, a checkpoint, a model and a result file."""
    queued: str
    """Id of a job that waits."""
    own: tuple[str, ...]
    """Ids and names that each copy has for itself."""


async def play(dsn: str, folder: Path) -> Played:
    """Write the original through the API, into an empty database."""
    settings = load({"ROSE_CONFIG": "/nonexistent"}, data_dir=str(folder), port=free_port())
    await migrate(dsn)
    pool = await open_pool(dsn)
    try:
        async with serving(settings, pool) as api:
            file_id = (await api.openai.files.create(file=("a.jsonl", SEED), purpose="fine-tune")).id
            first = await head(pool) + 1
            succeeded, own = await _finished(api, file_id)
            waiting = await api.openai.fine_tuning.jobs.create(model="tiny", training_file=file_id)
            await Trainer(api.services, waiting.id).validate()
            waiting_name = (await load_job(api, waiting.id)).model_name
            gone = await _files_that_ended(api)
            last = await head(pool)
            await eventually(lambda: _all_followed(pool, last))
    finally:
        await pool.close()
    own = (*own, waiting.id, waiting_name, *gone)
    return Played(first=first, last=last, succeeded=succeeded, queued=waiting.id, own=own)


async def load_job(api: Running, job_id: str) -> JobState:
    """Return a job's state."""
    state = await jobs_view.find(api.services.pool, job_id)
    assert state is not None
    return state


async def _all_followed(pool: Pool, position: int) -> bool:
    return all([await wait_until(pool, view.name, position) for view in VIEWS])


async def _finished(api: Running, file_id: str) -> tuple[str, tuple[str, ...]]:
    job = await api.openai.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, metadata={"team": "all", "run": RUN}
    )
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    for step in range(1, STEPS + 1):
        await trainer.steps(step, step)
    await trainer.checkpoint(STEPS)
    await trainer.succeed(STEPS)
    state = await load_job(api, job.id)
    done = await api.openai.fine_tuning.jobs.retrieve(job.id)
    return job.id, (job.id, state.model_name, state.checkpoints[0].id, done.result_files[0], RUN)


async def _files_that_ended(api: Running) -> tuple[str, str]:
    """Leave a deleted file and one that has expired."""
    artifact = Artifact(path="files/content", bytes=3, sha256="0" * 64)
    ended: list[str] = []
    for expires_at in (None, 2):
        command = AddFile(
            project=DEFAULT_PROJECT,
            file_id=new_id("file_"),
            at=1,
            filename="ended.jsonl",
            purpose="fine-tune",
            artifact=artifact,
            expires_at=expires_at,
        )
        await api.services.commands.add_file(command, Request(actor=ACTOR))
        ended.append(command.file_id)
    await api.services.commands.delete_file(ended[0], 1, Request(actor=ACTOR))
    return ended[0], ended[1]


async def build(dsn: str, played: Played, count: int) -> None:
    """Multiply what was played, in a database that has it already."""
    connection = await asyncpg.connect(dsn, timeout=60)
    try:
        await connection.execute("set search_path to rose, public")
        original = await template(connection, played.first, played.last, played.own)
        await multiply(connection, original, count)
        jobs, events = await connection.fetchrow("select (select count(*) from jobs), (select count(*) from events)")
        print(f"{jobs} jobs, {events} events")
    finally:
        await connection.close()


async def prove(dsn: str) -> None:
    """Refuse a log whose views are not what it says."""
    pool = await open_pool(dsn)
    try:
        differences = await verify(pool)
    finally:
        await pool.close()
    assert not differences, differences[:3]


def requests(played: Played, count: int) -> dict[str, str]:
    """Return the addresses that are asked, by what they are."""
    jobs, files = "/v1/fine_tuning/jobs", "/v1/files"

    def copy(text: str, number: int) -> str:
        return f"{text}{number:06d}"

    middle, end = copy(played.succeeded, count // 2), copy(played.succeeded, count - 1)
    return {
        "jobs, 20 newest": jobs,
        "jobs, 100 newest": f"{jobs}?limit=100",
        "jobs, 20 from the middle": f"{jobs}?after={middle}",
        "jobs, 20 of the oldest": f"{jobs}?after={copy(played.succeeded, 15)}",
        "jobs with metadata that half have": f"{jobs}?metadata[team]=all",
        "jobs with metadata that one has": f"{jobs}?metadata[run]={copy(RUN, count // 2)}",
        "jobs with metadata that none has": f"{jobs}?metadata[run]=none",
        "jobs without metadata": f"{jobs}?metadata=null",
        "a job that waits": f"{jobs}/{copy(played.queued, count - 1)}",
        "a finished job": f"{jobs}/{middle}",
        "events, 20 newest": f"{jobs}/{middle}/events",
        "events, 100 from its middle": f"{jobs}/{end}/events?limit=100&after={{after}}",
        "checkpoints": f"{jobs}/{middle}/checkpoints",
        "series": f"{jobs}/{middle}/metrics",
        "files, 20 newest": f"{files}?limit=20",
        "files, oldest first": f"{files}?limit=20&order=asc",
        "files of a rare purpose": f"{files}?limit=20&purpose=fine-tune",
        "files of a common purpose": f"{files}?limit=20&purpose=fine-tune-results",
    }


def ask(http: httpx2.Client, address: str) -> float:
    """Return how long an answer takes, in milliseconds."""
    began = time.perf_counter()
    http.get(address).raise_for_status()
    return 1000 * (time.perf_counter() - began)


def measure(small: httpx2.Client, large: httpx2.Client, played: Played) -> list[list[str]]:
    """Ask both in turns and return the table's rows."""
    sides = [(http, requests(played, count)) for http, count in ((small, SMALL), (large, LARGE))]
    for http, asked in sides:
        for name, address in asked.items():
            if "{after}" in address:
                listed = http.get(address.partition("?")[0], params={"limit": 100}).json()
                asked[name] = address.replace("{after}", listed["last_id"])
    names = list(sides[0][1])
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for number in range(WARM + ROUNDS):
        for name in names:
            for (http, asked), taken in zip(sides, times[name], strict=True):
                took = ask(http, asked[name])
                if number >= WARM:
                    taken.append(took)
    rows: list[list[str]] = []
    for name in names:
        few, many = map(statistics.median, times[name])
        rows.append([name, f"{few:.1f}", f"{many:.1f}", f"{many / few:.2f}"])
    return rows


def main() -> None:
    """Build both logs, start an API on each, and record the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--tree", type=Path, default=ROOT, help="measure the API of another tree; nothing is recorded")
    options.add_argument("--verify", action="store_true", help="prove the large log too, which takes minutes")
    given, _ = options.parse_known_args()
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        postgres = stack.enter_context(running_postgres())
        played = anyio.run(play, postgres.dsn("postgres"), folder)
        clients: list[httpx2.Client] = []
        for name, count in (("small", SMALL), ("large", LARGE)):
            dsn = anyio.run(copied, postgres.dsn("template1"), postgres.dsn(name), name)
            began = time.monotonic()
            anyio.run(build, dsn, played, count)
            print(f"{name}: built in {time.monotonic() - began:.0f} s")
            if name == "small" or given.verify:
                anyio.run(prove, dsn)
            port = free_port()
            environment = {
                **{name: value for name, value in os.environ.items() if not name.startswith("ROSE_")},
                "ROSE_CONFIG": "/nonexistent",
                "ROSE_DATABASE_URL": dsn,
                "ROSE_DATA_DIR": str(folder),
                "ROSE_PORT": str(port),
            }
            stack.enter_context(process(given.tree, "api", environment, folder / f"{name}.log"))
            wait_until_ready(port)
            clients.append(stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)))
        rows = measure(clients[0], clients[1], played)
    columns = ("request", "100 jobs, 10,000 events: ms", "10,000 jobs, 1,000,000 events: ms", "ratio")
    if given.tree == ROOT:
        print("written to", record("lists", __doc__.splitlines()[0], columns, rows))


async def copied(server: str, dsn: str, name: str) -> str:
    """Make a database that is a copy of `postgres`, and return its address."""
    connection = await asyncpg.connect(server, timeout=60)
    try:
        await connection.execute(f"create database {name} template postgres", timeout=600)
    finally:
        await connection.close()
    return dsn


if __name__ == "__main__":
    main()
