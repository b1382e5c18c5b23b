"""Before a job succeeds, a connected engine gives its numbers for the published model: real trainers, real engines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from anyio.abc import SocketAttribute, SocketStream

from rose import leases
from rose.app import PROCESSES
from rose.domain.job_events import JobSucceeded, RunStarted
from rose.domain.job_values import ServedAsTrained
from rose.domain.jobs import JobState
from rose.inference.batching.adapters import Stack
from rose.log.pool import Pool
from rose.settings import Settings
from tests.eventually import eventually
from tests.trainers import QUICK, House
from trainer import supervision

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

LEARNS: dict[str, Any] = {"n_epochs": 4, "batch_size": 2, "learning_rate_multiplier": 20}
"""Enough for an adapter without which the answers are others."""
SCRIPTED_MODEL = "b21f0afbd9b829643cc359449bfc18babbd901abb25fe4fe6bbe4f2607af552b"
"""Hash of what tests/scripted_child.py publishes."""
Play = Callable[[SocketStream], Any]


@pytest.fixture
def house(pool: Pool, database_dsn: str, settings: Callable[..., Settings], fixture_base: Path) -> House:
    given = settings(**QUICK, database_url=database_dsn, inference_threads=1, inference_token="secret")
    return House(pool, given, fixture_base)


@asynccontextmanager
async def real_engine(house: House) -> AsyncGenerator[None]:
    """Run the inference process's server on the same database and blobs."""
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(PROCESSES["inference"], house.settings, stop)
        await eventually(lambda: leases.workers(house.pool, "inference"))
        yield
        stop.set()


@asynccontextmanager
async def acted_engine(house: House, play: Play) -> AsyncGenerator[anyio.Event]:
    """Announce an engine that plays `play` once it has heard what it is asked; the event says that it was asked."""
    asked = anyio.Event()

    async def serve(connection: SocketStream) -> None:
        async with connection:
            await connection.receive()
            asked.set()
            await play(connection)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        worker = leases.Worker(id="inference_a", kind="inference", host="here", url=url, capabilities={}, pid=1)

        async def announce() -> None:
            while True:
                await leases.announce(house.pool, worker)
                await anyio.sleep(leases.ANNOUNCE_SECONDS)

        tasks.start_soon(announce)
        await eventually(lambda: leases.workers(house.pool, "inference"))
        yield asked
        tasks.cancel_scope.cancel()


async def hang(connection: SocketStream) -> None:
    """Hear all of it and say nothing."""
    with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            await connection.receive()


def answer(status: str, body: dict[str, Any]) -> Play:
    content = msgspec.json.encode(body)
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n".encode()
    return lambda connection: connection.send(head + content)


def refuse(status: str, message: str, code: str) -> Play:
    return answer(status, {"error": {"message": message, "code": code}})


def say(logprobs: list[float | None], adapter: str = SCRIPTED_MODEL) -> Play:
    return answer("200 OK", {"logprobs": [logprobs], "adapter": adapter, "weights": "fp32", "dtype": "float32"})


async def ended(house: House, **hyperparameters: Any) -> tuple[JobState, ServedAsTrained]:
    async with house.trainer():
        state = await house.ended(await house.create_queued(**hyperparameters))
    assert state.served_as_trained is not None
    return state, state.served_as_trained


async def test_what_an_engine_serves_is_proven_to_be_what_was_trained(house: House) -> None:
    async with real_engine(house):
        state, held_out = await ended(house, **LEARNS, validation_split=0.25)
        whole, all_weights = await ended(house, n_epochs=2, use_lora=False)
    assert (state.status, whole.status) == ("succeeded", "succeeded"), (state.error, whole.error)
    for found, rows in ((held_out, 2), (all_weights, 8)):
        assert (found.status, found.reason, found.rows) == ("proven", "", rows)
        assert (found.trained_as, found.served_as) == ("fp32", "fp32")
        assert found.tokens > found.rows
        assert found.largest_difference is not None
        assert found.mean_difference is not None
        assert found.mean_difference <= found.largest_difference < 1e-3, "far from the bound"
    assert held_out.held_out
    assert not all_weights.held_out
    (succeeded,) = [event for event in await house.events(state.id) if isinstance(event, JobSucceeded)]
    assert succeeded.served_as_trained == held_out


