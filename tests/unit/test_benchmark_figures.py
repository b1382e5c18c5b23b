"""The arithmetic of the serving benchmarks: shares of cores, percentiles, waits, and the judgement of texts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chat_client import Reply, Token
from benchmarks.figures import percentile, slope_ratio
from benchmarks.processor_time import Sample, busy_seconds, shares


def test_busy_time_is_all_that_is_neither_idle_nor_waiting_nor_counted_twice() -> None:
    #         user nice system idle iowait irq softirq steal guest guest_nice
    line = "cpu  100 20 30 4000 500 6 7 80 9000 10000"
    assert busy_seconds(line) == pytest.approx(2.43)


def test_others_use_what_is_busy_and_not_ours() -> None:
    before = Sample(at=10.0, busy_seconds=100.0, own_seconds=40.0, seconds={1: 10.0, 2: 20.0})
    after = Sample(at=14.0, busy_seconds=107.0, own_seconds=45.0, seconds={1: 12.0, 2: 20.0})
    found = shares(before, after)
    assert (found.others, found.each) == (0.5, {1: 0.5, 2: 0.0})


def test_rounding_never_makes_less_than_nothing() -> None:
    before = Sample(at=0.0, busy_seconds=0.0, own_seconds=0.0, seconds={})
    assert shares(before, Sample(at=1.0, busy_seconds=0.99, own_seconds=1.0, seconds={})).others == 0.0
    with pytest.raises(ValueError, match="not later"):
        shares(before, before)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 25), (0.98, 49), (0.99, 50), (1.0, 50)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    assert percentile([float(value) for value in range(50, 0, -1)], share) == expected


def test_memory_is_compared_after_the_warm_up() -> None:
    assert slope_ratio([1, 1, 10, 10, 10, 10, 11, 11]) == pytest.approx(1.1)
    assert math.isnan(slope_ratio([1.0]))


def test_a_reply_tells_its_times() -> None:
    reply = Reply(sent=1.0, arrivals=[1.5, 1.75, 2.75])
    assert (reply.first_seconds, reply.gaps) == (0.5, [0.25, 1.0])


def test_answers_part_where_their_tokens_do() -> None:
    pytest.importorskip("torch")
    from benchmarks.serving_exact import difference

    top = [Token(token="b", logprob=-0.5), Token(token="c", logprob=-0.75)]
    one = Reply(text="ab", tokens=[Token(token="a", logprob=-0.25), Token(token="b", logprob=-0.5, top_logprobs=top)])
    other = Reply(text="ac", tokens=[Token(token="a", logprob=-0.5), Token(token="c", logprob=-0.5)])
    found = difference(one, other)
    assert (found.same_text, found.same_bits, found.logprob, found.gap) == (False, False, 0.25, 0.25)
    same = difference(one, one)
    assert (same.same_bits, same.logprob, same.gap) == (True, 0.0, 0.0)


def test_a_wait_is_told_in_the_steps_before_it() -> None:
    pytest.importorskip("torch")
    from benchmarks.serving_goals import longest_wait

    arrivals = [0.0, 1.0, 2.0, 3.0, 3.5, 6.5, 7.0, 20.0]
    assert longest_wait(arrivals, begin=3.25, end=6.75) == 3.0
    with pytest.raises(ValueError, match="no tokens before"):
        longest_wait(arrivals, begin=0.5, end=6.0)


def test_a_crowds_answers_are_judged_by_the_texts_of_a_quiet_engine(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from benchmarks.churn_world import BASE, Job, Tally, alike
    from benchmarks.serving_world import World
    from rose.domain.artifacts import Artifact
    from rose.domain.job_values import BaseModel

    base = BaseModel(source="tiny", revision=None, fingerprint="f")
    adapters = [Artifact(path=name, bytes=1, sha256=name) for name in ("red", "white")]
    world = World(name="w", folder=tmp_path, base=base, blobs=tmp_path, adapters=adapters, end_tokens=[])
    texts = {(BASE, 0): "plain", (0, 0): "red rose", (1, 0): "white rose"}
    assert (alike(texts), alike({**texts, (1, 0): "plain"})) == (0, 1)

    def judged(text: str, **facts: Any) -> list[str]:
        tally = Tally(world, texts, tokens=4)
        tally.add(Job(adapter=0, question=0, tokens=4, leave_after=None), Reply(text=text, **facts))
        return tally.wrong

    assert judged("red rose", complete=True, headers={"x-rose-adapter": "red"}) == []
    assert judged("red ro\ufffd", left=True) == []
    assert judged("", error="refused") == []
    assert "expected 'red rose'" in judged("red", complete=True)[0]
    assert "is what adapter 1 says" in judged("white", left=True)[0]
    assert "is what the base says" in judged("plain", complete=True)[0]
    assert "the header names white" in judged("red rose", complete=True, headers={"x-rose-adapter": "white"})[0]
