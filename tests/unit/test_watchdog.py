"""The watchdog against a clock that the tests turn: hung runs are found, slow and unwatched ones are not blamed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.watchdog import Watchdog


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A watchdog with a supervisor that ticks each half second."""

    def __init__(self, stall_seconds: float = 60, phase_seconds: float = 900) -> None:
        self.clock = Clock()
        self.watchdog = Watchdog(
            stall_seconds=stall_seconds, phase_seconds=phase_seconds, tick_seconds=0.5, clock=self.clock
        )

    def silent(self, seconds: float) -> float | None:
        """Let time pass, checking as a supervisor does; return when a stall was found, in seconds from the start."""
        start = self.clock.now
        while self.clock.now - start < seconds:
            self.clock.now += 0.5
            if self.watchdog.check() is not None:
                return self.clock.now - start
        return None

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            assert self.silent(seconds) is None
            self.watchdog.stepped()


def test_no_step_for_the_stall_time_is_found_when_steps_are_quick() -> None:
    run = Run()
    run.watchdog.entered("train")
    run.steps(20, 0.5)
    found = run.silent(120)
    assert found is not None
    assert 60 < found <= 61


def test_ten_median_steps_are_waited_for_when_steps_are_slow() -> None:
    run = Run()
    run.watchdog.entered("train")
    run.steps(5, 20)
    found = run.silent(1000)
    assert found is not None
    assert 200 < found <= 201


def test_one_slow_step_does_not_move_the_median() -> None:
    run = Run()
    run.watchdog.entered("train")
    run.steps(10, 1)
    run.steps(1, 50)
    found = run.silent(1000)
    assert found is not None
    assert 60 < found <= 61


@pytest.mark.parametrize("phase", ["load", "evaluate", "save"])
def test_other_phases_have_their_own_bound(phase: str) -> None:
    run = Run()
    run.watchdog.entered("train")
    run.steps(5, 1)
    run.watchdog.entered(phase)
    found = run.silent(2000)
    assert found is not None
    assert 900 < found <= 901


def test_a_fresh_watchdog_bounds_the_start_of_the_child() -> None:
    assert Run(phase_seconds=30).silent(100) is not None


def test_the_first_step_of_a_run_has_the_phase_bound_because_no_median_is_known() -> None:
    run = Run()
    run.watchdog.entered("train")
    assert run.silent(899) is None
    run.watchdog.stepped()
    assert run.silent(600) is None, "one step of 899 s makes a median of 899 s"


def test_an_evaluation_between_two_steps_does_not_count_as_step_time() -> None:
    run = Run()
    run.watchdog.entered("train")
    run.steps(3, 1)
    for _ in range(3):
        run.watchdog.entered("evaluate")
        assert run.silent(300) is None
        run.watchdog.entered("train")
        run.steps(1, 1)
    assert run.watchdog.limit_seconds == 60


def test_a_step_reported_outside_the_training_phase_is_a_sign_of_life_without_a_duration() -> None:
    run = Run()
    run.watchdog.entered("evaluate")
    assert run.silent(800) is None
    run.watchdog.stepped()
    assert run.silent(800) is None
    assert run.watchdog.limit_seconds == 900


def test_a_supervisor_that_was_stopped_does_not_blame_the_child() -> None:
    run = Run()
    run.watchdog.entered("train")
    run.steps(5, 1)
    run.clock.now += 3600
    assert run.watchdog.check() is None
    found = run.silent(120)
    assert found is not None, "but the silence after that counts"
    assert found <= 61


def test_the_stall_names_phase_and_times() -> None:
    run = Run()
    run.watchdog.entered("train")
    run.steps(5, 1)
    assert run.silent(60) is None
    run.clock.now += 0.5
    stall = run.watchdog.check()
    assert stall is not None
    assert str(stall) == "no training step for 60.5 s (limit 60.0 s)"


@given(st.lists(st.floats(min_value=0.01, max_value=59.0), min_size=1, max_size=50))
def test_a_run_whose_steps_stay_below_the_stall_time_is_never_found(durations: list[float]) -> None:
    run = Run()
    run.watchdog.entered("train")
    for duration in durations:
        run.steps(1, duration)