async def test_a_model_that_is_served_otherwise_fails_the_job(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes a tenth off every adapter: no error anywhere, only other numbers."""
    write = Stack.write

    def weaker(stack: Stack, slot: int, a: Any, b: Any, scale: float) -> None:
        write(stack, slot, a, b, 0.9 * scale)

    monkeypatch.setattr(Stack, "write", weaker)
    async with real_engine(house):
        state, found = await ended(house, **LEARNS)
    assert state.status == "failed"
    assert state.error is not None
    assert state.error.code == "served_differs"
    assert "(bound 0.01)" in state.error.message
    assert found.status == "differs"
    assert found.largest_difference is not None
    assert found.largest_difference > 0.01
    assert sum(isinstance(event, RunStarted) for event in await house.events(state.id)) == 1, "not tried again"


@pytest.mark.usefixtures("scripted")
async def test_without_an_engine_the_job_succeeds_and_says_that_nothing_is_proven(house: House) -> None:
    state, found = await ended(house)
    assert state.status == "succeeded"
    assert found == ServedAsTrained(status="not_proven", reason="no inference engine is connected")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children without torch train: what the end means is the supervisor's business."""
    monkeypatch.setattr(supervision, "TRAINING_MODULE", "tests.scripted_child")
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "finishes")


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (hang, "no engine gave its numbers within 1 s"),
        (refuse("404 Not Found", "There is no address /score.", "unknown_url"), "There is no address /score"),
        (refuse("503 Service Unavailable", "Too little memory.", "not_enough_memory"), "Too little memory"),
        (refuse("503 Service Unavailable", "It is full.", "engine_busy"), "within 1 s (It is full)"),
        (say([-0.5]), "1 log-probabilities of 3 tokens"),
    ],
)
async def test_an_engine_that_gives_no_numbers_costs_the_proof_but_not_the_job(
    house: House, play: Play, reason: str
) -> None:
    house.reset(proof_seconds=1.0)
    async with acted_engine(house, play):
        state, found = await ended(house)
    assert state.status == "succeeded"
    assert found.status == "not_proven"
    assert reason in found.reason


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (say([-0.5, -1.03]), "differ by up to 0.03 (bound 0.01)"),
        (say([-0.5, None]), "no number for 1 of 2 tokens"),
        (say([-0.5, -1.0], "0" * 64), "other weights"),
    ],
)
async def test_a_miss_ends_the_job_at_once_with_figure_and_bound(house: House, play: Play, reason: str) -> None:
    async with acted_engine(house, play):
        state, found = await ended(house)
    assert state.status == "failed"
    assert state.error is not None
    assert state.error.code == "served_differs"
    assert reason in state.error.message
    assert found.status == "differs"


@pytest.mark.usefixtures("scripted")
async def test_a_cancel_ends_the_wait_for_the_engine(house: House) -> None:
    async with acted_engine(house, hang) as asked, house.trainer():
        job_id = await house.create_queued()
        await asked.wait()
        assert (await house.state(job_id)).run is not None
        await house.cancel(job_id)
        await eventually(lambda: _claims_nothing(house))
    assert (await house.state(job_id)).status == "cancelled"


@pytest.mark.usefixtures("scripted")
async def test_a_pause_ends_the_wait_and_a_resumed_job_is_proven(house: House) -> None:
    async with house.trainer():
        async with acted_engine(house, hang) as asked:
            job_id = await house.create_queued()
            await asked.wait()
            await house.pause(job_id)
            await eventually(lambda: _claims_nothing(house))
        assert (await house.state(job_id)).status == "paused"
        async with acted_engine(house, say([-0.5, -1.001])):
            await house.resume(job_id)
            state = await house.ended(job_id)
    assert state.served_as_trained is not None
    assert (state.status, state.served_as_trained.status) == ("succeeded", "proven")
    assert state.served_as_trained.largest_difference == pytest.approx(0.001)


@pytest.mark.usefixtures("scripted")
async def test_a_trainer_that_stops_meanwhile_gives_the_job_back(house: House) -> None:
    async with acted_engine(house, hang) as asked, house.trainer() as stop:
        job_id = await house.create_queued()
        await asked.wait()
        stop.set()
    state = await house.state(job_id)
    assert (state.status, state.run, state.attempts) == ("queued", None, 0)


async def _claims_nothing(house: House) -> bool:
    (worker,) = await leases.workers(house.pool, "trainer")
    return worker.capabilities["training"] is None
