"""The line in which requests of this API process stand for a place at an engine; projects take turns.

An engine has as many places as it announces. The project that has the fewest is next, and its oldest request. No
project has all places of an engine: what one asks never keeps another's first request out.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Sequence

import anyio

from rose.errors import RETRY_SECONDS, LimitReached, RoseError
from rose.inference.client import EngineClient, EngineGone
from rose.inference.generation import EngineBusy
from rose.leases import Worker

MAX_WAITING = 1024
"""Requests that may stand in line at a time."""
MAX_WAITING_OF_PROJECT = 256
KEPT_FOR_OTHERS = 8
"""Of the places of an engine one in so many, and at least one, stays free for projects that have fewer."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 1.0
REMEMBERED = 32
"""Places given back whose times say how fast the line moves."""
LONGEST_ADVICE_SECONDS = 60.0
"""Latest time to come back that an answer names; openai-python waits no longer than this."""


class Place:
    """A request's place at the engine at `url`, until it leaves."""

    def __init__(self, line: Line, url: str, project: str) -> None:
        self.url = url
        self.project = project
        self.kept = False
        """True while an answer is sent that somebody has begun to ask for."""
        self._line: Line | None = line

    def keep(self) -> None:
        """Keep the place also when `ask` has returned; whoever keeps it must let it go with `leave`."""
        self.kept = True

    def leave(self, refusal: RoseError | None = None) -> None:
        """Give the place back, once is enough; with `refusal`, because the engine is full or does not answer."""
        line, self._line = self._line, None
        if line is not None:
            line.take_back(self, refusal)


class Waiting:
    """A request that has no place; it may come back to the line as long as it is patient."""

    def __init__(self, project: str, fingerprint: str, patience_seconds: float) -> None:
        self.project = project
        self.fingerprint = fingerprint
        self.patience_seconds = patience_seconds
        """How long it will still stand in line."""
        self.refusal: RoseError | None = None
        """Why it had to leave the last engine that it was at."""
        self.place: Place | None = None
        self.called = anyio.Event()

    def taken(self) -> Place | None:
        """Return the place that it was given, once."""
        place, self.place = self.place, None
        return place


class _Rest:
    """An engine that has refused; it is not asked again before `until` (monotonic seconds)."""

    def __init__(self, why: RoseError) -> None:
        self.why = why
        self.pause_seconds = FIRST_PAUSE_SECONDS
        self.until = time.monotonic() + self.pause_seconds

    def refused_again(self, why: RoseError) -> None:
        self.why = why
        if time.monotonic() >= self.until:
            self.pause_seconds = min(2 * self.pause_seconds, LONGEST_PAUSE_SECONDS)
        self.until = time.monotonic() + self.pause_seconds


