"""Jobs: given these events, when this command, then those events or that refusal."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rose.domain import job_commands as ask
from rose.domain import job_events as happened
from rose.domain.job_values import JobError
from rose.domain.jobs import TERMINAL, JobState, decide, initial
from rose.errors import InvalidState, StaleEpoch
from tests.unit.samples import ARTIFACT, CREATE, JOB, NOW, VALIDATE, fold, given, start, step, validated

QUEUED = given(CREATE, VALIDATE, validated())
RUNNING = given(start(2), state=QUEUED)
SUCCEED = ask.Succeed(
    epoch=2, at=NOW, artifact=ARTIFACT, kind="adapter", step=50, trained_tokens=1000, result_file="file_x"
)


def names(events: tuple[object, ...]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_a_created_job_waits_for_validation_with_its_name_reserved() -> None:
    state = given(CREATE)
    assert (state.status, state.model_name, state.epoch) == ("validating_files", CREATE.model_name, 0)


def test_validation_resolves_the_numbers_and_queues() -> None:
    assert names(decide(validated(), given(CREATE, VALIDATE))) == ["FilesValidated", "JobQueued"]
    assert QUEUED.status == "queued"
    assert QUEUED.hyperparameters is not None
    assert QUEUED.hyperparameters.total_steps == 50
    assert QUEUED.run is None


@pytest.mark.parametrize("state", [given(CREATE), QUEUED, RUNNING, given(ask.PauseJob(at=NOW), state=RUNNING)])
def test_cancel_ends_every_job_that_is_not_final(state: JobState) -> None:
    after = given(ask.CancelJob(at=NOW), state=state)
    assert (after.status, after.finished_at, after.run) == ("cancelled", NOW, None)


@pytest.mark.parametrize("verb", [ask.CancelJob(at=NOW), ask.PauseJob(at=NOW), ask.ResumeJob(at=NOW)])
def test_a_final_job_refuses_every_change_and_says_what_is_allowed(verb: ask.Command) -> None:
    done = given(SUCCEED, state=RUNNING)
    with pytest.raises(InvalidState, match=r"is succeeded; .* is possible only when it is"):
        decide(verb, done)


def test_the_run_of_a_cancelled_job_is_stale() -> None:
    cancelled = given(ask.CancelJob(at=NOW), state=RUNNING)
    for command in (SUCCEED, ask.ReportSteps(epoch=2, steps=(step(1),)), ask.ChangePhase(epoch=2, phase="train")):
        with pytest.raises(StaleEpoch):
            decide(command, cancelled)


def test_an_earlier_epoch_is_stale() -> None:
    taken_over = given(start(3), state=RUNNING)
    with pytest.raises(StaleEpoch):
        decide(SUCCEED, taken_over)
    assert names(decide(start(3), RUNNING)) == ["LeaseExpired", "RunStarted"]


def test_a_claim_takes_the_next_epoch_only() -> None:
    for epoch in (1, 2, 4):
        with pytest.raises(StaleEpoch):
            decide(start(epoch), RUNNING)


def test_known_steps_are_dropped() -> None:
    state = given(ask.ReportSteps(epoch=2, steps=(step(1), step(2))), state=RUNNING)
    events = decide(ask.ReportSteps(epoch=2, steps=(step(2), step(3))), state)
    assert [one.step for event in events for one in event.steps] == [3]  # type: ignore[union-attr]
    assert decide(ask.ReportSteps(epoch=2, steps=(step(1), step(2))), state) == ()


def test_a_paused_run_may_still_report_and_then_gives_the_job_back() -> None:
    paused = given(ask.PauseJob(at=NOW), state=RUNNING)
    assert names(decide(ask.ReportSteps(epoch=2, steps=(step(1),)), paused)) == ["StepsReported"]
    point = ask.SaveRecoveryPoint(epoch=2, step=1, artifact=ARTIFACT, trained_tokens=10)
    released = given(point, ask.ReleaseRun(epoch=2, at=NOW, reason="paused"), state=paused)
    assert (released.status, released.run, released.attempts) == ("paused", None, 0)
    resumed = given(ask.ResumeJob(at=NOW), start(3), state=released)
    assert (resumed.status, resumed.recovery_points[0].step) == ("running", 1)


def test_a_paused_run_cannot_succeed() -> None:
    with pytest.raises(InvalidState):
        decide(SUCCEED, given(ask.PauseJob(at=NOW), state=RUNNING))


def test_a_drained_run_goes_back_to_the_queue_without_an_attempt_counted() -> None:
    state = given(ask.ReleaseRun(epoch=2, at=NOW, reason="drained"), state=RUNNING)
    assert (state.status, state.attempts, state.run) == ("queued", 0, None)


def test_attempts_without_progress_end_the_job() -> None:
    state = QUEUED
    for epoch in (2, 3):
        state = given(start(epoch), ask.ReleaseRun(epoch=epoch, at=NOW, reason="crashed"), state=state)
        assert state.status == "queued"
    state = given(start(4), ask.ReleaseRun(epoch=4, at=NOW, reason="crashed", detail="signal 9"), state=state)
    assert state.error is not None
    assert (state.status, state.error.code) == ("failed", "attempts_exhausted")
    assert "signal 9" in state.error.message


def test_lost_leases_without_progress_end_the_job_too() -> None:
    state = given(start(2), start(3), start(4), state=QUEUED)
    assert names(decide(start(5), state)) == ["LeaseExpired", "JobFailed"]


def test_a_new_recovery_point_resets_the_attempts() -> None:
    state = given(start(2), start(3), state=QUEUED)
    assert state.attempts == 2
    saved = given(ask.SaveRecoveryPoint(epoch=3, step=5, artifact=ARTIFACT, trained_tokens=1), state=state)
    assert saved.attempts == 0
    again = given(start(4), ask.SaveRecoveryPoint(epoch=4, step=5, artifact=ARTIFACT, trained_tokens=1), state=saved)
    assert again.attempts == 1, "the same step again is no progress"


def test_the_newest_two_recovery_points_are_kept_newest_first() -> None:
    points = [
        ask.SaveRecoveryPoint(epoch=2, step=number, artifact=ARTIFACT, trained_tokens=number) for number in (2, 4, 6)
    ]
    assert [point.step for point in given(*points, state=RUNNING).recovery_points] == [6, 4]


def test_a_checkpoint_of_a_known_step_is_not_saved_twice() -> None:
    save = ask.SaveCheckpoint(
        epoch=2, at=NOW, checkpoint_id="ftckpt_x", step=2, epoch_number=1, artifact=ARTIFACT, metrics={}
    )
    state = given(save, state=RUNNING)
    assert state.checkpoints[0].model_name == f"{CREATE.model_name}:ckpt-step-2"
    assert decide(save, state) == ()


def test_a_full_disk_pauses_and_says_so() -> None:
    release = ask.ReleaseRun(epoch=2, at=NOW, reason="no_space", detail="12 MB are free")
    state = given(release, state=RUNNING)
    assert (state.status, state.paused_because, state.pause_detail) == ("paused", "no_space", "12 MB are free")
    resumed = given(ask.ResumeJob(at=NOW), state=state)
    assert (resumed.status, resumed.paused_because, resumed.pause_detail) == ("queued", None, "")
    assert given(ask.PauseJob(at=NOW), state=resumed).paused_because == "requested"


def test_a_disk_that_is_full_during_validation_is_waited_for_without_end() -> None:
    state = given(CREATE)
    for epoch in range(1, 9):
        begin = ask.StartValidation(owner="t", epoch=epoch, at=NOW, max_attempts=3)
        release = ask.ReleaseRun(epoch=epoch, at=NOW, reason="no_space", detail="no room for the base")
        state = given(begin, release, state=state)
    assert (state.status, state.run) == ("validating_files", None)


def test_the_row_is_the_snapshot() -> None:
    assert msgspec.json.decode(msgspec.json.encode(RUNNING), type=JobState) == RUNNING


class JobMachine(RuleBasedStateMachine):
    """Any order of commands: only legal transitions, one terminal event, epochs that never fall."""

    def __init__(self) -> None:
        super().__init__()
        self.state = given(CREATE)
        self.log: list[object] = list(decide(CREATE, initial))

    def send(self, command: ask.Command) -> None:
        was = self.state
        try:
            events = decide(command, was)
        except (InvalidState, StaleEpoch):
            return
        self.log.extend(events)
        self.state = fold(events, was)
        assert not (was.is_terminal and events), "a final job changed"
        assert self.state.epoch >= was.epoch

    @rule(offset=st.integers(0, 2))
    def claim(self, offset: int) -> None:
        self.send(start(self.state.epoch + offset))

    @rule(offset=st.integers(0, 2))
    def validate(self, offset: int) -> None:
        self.send(ask.StartValidation(owner="w", epoch=self.state.epoch + offset, at=NOW))

    @rule(back=st.integers(0, 1))
    def files_are_valid(self, back: int) -> None:
        if self.state.run is None or self.state.run.kind == "validation":
            self.send(validated(self.state.epoch - back))

    @rule(back=st.integers(0, 1), number=st.integers(1, 9))
    def report(self, back: int, number: int) -> None:
        if self.state.run is not None and self.state.run.kind == "training":
            self.send(ask.ReportSteps(epoch=self.state.epoch - back, steps=(step(number),)))

    @rule(back=st.integers(0, 1), reason=st.sampled_from(["drained", "paused", "crashed", "stalled", "no_space"]))
    def release(self, back: int, reason: str) -> None:
        self.send(ask.ReleaseRun(epoch=self.state.epoch - back, at=NOW, reason=reason))  # type: ignore[arg-type]

    @precondition(lambda self: self.state.run is not None and self.state.run.kind == "training")
    @rule()
    def succeed(self) -> None:
        self.send(msgspec.structs.replace(SUCCEED, epoch=self.state.epoch))

    @rule()
    def fail(self) -> None:
        self.send(ask.Fail(epoch=self.state.epoch, at=NOW, error=JobError(code="x", message="y")))

    @rule(verb=st.sampled_from([ask.CancelJob(at=NOW), ask.PauseJob(at=NOW), ask.ResumeJob(at=NOW)]))
    def ask(self, verb: ask.Command) -> None:
        self.send(verb)

    @invariant()
    def the_state_is_the_fold_of_its_log(self) -> None:
        assert fold(self.log) == self.state

    @invariant()
    def at_most_one_terminal_event(self) -> None:
        ends = (happened.JobSucceeded, happened.JobFailed, happened.JobCancelled)
        ended = [index for index, event in enumerate(self.log) if isinstance(event, ends)]
        assert len(ended) <= 1
        assert not ended or ended[0] == len(self.log) - 1
        assert bool(ended) == (self.state.status in TERMINAL)

    @invariant()
    def a_running_job_is_owned(self) -> None:
        assert self.state.status != "running" or self.state.run is not None
        assert self.state.id == JOB


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
