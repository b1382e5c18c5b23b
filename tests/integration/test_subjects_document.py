"""docs/subjects.md: its example consumer runs, its message examples are real, its list is whole."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import pytest

from rose import asyncapi, relay
from rose.bus import Bus
from rose.domain.catalogue import EVENTS, decode
from rose.domain.job_events import JobSucceeded
from rose.log.pool import Pool
from rose.settings import Settings
from rose.subjects import CloudEvent, oversize_subject
from tests.eventually import eventually
from tests.integration.events import ARTIFACT, Job, append_files
from tests.services import NatsServer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "subjects.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def test_every_event_is_listed_and_no_other() -> None:
    assert asyncapi.with_table(DOCUMENT) == DOCUMENT, "run `make docs` and commit docs/subjects.md"
    listed = re.findall(r"^\| `rose\.v2\.<project>\.(\w+)\.<id>\.(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert {f"{entity}.{event}" for entity, event in listed} == set(EVENTS)
    assert f"`{oversize_subject('<project>')}`" in DOCUMENT


def test_the_message_examples_are_messages() -> None:
    full, oversize = (msgspec.json.decode(block, type=CloudEvent) for block in blocks("json"))
    assert isinstance(full.data, msgspec.Raw)
    event = decode(full.type.removeprefix("rose.v2."), full.schemaversion, bytes(full.data))
    assert isinstance(event, JobSucceeded)
    assert msgspec.json.decode(msgspec.json.encode(event)) == msgspec.json.decode(full.data)
    assert oversize.data is msgspec.UNSET
    assert oversize.dataref == f"{oversize.source}/events/{oversize.position}"
    assert (int(full.sequence), int(oversize.sequence)) == (full.position, oversize.position)


@pytest.mark.anyio
async def test_the_example_consumer_counts_each_event_once_through_kills(
    pool: Pool, nats_server: Callable[[], NatsServer], tmp_path: Path
) -> None:
    script, _ = blocks("python")
    path = tmp_path / "consumer.py"
    path.write_text(script)
    server = nats_server()
    environment = {**os.environ, "NATS_URL": server.url, "EVENTS_DB": str(tmp_path / "db")}

    def start() -> subprocess.Popen[bytes]:
        with open(tmp_path / "log", "ab") as log:
            return subprocess.Popen([sys.executable, str(path)], env=environment, stdout=log, stderr=log)

    def count(table: str) -> int:
        with sqlite3.connect(tmp_path / "db") as database:
            exists = database.execute("select 1 from sqlite_master where name = ?", (table,)).fetchone()
            (number,) = database.execute(f"select count(*) from {table}").fetchone() if exists else (0,)
        database.close()
        return number

    job = Job(pool)
    stop = anyio.Event()
    async with Bus(server.url) as bus, anyio.create_task_group() as group:
        group.start_soon(relay.run, pool, bus, Settings(), stop)
        consumer = start()
        try:
            await append_files(pool, 100)
            await job.create()
            for seen in (20, 40, 60):
                await eventually(lambda seen=seen: count("seen") >= seen)
                consumer.send_signal(signal.SIGKILL)
                consumer.wait(timeout=30)
                consumer = start()
            await anyio.to_thread.run_sync(server.kill)
            await job.append(
                JobSucceeded(
                    epoch=1,
                    at=1,
                    model_name="m",
                    artifact=ARTIFACT,
                    kind="adapter",
                    step=1,
                    trained_tokens=1,
                    result_file="file_r",
                )
            )
            await anyio.to_thread.run_sync(server.start)
            await eventually(lambda: count("seen") == 102)
            assert count("finished") == 1
        finally:
            consumer.kill()
            consumer.wait(timeout=30)
        stop.set()
    lines = (tmp_path / "log").read_text().splitlines()
    positions = [int(line.split()[1]) for line in lines if line.startswith("new ")]
    assert positions == sorted(set(positions))
