"""What the end of a child means for its job, with children that end in every strange way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from rose.domain.catalogue import Event
from rose.domain.job_events import JobPaused, JobQueued, RunReleased, RunStarted, StepsReported
from rose.domain.job_values import JobError
from rose.domain.jobs import JobState
from rose.log.pool import Pool
from rose.settings import Settings
from tests.eventually import eventually
from tests.trainers import QUICK, House, child_of
from trainer import supervision

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

CHILD = "tests.scripted_child"


@pytest.fixture
def house(pool: Pool, settings: Callable[..., Settings], fixture_base: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(supervision, "TRAINING_MODULE", CHILD)
    return House(pool, settings(**QUICK), fixture_base)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setenv("ROSE_TEST_SCRIPT", name)


def text_of(log_path: str) -> str:
    return Path(log_path).read_text()


async def releases(house: House, job_id: str) -> list[RunReleased]:
    return [event for event in await house.events(job_id) if isinstance(event, RunReleased)]


async def until_released(house: House, job_id: str) -> RunReleased:
    async def released() -> list[RunReleased]:
        return await releases(house, job_id)

    return (await eventually(released, 60))[-1]


async def failed(house: House) -> tuple[JobState, JobError, list[Event]]:
    async with house.trainer():
        job_id = await house.create_queued()
        state = await house.ended(job_id)
    assert state.status == "failed"
    assert state.error is not None
    return state, state.error, await house.events(job_id)


async def test_a_child_that_leaves_without_an_outcome_has_crashed_whatever_its_status(
    house: House, script: Callable[[str], None]
) -> None:
    script("leaves without a word")
    async with house.trainer():
        job_id = await house.create_queued()
        released = await until_released(house, job_id)
        assert (released.reason, released.detail) == (
            "crashed",
            "exit status 0; last log line: the last line of its log",
        )
        assert released.log is not None
        assert text_of(released.log) == "the last line of its log\n"
        state = await house.state(job_id)
        assert (state.status, state.last_step) == ("queued", 3), "its steps count all the same"


async def test_attempts_are_spaced_out_and_end_in_a_failure_that_names_the_last_reason(
    house: House, script: Callable[[str], None]
) -> None:
    script("asks for another try")
    began = anyio.current_time()
    state, error, events = await failed(house)
    assert anyio.current_time() - began >= 1 + 5
    assert error.code == "attempts_exhausted"
    assert "hub_away: The hub does not answer." in error.message
    assert sum(isinstance(event, RunReleased) for event in events) == house.settings.max_attempts
    assert sum(isinstance(event, StepsReported) for event in events) == 1, "repeated steps are reported once"
    assert state.run is None


async def test_nonsense_on_the_report_pipe_is_a_crash_that_quotes_it(
    house: House, script: Callable[[str], None]
) -> None:
    script("speaks nonsense")
    async with house.trainer():
        job_id = await house.create_queued()
        released = await until_released(house, job_id)
    assert released.reason == "crashed"
    assert "broken_report" in released.detail
    assert "Traceback (most recent call last)" in released.detail


async def test_a_final_failure_ends_the_job_at_once_with_code_param_and_log(
    house: House, script: Callable[[str], None]
) -> None:
    script("diverges")
    _, error, events = await failed(house)
    assert (error.code, error.message, error.param) == (
        "training_diverged",
        "The loss is not a number.",
        "learning_rate",
    )
    assert error.log is not None
    assert text_of(error.log) == ""
    assert not any(isinstance(event, RunReleased) for event in events)


async def test_a_full_disk_pauses_the_job_and_room_resumes_it(house: House, script: Callable[[str], None]) -> None:
    script("has a full disk once")
    async with house.trainer():
        job_id = await house.create_queued()
        state = await house.ended(job_id)
    assert state.status == "succeeded"
    events = await house.events(job_id)
    pauses = [(event.reason, event.detail) for event in events if isinstance(event, JobPaused)]
    assert pauses == [("no_space", "The disk is full.")]
    assert [event.reason for event in events if isinstance(event, JobQueued)] == ["validated", "resumed"]


async def test_a_job_stays_paused_while_the_disk_is_below_the_floor(
    house: House, script: Callable[[str], None]
) -> None:
    script("has a full disk once")
    house.reset(min_free_bytes=1 << 60)
    async with house.trainer():
        job_id = await house.create_queued()
        await until_released(house, job_id)
        second = await house.create_queued()
        await until_released(house, second)
        assert (await house.state(job_id)).status == "paused"


async def test_the_model_counts_and_not_how_the_child_ends(
    house: House, script: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "EXIT_SECONDS", 0.5)
    script("never exits")
    async with house.trainer():
        job_id = await house.create_queued()
        assert (await house.ended(job_id)).status == "succeeded"
        await eventually(lambda: child_of(job_id, module=CHILD) is None, 10)


@pytest.mark.parametrize("name", ["names a model that is not there", "names another run's model"])
async def test_a_model_that_does_not_verify_is_no_success(
    house: House, script: Callable[[str], None], name: str
) -> None:
    script(name)
    async with house.trainer():
        job_id = await house.create_queued()
        released = await until_released(house, job_id)
    assert released.reason == "crashed"
    assert f"jobs/{job_id}/e" in released.detail


async def test_a_child_that_does_not_drain_is_killed_and_the_job_given_back(
    house: House, script: Callable[[str], None]
) -> None:
    script("ignores orders")
    house.reset(drain_seconds=0.5)
    async with house.trainer():
        job_id = await house.create_queued()
        await house.at_step(job_id, 3)
    state = await house.state(job_id)
    assert (state.status, state.run, state.attempts) == ("queued", None, 0)
    [released] = await releases(house, job_id)
    assert released.reason == "drained"
    assert "SIGKILL" in released.detail


async def test_a_hung_child_leaves_its_stacks_in_the_log(house: House, script: Callable[[str], None]) -> None:
    script("hangs")
    house.reset(stall_seconds=1.0)
    async with house.trainer():
        job_id = await house.create_queued()
        released = await until_released(house, job_id)
    assert released.reason == "stalled"
    assert released.detail.startswith("no training step for")
    assert released.log is not None
    assert "in play" in text_of(released.log)


async def test_a_job_that_needs_what_this_worker_lacks_is_left_and_the_next_one_taken(
    house: House, script: Callable[[str], None]
) -> None:
    script("asks for another try")
    async with house.trainer():
        needy = await house.create_queued(needs={"device": "cuda"})
        modest = await house.create_queued(needs={"device": "any"})
        await until_released(house, modest)
        assert (await house.state(needy)).status == "queued"
        assert not any(isinstance(event, RunStarted) for event in await house.events(needy))


async def test_damaged_rows_hold_up_no_other_job(
    house: House, script: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    script("asks for another try")
    queued, paused, whole = [await house.create_queued() for _ in range(3)]
    damage = "update rose.jobs set doc = doc || $2::text::jsonb where id = $1"
    await house.pool.execute(damage, queued, '{"epoch": "two"}')
    await house.pool.execute(damage, paused, '{"epoch": "two", "status": "paused", "paused_because": "no_space"}')
    async with house.trainer():
        await until_released(house, whole)
    assert f"The row of {queued} is damaged" in caplog.text
