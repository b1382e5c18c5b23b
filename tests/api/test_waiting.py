"""Every job that waits names the reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rose.api.waiting import explain, why_paused
from rose.domain import job_commands as ask
from rose.domain.jobs import JobState
from rose.leases import LeaseFacts, WaitingFacts, Worker
from tests.unit.samples import CREATE, NOW, VALIDATE, given, start, validated

CREATED = given(CREATE)
QUEUED = given(CREATE, VALIDATE, validated())
RUNNING = given(CREATE, VALIDATE, validated(), start(2))
RESUMED = given(CREATE, VALIDATE, validated(), start(2), ask.PauseJob(at=NOW), ask.ResumeJob(at=NOW))
LOGGED = msgspec.structs.replace(QUEUED, integrations=({"type": "wandb", "wandb": {"project": "roses"}},))


def trainer(**capabilities: Any) -> Worker:
    """A trainer that is there."""
    return Worker(
        id="trainer_a",
        kind="trainer",
        host="here",
        url=None,
        capabilities={"device": "cpu", "memory_bytes": 8 << 30, **capabilities},
        pid=1,
    )


def lease(*, alive: bool, held_back: float = 0) -> LeaseFacts:
    """The lease of a run."""
    return LeaseFacts(
        kind="training",
        epoch=2,
        owner="trainer_a",
        alive=alive,
        seconds_left=30 if alive else 0,
        seconds_held_back=held_back,
        attempts=1,
    )


def needing(**needs: int | str) -> JobState:
    """A queued job with these needs."""
    finished = ask.FinishValidation(
        epoch=1,
        at=NOW,
        base=validated().base,
        hyperparameters=validated().hyperparameters,
        tokens=1,
        validation_tokens=0,
        needs=needs,
    )
    return given(CREATE, VALIDATE, finished)


@pytest.mark.parametrize(
    ("state", "facts", "reason"),
    [
        (CREATED, {"trainers": ()}, "no trainer is connected"),
        (CREATED, {}, "a trainer to check its files"),
        (given(CREATE, VALIDATE), {"lease": lease(alive=True)}, None),
        (QUEUED, {"trainers": ()}, "no trainer is connected"),
        (QUEUED, {}, "a trainer to start it"),
        (QUEUED, {"queued_before": 1, "running_now": 1}, "1 job before it"),
        (QUEUED, {"queued_before": 2}, "2 jobs before it"),
        (QUEUED, {"queued_before": 999}, "999 jobs before it"),
        (QUEUED, {"queued_before": 1000}, "1000 jobs or more before it"),
        (QUEUED, {"running_now": 1}, "the running job to finish"),
        (QUEUED, {"running_now": 2}, "one of 2 running jobs"),
        (QUEUED, {"lease": lease(alive=False, held_back=4.6)}, "the next attempt, in 5 seconds"),
        (RUNNING, {"lease": lease(alive=True)}, None),
        (RUNNING, {"lease": lease(alive=False)}, "a trainer to take it up again: the last one stopped answering"),
        (RUNNING, {"lease": lease(alive=False), "trainers": ()}, "no trainer is connected"),
        (RESUMED, {"lease": lease(alive=True)}, "its former run to end"),
        (needing(device="cuda"), {}, "no trainer has a GPU"),
        (needing(device="cuda"), {"trainers": (trainer(), trainer(device="cuda:1"))}, "a trainer to start it"),
        (needing(device="mps"), {}, "no trainer has the device mps"),
        (needing(device="any", memory_bytes=1 << 30), {}, "a trainer to start it"),
        (LOGGED, {"trainers": (trainer(), trainer(integrations=["wandb"]))}, "a trainer to start it"),
        (LOGGED, {}, "no trainer can log to wandb (pip install 'rose[wandb]' where they run)"),
        (
            needing(device="any", memory_bytes=64_000_000_000),
            {},
            "no trainer has 64.0 GB of memory; the largest has 8.6 GB",
        ),
    ],
)
def test_the_reason(state: JobState, facts: dict[str, Any], reason: str | None) -> None:
    known: dict[str, Any] = {
        "job_id": state.id,
        "queued_before": 0,
        "running_now": 0,
        "lease": None,
        "trainers": (trainer(),),
        **facts,
    }
    assert explain(state, WaitingFacts(**known)) == reason


def test_a_paused_job_says_who_resumes_it() -> None:
    asked = given(ask.PauseJob(at=NOW), state=RUNNING)
    assert why_paused(asked) == "it is paused (requested); resume it to go on"
    full = given(ask.ReleaseRun(epoch=2, at=NOW, reason="no_space", detail="12 MiB are free."), state=RUNNING)
    assert why_paused(full) == "it is paused (the disk is full: 12 MiB are free.); it goes on once there is room"
