"""An hour of random arrivals on one engine: memory stays flat, no row starves, texts are those of a one-by-one run.

Requests come at random times, now and then many at once, with answers and prompts of all lengths, over 12 adapters;
some clients leave. With `--rose-set` the engine gets fewer places than there are adapters.

    python -m benchmarks soak --minutes 60 --rate 2
    python -m benchmarks soak --model fixture --minutes 1 --rate 10 --dry
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
from benchmarks.figures import median, percentile, slope_ratio
from benchmarks.processor_time import resident_bytes
from benchmarks.serving import publish
from benchmarks.serving_contest import rose_settings
from benchmarks.serving_world import MODELS, World, build, passage, question

ADAPTERS = 12
SHORT_QUESTIONS = 5
PASSAGE_TOKENS = (200, 600)
"""Of prompts that are longer, below what any of the models takes."""
LENGTHS = (1, 4, 8, 16, 24, 32)
"""Tokens of the answers."""
LEAVING = 0.15
BURST = 12
"""Requests that come at the same time."""
BURST_SHARE = 0.02
"""How many of the arrivals are bursts."""
MOST_OPEN = 48
"""Requests at a time; what would come beyond that is put off, as clients that are told to wait would."""
SAMPLE_SECONDS = 5.0
TOLD_SECONDS = 60.0
FLAT = 1.05
"""Memory of the last quarter over that of the second that still counts as flat."""
SHOWN = 10
COLUMNS = ("what", "figure", "wanted")


class Soak:
    """Arrivals at random times on one server."""

    def __init__(
        self, server: Rose, world: World, questions: list[str], texts: Texts, given: argparse.Namespace
    ) -> None:
        self.tally = Tally(world, texts, max(LENGTHS))
        self.memory: list[float] = []
        self.put_off = 0
        self._server, self._world, self._questions, self._given = server, world, questions, given
        self._chance = random.Random(given.seed)
        self._open = 0

    async def run(self) -> None:
        """Let requests arrive until the time is over, then wait for the last of them."""
        end = time.monotonic() + 60 * self._given.minutes
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch())
            async with asyncio.TaskGroup() as asking:
                while time.monotonic() < end:
                    await asyncio.sleep(self._chance.expovariate(self._given.rate))
                    for _ in range(BURST if self._chance.random() < BURST_SHARE else 1):
                        self._arrive(asking)
            watching.cancel()

    def _arrive(self, tasks: asyncio.TaskGroup) -> None:
        if self._open >= MOST_OPEN:
            self.put_off += 1
            return
        self._open += 1
        tasks.create_task(self._ask())

    async def _ask(self) -> None:
        job = draw(self._chance, len(self._world.adapters), len(self._questions), LENGTHS, LEAVING)
        asked = body(self._server, self._world, self._questions, job)
        try:
            self.tally.add(job, await ask(self._server.port, asked, leave_after=job.leave_after))
        finally:
            self._open -= 1

    async def _watch(self) -> None:
        """Note the engine's memory, and say now and then how it goes."""
        told = time.monotonic()
        while True:
            self._server.check_alive()
            self.memory.append(resident_bytes(self._server.pid) / 2**20)
            if time.monotonic() - told > TOLD_SECONDS:
                told = time.monotonic()
                ends = dict(self.tally.ends)
                print(
                    f"{self.memory[-1]:.0f} MiB, {ends}, {len(self.tally.wrong)} wrong, {self._open} open", flush=True
                )
            await asyncio.sleep(SAMPLE_SECONDS)


def questions_for(world: World) -> list[str]:
    """Return short questions and long ones."""
    tokenizer = world.tokenizer()
    long = [passage(tokenizer, tokens, tokens) for tokens in PASSAGE_TOKENS]
    return [*(question(number) for number in range(SHORT_QUESTIONS)), *long]


async def measure(given: argparse.Namespace) -> None:
    """Run it and record how it went."""
    world = build(given.model, given.adapters)
    questions = questions_for(world)
    with ExitStack() as stack:
        server = Rose(world, stack, settings=rose_settings(given))
        await wait_until_up(server)
        await answer_one(server, None)
        texts = await one_by_one(server, world, questions, max(LENGTHS))
        print(f"{len(texts)} texts known, {alike(texts)} of them not of one adapter alone", flush=True)
        soak = Soak(server, world, questions, texts, given)
        await soak.run()
        about = await server.about()
    print(*soak.tally.wrong[:SHOWN], sep="\n")
    what = (
        f"{(__doc__ or '').splitlines()[0]} Model {world.name}. {about}. {given.minutes:g} minutes, {given.rate:g}/s."
    )
    publish(given, "soak", what, COLUMNS, rows(soak, texts))


def rows(soak: Soak, texts: Texts) -> list[list[str]]:
    """Return the lines of the table."""
    tally, quarter = soak.tally, len(soak.memory) // 4
    errors = {end: count for end, count in tally.ends.items() if end not in ("answered", "left")}
    first = tally.first_seconds
    return [
        ["requests", str(sum(tally.ends.values())), ""],
        ["answered, left by the client", f"{tally.ends['answered']}, {tally.ends['left']}", ""],
        ["ended otherwise", ", ".join(f"{end} {count}" for end, count in errors.items()) or "0", "0"],
        ["not sent because too many were open", str(soak.put_off), ""],
        ["texts unlike the one-by-one run", str(len(tally.wrong)), "0"],
        ["known texts that several adapters share", f"{alike(texts)} of {len(texts)}", "few"],
        ["memory MiB, second quarter", f"{median(soak.memory[quarter : 2 * quarter]):.0f}", ""],
        ["memory MiB, last quarter", f"{median(soak.memory[-quarter:]):.0f}", ""],
        ["last over second quarter", f"{slope_ratio(soak.memory):.3f}", f"{FLAT} at most"],
        ["longest wait for a first token, s", f"{max(first, default=0.0):.2f}", ""],
        ["first token s, p50 and p99", f"{percentile(first, 0.5):.2f}, {percentile(first, 0.99):.2f}", ""],
        ["longest wait between two texts of a stream, s", f"{tally.longest_gap:.2f}", ""],
    ]


def main() -> None:
    """Run with the options of the command line."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", choices=MODELS, default="smollm2")
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--rate", type=float, default=2.0, help="arrivals per second")
    options.add_argument("--adapters", type=int, default=ADAPTERS)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--rose-threads", type=int)
    options.add_argument("--rose-set", action="append", default=[], metavar="NAME=VALUE", help="ROSE's environment")
    options.add_argument("--label", help="record under this name, too, beside what is there")
    options.add_argument("--dry", action="store_true", help="record nothing")
    run_to_the_end(measure(options.parse_known_args()[0]))


if __name__ == "__main__":
    main()
