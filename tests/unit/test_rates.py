"""Rates: what a minute allows, when the next one passes, and what is owed."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rose.api.limits import duration
from rose.api.rates import Left, Rate


def test_a_minutes_worth_may_come_at_once_and_comes_back_evenly() -> None:
    rate = Rate(60)
    assert [rate.take("a", 100.0) for _ in range(61)] == [True] * 60 + [False]
    left = rate.left("a", 100.0)
    assert (left.limit, left.remaining, round(left.reset_seconds), round(left.retry_seconds, 3)) == (60, 0, 60, 1.0)
    assert rate.left("b", 100.0) == Left(limit=60, remaining=60, reset_seconds=0.0, retry_seconds=0.0)
    assert not rate.take("a", 100.9)
    assert [rate.take("a", 101.0), rate.take("a", 101.0)] == [True, False]
    assert rate.left("a", 131.0).remaining == 30
    assert rate.left("a", 1000.0).remaining == 60


def test_what_was_taken_too_much_is_owed() -> None:
    rate = Rate(600)
    rate.owe("a", 0.0, 1200)
    left = rate.left("a", 0.0)
    assert (left.remaining, left.reset_seconds, round(left.retry_seconds, 3)) == (0, 120.0, 60.1)
    assert rate.left("a", 60.0).remaining == 0
    assert rate.left("a", 60.1).remaining == 1


@example(per_minute=1, pauses=[1.356915722231669, 67.19297824519177, 0.0])  # a sum that is rounded down
@given(st.integers(1, 5000), st.lists(st.floats(0, 200), max_size=300))
def test_no_time_span_gives_more_than_its_share(per_minute: int, pauses: list[float]) -> None:
    rate, now, passed = Rate(per_minute), 0.0, 0
    for pause in pauses:
        now += pause
        left = rate.left("a", now)
        took = rate.take("a", now)
        assert took == (left.remaining >= 1) == (left.retry_seconds == 0)
        if not took:
            assert rate.left("a", now + left.retry_seconds).remaining >= 1, "who waits as told passes"
        passed += took
    assert passed <= per_minute + now * per_minute / 60 + 1e-3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0171, "18ms"), (1, "1s"), (1.25, "1.25s"), (59.9999, "1m0s"), (360, "6m0s"), (3661.5, "61m1.5s")],
)
def test_durations_are_written_as_these_headers_have_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
