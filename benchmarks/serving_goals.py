"""What streams feel: many arrivals, a long prompt or a training run beside them, a known prompt, a new adapter.

python -m benchmarks serving_goals --model smollm2 --goals arrivals,long,prefix,training,new
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from benchmarks.chat_client import Reply, ask
from benchmarks.contestants import Server, run_to_the_end
from benchmarks.figures import median, percentile, spread
from benchmarks.neighbour import Neighbour, training_beside
from benchmarks.processor_time import sample, shares
from benchmarks.quality import bases
from benchmarks.record import machine
from benchmarks.serving import publish
from benchmarks.serving_contest import Contest, Run, body, check, contest, parser, run_streams
from benchmarks.serving_world import passage, question

LONG_TOKENS = 1500
SYSTEM_TOKENS = 500
RUNNING = 7
"""Streams beside a long prompt."""
MANY = 16
"""Streams that arrive at once, or run while a new adapter is asked."""
BESIDE = 8
"""Streams beside a training run."""
SETTLED = 20
"""Tokens that a stream has made before what is measured begins."""
ENDLESS_TOKENS = 1200
"""Of an answer that goes on until it is left; with its prompt within what vLLM has room for."""
SHORT_TOKENS = 4
POLL_SECONDS = 0.01
GOALS = ("arrivals", "long", "prefix", "training", "new")
COLUMNS = ("goal", "server", "runs", "figure", "range", "wanted", "others' cores")
QUESTIONS = 1_000_000
"""Number of the first question here; `benchmarks.serving` asks others."""

Row = list[str]
Measure = Callable[[Contest], Awaitable[list[Row]]]


class Questions:
    """Numbers that no question had before."""

    def __init__(self) -> None:
        self._next = QUESTIONS

    def take(self, count: int = 1) -> int:
        """Return the first of so many new numbers."""
        self._next += count
        return self._next - count


NEW = Questions()


class Others:
    """Which share of the cores strangers used since this was made."""

    def __init__(self) -> None:
        self._before = sample()

    def cores(self) -> float:
        """Return the cores so far."""
        return shares(self._before, sample()).others


async def arrivals(contest: Contest) -> list[Row]:
    """Measure the time to the first token of streams that arrive at once."""
    found: dict[str, list[Run]] = {server.name: [] for server in contest.servers}
    for _ in range(contest.options.pairs):
        first = NEW.take(MANY)
        for server in contest.servers:
            found[server.name].append(await run_streams(contest, server, MANY, 0, first, contest.options.tokens))
    return [
        [
            f"{MANY} arrivals at once: median of the first tokens, s",
            name,
            str(len(runs)),
            *_figure([median(run.first_seconds) for run in runs], 2),
            "at most the other's",
            spread([run.others for run in runs], 2),
        ]
        for name, runs in found.items()
    ]


@asynccontextmanager
async def running(contest: Contest, server: Server, streams: int) -> AsyncGenerator[list[Reply]]:
    """Keep streams on the base running as long as the context lasts; yields once each has settled."""
    first = NEW.take(streams)
    replies = [Reply() for _ in range(streams)]

    async def keep(stream: int) -> None:
        asked = body(server, contest.world, question(first + stream), tokens=ENDLESS_TOKENS, logprobs=True)
        while True:  # an answer that has reached its end is followed by another
            await ask(server.port, asked, into=replies[stream])
            check([replies[stream]], ENDLESS_TOKENS)
            replies[stream] = Reply()

    async with asyncio.TaskGroup() as tasks:
        kept = [tasks.create_task(keep(stream)) for stream in range(streams)]
        while min(len(reply.arrivals) for reply in replies) < SETTLED:  # noqa: ASYNC110 (filled word by word)
            await asyncio.sleep(POLL_SECONDS)
        try:
            yield replies
        finally:
            for task in kept:
                task.cancel()


async def long_prompt(contest: Contest) -> list[Row]:
    """Measure how long running streams wait for a token while a long prompt is read, in their own median steps."""
    found: dict[str, list[float]] = {server.name: [] for server in contest.servers}
    waits: dict[str, list[float]] = {server.name: [] for server in contest.servers}
    others = Others()
    for _ in range(contest.options.pairs):
        text = passage(contest.world.tokenizer(), LONG_TOKENS, NEW.take())
        for server in contest.servers:
            worst, first = await _beside_long(contest, server, text)
            found[server.name].append(worst)
            waits[server.name].append(first)
            told = f"{worst:.1f} steps, its first token {first:.2f} s"
            print(f"long prompt, {server.name}: {told}", flush=True)
    name = f"a prompt of {LONG_TOKENS} tokens beside {RUNNING} streams"
    strangers = f"{others.cores():.2f}"
    return [
        row
        for server, steps in found.items()
        for row in (
            [f"{name}: longest wait, decode steps", server, str(len(steps)), *_worst(steps), "4 at most", strangers],
            [f"{name}: its own first token, s", server, str(len(steps)), *_figure(waits[server], 2), "", strangers],
        )
    ]


async def _beside_long(contest: Contest, server: Server, text: str) -> tuple[float, float]:
    """Return the longest wait of a running stream in its own steps, and the long prompt's first token in seconds."""
    with contest.alone(server):
        async with running(contest, server, RUNNING) as replies:
            reply = await ask(server.port, body(server, contest.world, text, tokens=SHORT_TOKENS))
            check([reply], SHORT_TOKENS)
            worst = max(longest_wait(one.arrivals, reply.sent, reply.arrivals[0]) for one in replies)
            return worst, reply.first_seconds


