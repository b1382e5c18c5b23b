"""The command loop on a real log: conflicts are decided again, and a command that was accepted is answered again."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from rose.commands import Commands, Request
from rose.domain import job_commands as ask
from rose.domain.files import AddFile
from rose.errors import InvalidState, StaleEpoch
from rose.log import read
from rose.log.append import Actor, KeyReused, LeaseChange
from rose.log.pool import Pool
from tests.unit.samples import ARTIFACT, CREATE, JOB, NOW, VALIDATE, start, step, validated

pytestmark = pytest.mark.anyio

ACTOR = Actor(kind="trainer", name="worker-1")


def request(command_id: str | None = None) -> Request:
    return Request(actor=ACTOR) if command_id is None else Request(actor=ACTOR, command_id=command_id)


def claim(kind: str, epoch: int) -> LeaseChange:
    return LeaseChange(action="claim", job_id=JOB, kind=kind, epoch=epoch, owner="worker-1")  # type: ignore[arg-type]


@pytest.fixture
async def commands(pool: Pool) -> Commands:
    """Commands on a log with one running job."""
    made = Commands(pool)
    await made.create_job(CREATE, request())
    await made.job(JOB, VALIDATE, request(), lease=claim("validation", 1))
    release = LeaseChange(action="release", job_id=JOB, kind="validation", epoch=1, owner="worker-1")
    await made.job(JOB, validated(), request(), fenced=True, lease=release)
    await made.job(JOB, start(2), request(), lease=claim("training", 2))
    return made


SUCCEED = ask.Succeed(
    epoch=2, at=NOW, artifact=ARTIFACT, kind="adapter", step=50, trained_tokens=1, result_file="file_result"
)
RESULT = AddFile(
    project="default", file_id="file_result", at=NOW, filename="r.csv", purpose="fine-tune-results", artifact=ARTIFACT
)


async def test_a_success_whose_answer_was_lost_is_answered_again(commands: Commands, pool: Pool) -> None:
    first = await commands.succeed(JOB, SUCCEED, RESULT, request("success-of-epoch-2"))
    assert (first.state.status, first.replayed) == ("succeeded", False)
    again = await commands.succeed(JOB, SUCCEED, RESULT, request("success-of-epoch-2"))
    assert (again.state.status, again.replayed) == ("succeeded", True)
    with pytest.raises(StaleEpoch):
        await commands.succeed(JOB, SUCCEED, RESULT, request("another"))
    log = [event.type for event in await read.read_all(pool, after_position=0)]
    assert log.count("job.succeeded") == log.count("model.registered") == log.count("file.uploaded") == 1


async def test_a_cancel_is_answered_again_and_a_second_one_refused(commands: Commands) -> None:
    await commands.job(JOB, ask.CancelJob(at=NOW), request("key"), respond=lambda state: b'{"status": "cancelled"}')
    again = await commands.job(JOB, ask.CancelJob(at=NOW), request("key"))
    assert (again.replayed, again.response) == (True, b'{"status": "cancelled"}')
    with pytest.raises(InvalidState):
        await commands.job(JOB, ask.CancelJob(at=NOW), request("other key"))


async def test_a_refused_command_gets_no_answer_of_another_request(commands: Commands) -> None:
    """Two requests with one key, at once: the API's look at the key came too early to see the other."""
    first = Request(actor=ACTOR, command_id="key", request_hash="cancel")
    await commands.job(JOB, ask.CancelJob(at=NOW), first, respond=lambda state: b"cancelled")
    with pytest.raises(KeyReused, match="belongs to another request"):
        await commands.job(JOB, ask.PauseJob(at=NOW), msgspec.structs.replace(first, request_hash="pause"))


async def test_writers_that_meet_decide_again(commands: Commands, pool: Pool) -> None:
    async def report(number: int) -> None:
        warn = ask.Warn(epoch=2, code="test", message=f"warning {number}")
        await commands.job(JOB, warn, request(), fenced=True)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(report, number)
    steps = await commands.job(JOB, ask.ReportSteps(epoch=2, steps=(step(1), step(2))), request(), fenced=True)
    assert len(steps.state.warnings) == 21
    assert steps.state.last_step == 2


async def test_a_name_that_is_taken_gets_a_number(commands: Commands) -> None:
    for number in (2, 3):
        other = msgspec.structs.replace(CREATE, job_id=f"ftjob_{number}", at=1_718_109_296)
        made = await commands.create_job(other, request())
        assert made.state.model_name == f"qwen-coder-ft-20240611_123456-my-model-v1-{number}"