class Line:
    """Who waits and who has which place. Belongs to one event loop."""

    def __init__(self, engines: EngineClient) -> None:
        self._client = engines
        self._engines: list[Worker] = []
        self._queues: dict[str, deque[Waiting]] = {}
        """By project, none empty."""
        self._served: dict[str, int] = {}
        """Number of the last place that a project was given."""
        self._given = 0
        self._taken: dict[str, Counter[str]] = {}
        """Places in use by engine and project."""
        self._resting: dict[str, _Rest] = {}
        self._given_back_at: deque[float] = deque(maxlen=REMEMBERED)
        self._looked_at = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def know(self, engines: Sequence[Worker]) -> None:
        """Take note of the engines that are there, and give out their places."""
        self._engines = [worker for worker in engines if worker.kind == "inference" and worker.url]
        urls = {worker.url for worker in self._engines}
        self._resting = {url: rest for url, rest in self._resting.items() if url in urls}
        self.give_out()

    def looks(self) -> None:
        """Take note that somebody is finding out which engines are there; `know` follows."""
        self._looked_at = time.monotonic()

    def is_out_of_date(self) -> bool:
        """Say whether somebody who waits should find out anew which engines are there."""
        return time.monotonic() - self._looked_at >= FIRST_PAUSE_SECONDS

    def join(self, waiting: Waiting) -> None:
        """Put a request into the line: at the end, or in front of its project's when it was there before.

        Raises: LimitReached when its project's line is full; EngineBusy or EngineGone when all of it is.
        """
        if waiting.refusal is None:
            self._require_room(waiting.project)
        queue = self._queues.setdefault(waiting.project, deque())
        waiting.called = anyio.Event()
        if waiting.refusal is None:
            queue.append(waiting)
        else:
            queue.appendleft(waiting)
        self.give_out()

    def drop(self, waiting: Waiting) -> None:
        """Forget a request that waits no longer; a place that it was given meanwhile is given back."""
        queue = self._queues.get(waiting.project)
        if queue is not None and waiting in queue:
            queue.remove(waiting)
            self._forget_if_empty(waiting.project)
        place = waiting.taken()
        if place is not None:
            place.leave()

    def take_back(self, place: Place, refusal: RoseError | None = None) -> None:
        """Free a place and give it to the next; after a refusal, let the engine rest first."""
        taken = self._taken[place.url]
        taken[place.project] -= 1
        if not taken[place.project]:
            del taken[place.project]
        if not taken:
            del self._taken[place.url]
        if refusal is not None:
            self.refused(place.url, refusal)
        else:
            self._given_back_at.append(time.monotonic())
            if place.url in self._resting and isinstance(self._resting[place.url].why, EngineBusy):
                self._resting[place.url].until = 0.0  # it has room again
        self.give_out()

    def refused(self, url: str, why: RoseError) -> None:
        """Let the engine at `url` rest, since it is full or does not answer."""
        if url in self._resting:
            self._resting[url].refused_again(why)
        else:
            self._resting[url] = _Rest(why)

    def answered(self, url: str) -> None:
        """Take note that the engine at `url` works."""
        self._resting.pop(url, None)

    def give_out(self) -> None:
        """Give free places to those who wait: first to who has the fewest, among equals to the longest unserved."""
        while any(self._serve(project) for project in sorted(self._queues, key=self._precedence)):
            pass

    def why_wait(self) -> RoseError:
        """Return the answer to a request that does not wait any longer."""
        if not self._engines:
            return _no_engine(self._client)
        resting = [self._resting[worker.url].why for worker in self._engines if worker.url in self._resting]
        if len(resting) == len(self._engines) and all(isinstance(why, EngineGone) for why in resting):
            return EngineGone(resting[0].message, hint=resting[0].hint)
        return EngineBusy(
            "Every inference engine has as many requests as it takes.",
            retry_after_seconds=self._advice_seconds(len(self)),
            hint="Ask again later, or start another engine with `rose serve inference`.",
        )

    def _serve(self, project: str) -> bool:
        """Give the oldest request of a project a place; False when there is none for it."""
        waiting = self._queues[project][0]
        free = [worker for worker in self._engines if self._has_place(worker, project)]
        if not free:
            return False
        url = self._client.choose(free, waiting.fingerprint, self._count)
        self._queues[project].popleft()
        self._forget_if_empty(project)
        self._given += 1
        self._served[project] = self._given
        self._taken.setdefault(url, Counter())[project] += 1
        waiting.place = Place(self, url, project)
        waiting.called.set()
        return True

    def _precedence(self, project: str) -> tuple[int, int]:
        return sum(taken[project] for taken in self._taken.values()), self._served.get(project, 0)

    def _forget_if_empty(self, project: str) -> None:
        if not self._queues[project]:
            del self._queues[project]

    def _count(self, url: str) -> int:
        return self._taken[url].total() if url in self._taken else 0

    def _has_place(self, worker: Worker, project: str) -> bool:
        url = worker.url or ""
        rest = self._resting.get(url)
        if rest is not None and time.monotonic() < rest.until:
            return False
        places = worker.capabilities.get("max_requests")
        if not isinstance(places, int):
            return True  # it says by itself when it is full
        of_project = max(1, places - max(1, places // KEPT_FOR_OTHERS))
        mine = self._taken[url][project] if url in self._taken else 0
        return self._count(url) < places and mine < of_project

    def _require_room(self, project: str) -> None:
        of_project = len(self._queues.get(project, ()))
        if of_project >= MAX_WAITING_OF_PROJECT:
            raise LimitReached(
                f"The project {project} has {of_project} requests waiting for an engine, as many as may wait.",
                code="project_waiting_limit",
                hint="Ask fewer at a time, or come back later.",
                retry_after_seconds=self._advice_seconds(of_project * len(self._queues)),
            )
        if len(self) >= MAX_WAITING:
            raise self.why_wait()

    def _advice_seconds(self, before: int) -> float:
        """Return when `before` requests will have had their turn, as fast as the line moves now."""
        given_back = self._given_back_at
        if len(given_back) < 2:
            return RETRY_SECONDS
        each = (time.monotonic() - given_back[0]) / len(given_back)
        return float(math.ceil(min(max(before * each, RETRY_SECONDS), LONGEST_ADVICE_SECONDS)))


def _no_engine(client: EngineClient) -> EngineGone:
    try:
        client.choose([])
    except EngineGone as error:
        return error
    raise AssertionError("there is no engine to choose")