def longest_wait(arrivals: Sequence[float], begin: float, end: float) -> float:
    """Return the longest gap that touches begin..end, in median gaps of the time before. Raises: ValueError."""
    gaps = list(itertools.pairwise(arrivals))
    before = [later - earlier for earlier, later in gaps if later <= begin]
    during = [later - earlier for earlier, later in gaps if later > begin and earlier < end]
    if not before or not during:
        raise ValueError("the stream has no tokens before and after the prompt came")
    return max(during) / median(before)


async def prefix(contest: Contest) -> list[Row]:
    """Measure how much sooner the first token comes when the system prompt was read before."""
    found: dict[str, list[float]] = {server.name: [] for server in contest.servers}
    others = Others()
    for _ in range(contest.options.pairs):
        number = NEW.take(2)
        system = passage(contest.world.tokenizer(), SYSTEM_TOKENS, number)
        for server in contest.servers:
            cold, known = [await _first_after(contest, server, system, number + turn) for turn in (0, 1)]
            found[server.name].append(cold / known)
            print(f"prefix, {server.name}: {cold:.2f} s, then {known:.2f} s", flush=True)
    name = f"second request with the same system prompt of {SYSTEM_TOKENS} tokens: times sooner"
    strangers = f"{others.cores():.2f}"
    return [
        [name, server, str(len(ratios)), *_figure(ratios, 1), "5 at least", strangers]
        for server, ratios in found.items()
    ]


async def _first_after(contest: Contest, server: Server, system: str, number: int) -> float:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question(number)}]
    asked = body(server, contest.world, "", tokens=SHORT_TOKENS, messages=messages)
    with contest.alone(server):
        reply = await ask(server.port, asked)
    check([reply], SHORT_TOKENS)
    return reply.first_seconds


async def training(contest: Contest) -> list[Row]:
    """Measure what streams keep of their speed beside a training run."""
    found: dict[tuple[str, bool], list[Run]] = {}
    with training_beside(bases(), contest.options.trainer_threads) as neighbour:
        neighbour.halt()
        for _ in range(contest.options.pairs):
            first = NEW.take(2 * BESIDE)
            for server in contest.servers:
                for trains in (False, True):
                    run = await _beside(contest, server, neighbour, trains, first + BESIDE * trains)
                    found.setdefault((server.name, trains), []).append(run)
                    print(f"{server.name}, training beside: {trains}: {run.tokens_per_second:.1f} tokens/s", flush=True)
    return [_share(server.name, found[server.name, False], found[server.name, True]) for server in contest.servers]


async def _beside(contest: Contest, server: Server, neighbour: Neighbour, trains: bool, first: int) -> Run:
    if trains:
        neighbour.go_on()
    try:
        return await run_streams(contest, server, BESIDE, 0, first, contest.options.tokens)
    finally:
        neighbour.halt()


def _share(name: str, alone: Sequence[Run], beside: Sequence[Run]) -> Row:
    kept = [one.tokens_per_second / other.tokens_per_second for one, other in zip(beside, alone, strict=True)]
    others = spread([run.others for run in (*alone, *beside)], 2)
    what = f"{BESIDE} streams beside a training run: share of their speed"
    return [what, name, str(len(kept)), *_figure(kept, 2), "0.6 at least", others]


async def new_adapters(contest: Contest) -> list[Row]:
    """Measure the time until an adapter that was never loaded answers, while streams run on the base."""
    rows: list[Row] = []
    for server in contest.servers:
        others = Others()
        with contest.alone(server):
            seconds = await _first_tokens(contest, server)
        what = f"a new adapter's first token beside {MANY} streams, loading included: p99, s (range: p50, largest)"
        figures = [f"{percentile(seconds, 0.99):.2f}", f"{median(seconds):.2f}, {max(seconds):.2f}"]
        rows.append([what, server.name, str(len(seconds)), *figures, "1 at most", f"{others.cores():.2f}"])
        print(*rows[-1], flush=True)
    return rows


async def _first_tokens(contest: Contest, server: Server) -> list[float]:
    """Return the seconds from asking for a new adapter to its first token, one adapter after the other."""
    clock, seconds = asyncio.get_running_loop().time, list[float]()
    async with running(contest, server, MANY):
        for adapter in contest.world.adapters[: contest.options.new_adapters]:
            began = clock()
            await server.load(adapter)  # with one token of an answer
            seconds.append(clock() - began)
    return seconds


MEASURES: dict[str, Measure] = {
    "arrivals": arrivals,
    "long": long_prompt,
    "prefix": prefix,
    "training": training,
    "new": new_adapters,
}


def _figure(values: Sequence[float], digits: int) -> list[str]:
    return [f"{median(values):.{digits}f}", spread(values, digits)]


def _worst(values: Sequence[float]) -> list[str]:
    return [f"{max(values):.1f}", spread(values)]


async def measure() -> None:
    """Measure what is asked for and record it."""
    options = parser()
    options.add_argument("--goals", default=",".join(GOALS))
    options.add_argument("--new-adapters", type=int, default=50)
    options.add_argument("--trainer-threads", type=int, default=1)
    given, _ = options.parse_known_args()
    goals = given.goals.split(",")
    if unknown := set(goals) - set(GOALS):
        raise SystemExit(f"no goal {', '.join(unknown)}; there are {', '.join(GOALS)}")
    async with contest(given, given.new_adapters if "new" in goals else 0) as ready:
        heading = await ready.heading()
        print(heading, machine(), sep="\n", flush=True)
        rows: list[Row] = []
        for goal in goals:
            rows += await MEASURES[goal](ready)
        what = f"{(__doc__ or '').splitlines()[0]} {heading}"
        publish(given, "serving_goals", what, COLUMNS, rows)


def main() -> None:
    """Measure."""
    run_to_the_end(measure())


if __name__ == "__main__":
    main()
