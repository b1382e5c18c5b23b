"""A job's events: the list, the stream, and the promise that both show the log, also over reconnects and restarts."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from anyio.lowlevel import checkpoint

from rose.api import event_stream
from rose.api.limits import Slot
from rose.domain import job_events
from rose.domain.messages import event_id, job_messages
from rose.log.pool import Pool
from rose.log.read import read_stream
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, Trainer

pytestmark = pytest.mark.anyio

Frame = tuple[str | None, str]
BEHIND_THE_END = event_id(2**62, 0)
"""The id of an event that no log has: as of a database that was lost."""
NO_POSITION = "ftevent_" + "v" * 16
"""Of the right form, and a number that Postgres cannot hold."""
SECONDS = 120.0


class Transcript:
    """An event stream as a client reads it: frames with their ids, and comments."""

    def __init__(self, response: httpx2.Response) -> None:
        self._lines = response.aiter_lines()
        self.comments: list[str] = []

    async def frame(self) -> Frame | None:
        """Return id and data of the next frame, or None at the end of the stream."""
        number: str | None = None
        with anyio.fail_after(SECONDS):
            async for line in self._lines:
                if line.startswith(":"):
                    self.comments.append(line)
                elif line.startswith("id: "):
                    number = line[4:]
                elif line.startswith("data: "):
                    return number, line[6:]
        return None

    async def rest(self) -> list[Frame]:
        """Return all frames up to the end."""
        frames: list[Frame] = []
        while (frame := await self.frame()) is not None:
            frames.append(frame)
        return frames


@asynccontextmanager
async def watching(http: httpx2.AsyncClient, job_id: str, **headers: str) -> AsyncGenerator[Transcript]:
    """Open the event stream of a job."""
    path = f"/v1/fine_tuning/jobs/{job_id}/events"
    async with http.stream("GET", path, headers={"accept": "text/event-stream", **headers}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Transcript(response)


async def logged(pool: Pool, job_id: str) -> list[str]:
    """Return the ids of all job events by the log itself."""
    found: list[str] = []
    for recorded in await read_stream(pool, f"job/{job_id}"):
        assert isinstance(recorded.event, job_events.Event)
        found += [message.id for message in job_messages(recorded.position, recorded.event)]
    return found


async def test_list_and_stream_show_the_same(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    await Trainer(api.services, job.id).run_to_success()
    listed = [event async for event in api.openai.fine_tuning.jobs.list_events(job.id, limit=7)]
    async with watching(api.http, job.id) as transcript:
        frames = await transcript.rest()
    assert frames[-1] == (None, "[DONE]")
    streamed = [json.loads(data) for _, data in frames[:-1]]
    assert [number for number, _ in frames[:-1]] == [event["id"] for event in streamed]
    assert [event.to_dict() for event in listed][::-1] == streamed
    assert [event["id"] for event in streamed] == await logged(api.services.pool, job.id)
    messages = [event["message"] for event in streamed]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert "Step 50/50: training loss=0.02" in messages
    assert messages[-1] == "The job has successfully completed"
    steps = [event["data"]["step"] for event in streamed if event["type"] == "metrics"]
    assert steps == list(range(1, 51))
    assert all(event["data"] == {} or isinstance(event["data"], dict) for event in streamed)


async def test_stream_false_is_a_list_whatever_is_accepted(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=false"
    answer = await api.http.get(path, headers={"accept": "text/event-stream"})
    assert answer.json()["object"] == "list"


async def test_the_stream_follows_a_job_live(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    async with watching(api.http, job.id) as transcript:
        assert (await transcript.frame() or ("", ""))[1].find("Created fine-tuning job") > 0
        await trainer.validate()
        await trainer.start()
        await trainer.steps(1, 2)
        while "Step 2/50" not in (frame := await transcript.frame() or (None, "Step 2/50"))[1]:
            pass
        assert frame[0] is not None
        await api.openai.fine_tuning.jobs.cancel(job.id)
        rest = await transcript.rest()
    assert ["cancelled" in data for _, data in rest] == [True, False]
    assert rest[-1] == (None, "[DONE]")


async def test_a_reconnect_neither_loses_nor_repeats(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    await Trainer(api.services, job.id).run_to_success()
    everything = await logged(api.services.pool, job.id)
    for seen in range(0, len(everything) - 1, 5):
        async with watching(api.http, job.id, **{"last-event-id": everything[seen]}) as transcript:
            frames = await transcript.rest()
        assert [number for number, _ in frames[:-1]] == everything[seen + 1 :]
    query = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true&after={everything[-2]}"
    assert everything[-1] in (await api.http.get(query)).text


async def test_a_finished_cursor_gets_204(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    await api.openai.fine_tuning.jobs.cancel(job.id)
    last = (await logged(api.services.pool, job.id))[-1]
    answer = await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true", headers={"last-event-id": last})
    assert (answer.status_code, answer.content) == (204, b"")


async def test_the_joined_transcript_is_the_log_over_restarts(
    api_settings: Settings, pool: Pool, seed_file: Path
) -> None:
    seen: list[str] = []

    async def read_until(running: Running, job_id: str, text: str) -> None:
        headers = {"last-event-id": seen[-1]} if seen else {}
        async with watching(running.http, job_id, **headers) as transcript:
            while (frame := await transcript.frame()) is not None:
                if frame[0] is not None:
                    seen.append(frame[0])
                if text in frame[1]:
                    return

    async with serving(api_settings, pool) as running:
        job = await running.job(seed_file)
        trainer = Trainer(running.services, job.id)
        await trainer.validate()
        await trainer.start()
        await trainer.steps(1, 10)
        await read_until(running, job.id, "Step 4/50")
    async with serving(api_settings, pool) as running:
        trainer_again = trainer.on(running.services)
        await trainer_again.steps(11, 20)
        await read_until(running, job.id, "Step 20/50")
    await trainer.steps(21, 50)
    async with serving(api_settings, pool) as running:
        trainer_again = trainer.on(running.services)
        await trainer_again.checkpoint(50)
        await trainer_again.succeed(50)
        await read_until(running, job.id, "[DONE]")
    assert seen == await logged(pool, job.id)
    assert seen == sorted(set(seen))


async def test_streams_read_the_database_behind_the_ring(
    api_settings: Settings, pool: Pool, seed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "BATCH", 3)
    async with serving(api_settings, pool, ring=4) as running:
        job = await running.job(seed_file)
        trainer = Trainer(running.services, job.id)
        await trainer.validate()
        await trainer.start()
        async with watching(running.http, job.id) as transcript:
            for step in range(1, 21):
                await trainer.steps(step, step)
            await trainer.succeed(20)
            frames = await transcript.rest()
    assert [number for number, _ in frames[:-1]] == await logged(pool, job.id)


async def test_paging_events_is_complete_while_new_ones_arrive(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    await trainer.steps(1, 20)
    before = await logged(api.services.pool, job.id)
    seen: list[str] = []
    step = 20
    async for event in api.openai.fine_tuning.jobs.list_events(job.id, limit=3):
        seen.append(event.id)
        step += 1
        await trainer.steps(step, step)
    assert seen == before[::-1]


async def test_an_idle_stream_is_kept_alive(api: Running, seed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "PING_SECONDS", 0.05)
    job = await api.job(seed_file)
    async with watching(api.http, job.id) as transcript:
        await transcript.frame()
        with anyio.move_on_after(1.0):
            await transcript.frame()
    assert transcript.comments[:2] == [": ping", ": ping"]


async def test_clients_that_came_together_are_not_pinged_together(
    api: Running, seed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float]] = []

    def first(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    monkeypatch.setattr(event_stream, "PING_SECONDS", 3600.0)
    monkeypatch.setattr(event_stream.random, "uniform", first)
    job = await api.job(seed_file)
    path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
    async with api.http.stream("GET", path) as response:
        with anyio.fail_after(SECONDS):
            async for line in response.aiter_lines():
                if line == ": ping":
                    break
    assert asked == [(0, 3600.0)]


async def test_an_event_is_encoded_once_for_all_clients(
    api: Running, seed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counting(position: int, event: job_events.Event) -> Any:
        encoded.append(position)
        return job_messages(position, event)

    monkeypatch.setattr(event_stream, "job_messages", counting)
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    transcripts: list[list[Frame]] = []

    async def watch(opened: anyio.Event, **headers: str) -> None:
        async with watching(http, job.id, **headers) as transcript:
            first = await transcript.frame()
            opened.set()
            assert first is not None
            transcripts.append([first, *await transcript.rest()])

    async with httpx2.AsyncClient(base_url=api.services.settings.url) as http, anyio.create_task_group() as tasks:
        opened = [anyio.Event() for _ in range(20)]
        for one in opened:
            tasks.start_soon(watch, one)
        for one in opened:
            await one.wait()
        await trainer.validate()
        await trainer.start()
        for step in range(1, 51, 10):
            await trainer.steps(step, step + 9)
        await trainer.succeed(50)
    assert transcripts == [transcripts[0]] * 20
    assert [number for number, _ in transcripts[0][:-1]] == await logged(api.services.pool, job.id)
    assert encoded == [recorded.position for recorded in await read_stream(api.services.pool, f"job/{job.id}")]


async def test_a_resumed_stream_begins_within_an_event_that_others_have_whole(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    await trainer.steps(1, 9)
    await trainer.succeed(9)
    everything = await logged(api.services.pool, job.id)
    for _ in range(2):
        for seen in (None, *everything[:-1]):
            headers = {"last-event-id": seen} if seen else {}
            async with watching(api.http, job.id, **headers) as transcript:
                frames = await transcript.rest()
            after = everything.index(seen) + 1 if seen else 0
            assert [number for number, _ in frames[:-1]] == everything[after:]


async def test_a_stop_ends_every_stream_at_once(api_settings: Settings, pool: Pool, seed_file: Path) -> None:
    ended: list[list[Frame]] = []
    with anyio.fail_after(SECONDS):
        async with serving(api_settings, pool) as running:
            job = await running.job(seed_file)
            http = httpx2.AsyncClient(base_url=api_settings.url)

            async def watch(opened: anyio.Event) -> None:
                async with watching(http, job.id) as transcript:
                    await transcript.frame()
                    opened.set()
                    ended.append(await transcript.rest())

            async with http, anyio.create_task_group() as tasks:
                events = [anyio.Event() for _ in range(20)]
                for event in events:
                    tasks.start_soon(watch, event)
                for event in events:
                    await event.wait()
                started = anyio.current_time()
                running.services.tailer.stop()
            assert anyio.current_time() - started < 2
    assert ended == [[]] * 20


async def test_a_stream_holds_no_connection_of_the_pool(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    async with httpx2.AsyncClient(base_url=api.services.settings.url) as http, anyio.create_task_group() as tasks:
        opened = anyio.create_memory_object_stream[None](50)

        async def watch() -> None:
            async with watching(http, job.id) as transcript:
                await transcript.frame()
                await opened[0].send(None)
                await transcript.rest()

        with opened[0], opened[1]:
            for _ in range(30):
                tasks.start_soon(watch)
            with anyio.fail_after(SECONDS):
                for _ in range(30):
                    await opened[1].receive()
            with anyio.fail_after(SECONDS):
                assert (await api.openai.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


@pytest.mark.parametrize(
    ("headers", "query", "param"),
    [
        ({"last-event-id": "ftevent_nonsense"}, "stream=true", "Last-Event-ID"),
        ({"last-event-id": BEHIND_THE_END}, "stream=true", "Last-Event-ID"),
        ({}, "stream=true&after=x", "after"),
        ({}, f"stream=true&after={NO_POSITION}", "after"),
        ({}, "stream=maybe", "stream"),
    ],
)
async def test_a_broken_cursor_is_named(
    api: Running, seed_file: Path, headers: dict[str, str], query: str, param: str
) -> None:
    job = await api.job(seed_file)
    answer = await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/events?{query}", headers=headers)
    assert answer.status_code == 400
    error: dict[str, Any] = answer.json()["error"]
    assert error["param"] == param


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "after=after",
        "after=ftevent_0000000000000000",
        f"after={BEHIND_THE_END}",
        f"after={NO_POSITION}",
    ],
)
async def test_event_lists_may_be_empty(api: Running, seed_file: Path, query: str) -> None:
    job = await api.job(seed_file)
    answer = await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/events?{query}")
    assert (answer.status_code, answer.json()["data"], answer.json()["has_more"]) == (200, [], False)


async def test_a_long_history_lets_the_others_have_their_turn(
    api: Running, seed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "CHUNK_BYTES", 1)
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    for step in range(1, 51, 5):
        await trainer.steps(step, step + 4)
    await trainer.succeed(50)
    turns = 0
    seen: list[int] = []

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        async for _ in event_stream.frames(api.services, job.id, None, Slot()):
            seen.append(turns)
        tasks.cancel_scope.cancel()
    assert len(seen) > 10
    assert seen == sorted(set(seen)), "the other had a turn between any two frames"


async def test_a_slow_client_is_only_behind(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    async with watching(api.http, job.id) as transcript:
        await transcript.frame()
        for batch in range(40):
            await trainer.steps(batch * 200 + 1, batch * 200 + 200)
        await trainer.succeed(8000)
        frames = await transcript.rest()
    everything = await logged(api.services.pool, job.id)
    assert len(everything) > 8000
    assert [number for number, _ in frames[:-1]] == everything[1:]


async def test_clients_that_come_and_go_during_a_storm_miss_nothing(
    api_settings: Settings, pool: Pool, seed_file: Path
) -> None:
    transcripts: list[list[str]] = [[] for _ in range(12)]

    async def watch(http: httpx2.AsyncClient, seen: list[str], leave_after: int) -> None:
        path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
        while True:
            headers = {"last-event-id": seen[-1]} if seen else {}
            async with http.stream("GET", path, headers=headers) as response:
                if response.status_code == 204:  # it left with the last frame
                    return
                transcript = Transcript(response)
                for _ in range(leave_after):
                    frame = await transcript.frame()
                    if frame is None or frame[1] == "[DONE]":
                        return
                    assert frame[0] is not None
                    seen.append(frame[0])

    async with serving(api_settings, pool, ring=50) as running:
        job = await running.job(seed_file)
        trainer = Trainer(running.services, job.id)
        await trainer.validate()
        await trainer.start()
        async with httpx2.AsyncClient(base_url=api_settings.url) as http, anyio.create_task_group() as tasks:
            for index, seen in enumerate(transcripts):
                tasks.start_soon(watch, http, seen, 5 + 7 * index)
            for step in range(1, 150):
                await trainer.steps(step, step)
            await trainer.succeed(149)
    everything = await logged(pool, job.id)
    assert all(seen == everything for seen in transcripts)
