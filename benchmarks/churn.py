"""20,000 requests over 40 adapters with loads, evictions, clients that leave, and an engine that is killed twice.

Every answer must be the text that its adapter gave when nothing else ran, and every request must end: with an answer,
or with an error that the client sees. The model is the tests' small one, so that adapters come and go all the time.

    python -m benchmarks churn
    python -m benchmarks churn --requests 500 --kills 1 --dry
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from contextlib import ExitStack

from benchmarks.chat_client import ask
from benchmarks.churn_world import Tally, Texts, alike, body, draw, one_by_one
from benchmarks.contestants import Rose, answer_one, run_to_the_end, wait_until_up
from benchmarks.figures import percentile
from benchmarks.serving import publish
from benchmarks.serving_contest import rose_settings
from benchmarks.serving_world import MODELS, World, build, question

REQUESTS = 20_000
ADAPTERS = 40
QUESTIONS = 6
TOKENS = 8
CLIENTS = 32
"""Requests at a time."""
LEAVING = 0.15
"""Share of the clients that go away mid-stream."""
SHOWN = 10
COLUMNS = ("what", "figure", "wanted")


class Crowd:
    """Clients that ask one question after the other, and wait for an engine that is away."""

    def __init__(self, server: Rose, world: World, texts: Texts, given: argparse.Namespace) -> None:
        self.tally = Tally(world, texts, TOKENS)
        self.downtime_seconds = 0.0
        self._server, self._world, self._given = server, world, given
        self._questions = [question(number) for number in range(QUESTIONS)]
        self._chance = random.Random(given.seed)
        self._asked = 0
        self._up = asyncio.Event()
        self._up.set()

    async def run(self) -> None:
        """Ask all questions, and kill the engine in between."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._given.clients):
                tasks.create_task(self._ask())
            for number in range(self._given.kills):
                await self._wait_for(self._given.requests * (number + 1) // (self._given.kills + 1))
                await self._kill()

    async def _ask(self) -> None:
        while self._asked < self._given.requests:
            await self._up.wait()
            self._asked += 1
            job = draw(self._chance, len(self._world.adapters), QUESTIONS, (TOKENS,), LEAVING)
            asked = body(self._server, self._world, self._questions, job)
            reply = await ask(self._server.port, asked, leave_after=job.leave_after)
            self.tally.add(job, reply)
            if self._asked % 1000 == 0:
                print(f"{self._asked} asked, {len(self.tally.wrong)} wrong, {dict(self.tally.ends)}", flush=True)

    async def _wait_for(self, asked: int) -> None:
        while self._asked < asked:  # noqa: ASYNC110 (many clients count)
            await asyncio.sleep(0.05)

    async def _kill(self) -> None:
        """Kill the engine with all that it holds, start another, and let the clients go on once it answers."""
        began = time.monotonic()
        self._up.clear()
        await asyncio.to_thread(self._server.kill)
        self._server.start()
        await wait_until_up(self._server)
        self.downtime_seconds = max(self.downtime_seconds, time.monotonic() - began)
        print(f"killed after {self._asked} requests, back after {time.monotonic() - began:.1f} s", flush=True)
        self._up.set()


async def measure(given: argparse.Namespace) -> None:
    """Run the crowd and record how it fared."""
    world = build(given.model, given.adapters)
    with ExitStack() as stack:
        server = Rose(world, stack, settings=rose_settings(given))
        await wait_until_up(server)
        await answer_one(server, None)
        texts = await one_by_one(server, world, [question(number) for number in range(QUESTIONS)], TOKENS)
        print(f"{len(texts)} texts known, {alike(texts)} of them not of one adapter alone", flush=True)
        crowd = Crowd(server, world, texts, given)
        began = time.monotonic()
        await crowd.run()
        seconds = time.monotonic() - began
        about = await server.about()
    print(*crowd.tally.wrong[:SHOWN], sep="\n")
    what = f"{(__doc__ or '').splitlines()[0]} {about}. {given.requests} requests, {given.kills} kills."
    publish(given, "churn", what, COLUMNS, rows(crowd, texts, seconds))
    if crowd.tally.wrong or crowd.tally.ends["lost"] or crowd.tally.ends["silent"]:
        raise SystemExit("there are wrong or lost answers")


def rows(crowd: Crowd, texts: Texts, seconds: float) -> list[list[str]]:
    """Return the lines of the table."""
    tally = crowd.tally
    total = sum(tally.ends.values())
    others = {end: count for end, count in tally.ends.items() if end not in ("answered", "left", "lost", "silent")}
    return [
        ["requests", str(total), ""],
        ["answered", str(tally.ends["answered"]), ""],
        ["left by the client mid-stream", str(tally.ends["left"]), ""],
        ["ended with an error", ", ".join(f"{end} {count}" for end, count in others.items()) or "0", "while killed"],
        ["lost: no end, or none in time", str(tally.ends["lost"] + tally.ends["silent"]), "0"],
        ["texts that are not their adapter's", str(len(tally.wrong)), "0"],
        ["answers whose header names the adapter", f"{tally.named / max(1, total):.0%}", ""],
        ["known texts that several adapters share", f"{alike(texts)} of {len(texts)}", "few"],
        ["longest time until a killed engine answers, s", f"{crowd.downtime_seconds:.1f}", ""],
        ["first token s, p50 and p99", _percentiles(tally.first_seconds), ""],
        ["requests/s", f"{total / seconds:.1f}", ""],
    ]


def _percentiles(seconds: list[float]) -> str:
    return f"{percentile(seconds, 0.5):.2f}, {percentile(seconds, 0.99):.2f}" if seconds else "-"


def main() -> None:
    """Run with the options of the command line."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", choices=MODELS, default="fixture")
    options.add_argument("--requests", type=int, default=REQUESTS)
    options.add_argument("--adapters", type=int, default=ADAPTERS)
    options.add_argument("--clients", type=int, default=CLIENTS)
    options.add_argument("--kills", type=int, default=2)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--rose-threads", type=int)
    options.add_argument("--rose-set", action="append", default=[], metavar="NAME=VALUE", help="ROSE's environment")
    options.add_argument("--label", help="record under this name, too, beside what is there")
    options.add_argument("--dry", action="store_true", help="record nothing")
    run_to_the_end(measure(options.parse_known_args()[0]))


if __name__ == "__main__":
    main()
