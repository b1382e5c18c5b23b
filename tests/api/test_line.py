"""The line for places at engines: whose turn it is, how long it may be, and when to come back."""

from __future__ import annotations

import pytest

from rose.api import line as line_module
from rose.api.line import Line, Place, Waiting
from rose.errors import LimitReached
from rose.inference.client import EngineClient, EngineGone
from rose.inference.generation import EngineBusy
from rose.leases import Worker

pytestmark = pytest.mark.anyio

URL = "http://engine"


def worker(places: int | None, url: str = URL) -> Worker:
    capabilities = {} if places is None else {"max_requests": places}
    return Worker(id=url, kind="inference", host="here", url=url, capabilities=capabilities, pid=1)


@pytest.fixture
def line() -> Line:
    return Line(EngineClient())


def join(line: Line, *projects: str) -> list[Waiting]:
    made = [Waiting(project, "", 30) for project in projects]
    for waiting in made:
        line.join(waiting)
    return made


def served(everybody: list[Waiting]) -> list[tuple[str, Place]]:
    return [(one.project, place) for one in everybody if (place := one.taken()) is not None]


async def test_projects_take_turns_whoever_came_first(line: Line) -> None:
    everybody = join(line, *["a"] * 5, "b", *["c"] * 2)
    line.know([worker(1)])
    order: list[str] = []
    while found := served(everybody):
        ((project, place),) = found
        order.append(project)
        place.leave()
    assert order == ["a", "b", "c", "a", "c", "a", "a", "a"]
    assert len(line) == 0


async def test_within_a_project_the_oldest_is_first_and_who_comes_back_keeps_the_turn(line: Line) -> None:
    first, second = join(line, "a", "a")
    line.know([worker(1)])
    place = first.taken()
    assert place is not None
    assert second.taken() is None
    first.refusal = EngineBusy(retry_after_seconds=1)
    place.leave(first.refusal)
    line.join(first)
    assert served([first, second]) == [], "the engine rests"
    line.answered(URL)
    line.give_out()
    assert (first.taken() is not None, second.taken()) == (True, None)


async def test_no_project_takes_the_places_kept_for_others(line: Line) -> None:
    many = join(line, *["a"] * 200)
    line.know([worker(64)])
    held = served(many)
    assert len(held) == 56
    assert [project for project, _ in served(join(line, "b", "c"))] == ["b", "c"]
    held[0][1].leave()
    assert len(served(many)) == 1


async def test_one_place_is_a_place_for_everybody(line: Line) -> None:
    line.know([worker(1)])
    assert len(served(join(line, "a"))) == 1


async def test_an_engine_that_does_not_say_how_much_it_takes_is_asked(line: Line) -> None:
    line.know([worker(None)])
    assert len(served(join(line, *["a"] * 100))) == 100


async def test_requests_spread_over_the_engines(line: Line) -> None:
    line.know([worker(16, "http://one"), worker(16, "http://two")])
    urls = [place.url for _, place in served(join(line, *["a"] * 20))]
    assert {url: urls.count(url) for url in set(urls)} == {"http://one": 10, "http://two": 10}


async def test_an_engine_that_refuses_is_left_in_peace_for_a_moment(line: Line) -> None:
    line.know([worker(8), worker(8, "http://other")])
    line.refused(URL, EngineGone("gone"))
    assert {place.url for _, place in served(join(line, *["a"] * 7))} == {"http://other"}


async def test_a_place_is_given_back_once(line: Line) -> None:
    line.know([worker(1)])
    ((_, place),) = served(join(line, "a"))
    place.leave()
    place.leave()
    assert len(served(join(line, "a", "a"))) == 1


async def test_who_leaves_the_line_gives_back_what_it_was_just_given(line: Line) -> None:
    first, second = join(line, "a", "a")
    line.know([worker(1)])
    line.drop(first)
    assert second.taken() is not None
    line.drop(second)
    assert len(line) == 0


async def test_a_projects_line_has_an_end_and_others_still_join(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "MAX_WAITING_OF_PROJECT", 3)
    monkeypatch.setattr(line_module, "MAX_WAITING", 5)
    line.know([worker(0)])
    join(line, "a", "a", "a")
    with pytest.raises(LimitReached, match="project a has 3 requests") as own:
        join(line, "a")
    assert (own.value.status, own.value.code) == (429, "project_waiting_limit")
    assert own.value.retry_after_seconds == 2
    join(line, "b", "b")
    with pytest.raises(EngineBusy) as full:
        join(line, "c")
    assert (full.value.status, full.value.code, full.value.retry_after_seconds) == (503, "engine_busy", 2)


async def test_what_is_said_tells_away_from_full(line: Line) -> None:
    assert line.why_wait().code == "no_engine"
    line.know([worker(0), worker(8, "http://other")])
    line.refused("http://other", EngineGone("gone"))
    assert line.why_wait().code == "engine_busy"
    line.refused(URL, EngineGone("gone, too"))
    assert line.why_wait().code == "no_engine"


async def test_the_advice_follows_the_speed_of_the_line(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(line_module.time, "monotonic", lambda: now)
    line.know([worker(1)])
    waiting = join(line, *["a"] * 40)
    for _ in range(10):
        ((_, place),) = served(waiting)
        now += 1
        place.leave()
    served(waiting)
    assert len(line) == 29
    assert line.why_wait().retry_after_seconds in range(25, 31)
    join(line, *["b"] * 200)
    assert line.why_wait().retry_after_seconds == line_module.LONGEST_ADVICE_SECONDS
