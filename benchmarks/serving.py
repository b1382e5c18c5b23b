"""Streams over HTTP: ROSE's inference process beside vLLM for the CPU, tokens per second and time to the first one.

Both servers are up and take turns. Prompts differ, answers are greedy and all equally long (their end is biased away),
adapters are warm. ROSE's engine is asked directly, as the API asks it: vLLM has nothing before it either. Before any
speed is measured, texts are compared. A run during which others used more than 0.3 cores is left out.

    python -m benchmarks.vllm_peer setup
    python -m benchmarks serving --model smollm2 --pairs 5
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec

from benchmarks.contestants import run_to_the_end
from benchmarks.figures import median, spread
from benchmarks.record import machine, record
from benchmarks.serving_contest import Contest, Run, contest, kept, line, parser, run_streams, warm
from benchmarks.serving_exact import COLUMNS as EXACT_COLUMNS
from benchmarks.serving_exact import compare

ADAPTERS = 8
WARM_TOKENS = 4
QUESTIONS = 10_000
"""Between the first question of a scenario and that of the next."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """How many streams run at once, over how many adapters."""

    streams: int
    adapters: int = 0

    @property
    def key(self) -> str:
        """Its name on the command line."""
        return f"{self.streams}a{self.adapters}" if self.adapters else str(self.streams)

    @property
    def name(self) -> str:
        """Its name in the table."""
        where = f"over {self.adapters} adapters" if self.adapters else "on the base"
        return f"{self.streams} stream{'s' if self.streams > 1 else ''} {where}"


SCENARIOS = {
    scenario.key: scenario
    for scenario in (
        *(Scenario(streams=streams) for streams in (1, 8, 16, 32)),
        Scenario(streams=8, adapters=8),
        Scenario(streams=16, adapters=8),
    )
}
COLUMNS = (
    *("scenario", "server", "runs kept", "tokens/s", "range", "ratio", "first token s, median", "max"),
    *("gap ms, median", "max", "others' cores"),
)


async def turns(contest: Contest, scenario: Scenario) -> dict[str, list[Run]]:
    """Run a scenario on each server in turns, until each has enough runs that count or twice as many in all."""
    pairs, most = contest.options.pairs, contest.options.max_others
    found: dict[str, list[Run]] = {server.name: [] for server in contest.servers}
    streams, adapters = scenario.streams, scenario.adapters
    first = QUESTIONS * (1 + list(SCENARIOS).index(scenario.key))  # no question twice: servers keep what they have read
    for server in contest.servers:
        await run_streams(contest, server, streams, adapters, first, WARM_TOKENS)
    for number in range(2 * pairs):
        if number >= pairs and all(sum(run.others <= most for run in runs) >= pairs for runs in found.values()):
            break
        first += streams
        for server in contest.servers:
            run = await run_streams(contest, server, streams, adapters, first, contest.options.tokens)
            found[server.name].append(run)
            print(line(server, scenario.name, run), flush=True)
    return found


def rows(scenario: Scenario, found: dict[str, list[Run]], max_others: float) -> list[list[str]]:
    """Return the scenario's lines of the table."""
    speeds = {name: median([run.tokens_per_second for run in kept(runs, max_others)]) for name, runs in found.items()}
    slowest_known = list(speeds.values())[-1]
    return [
        _row(scenario, name, runs, max_others, f"{speeds[name] / slowest_known:.2f}" if len(speeds) > 1 else "")
        for name, runs in found.items()
    ]


def _row(scenario: Scenario, name: str, runs: Sequence[Run], max_others: float, ratio: str) -> list[str]:
    good = sum(run.others <= max_others for run in runs)
    counted = kept(runs, max_others)
    speeds = [run.tokens_per_second for run in counted]
    gaps = [gap for run in counted for gap in run.gap_seconds]
    return [
        scenario.name,
        name,
        f"{good} of {len(runs)}" if good else f"0 of {len(runs)}, all shown",
        f"{median(speeds):.1f}",
        spread(speeds),
        ratio,
        f"{median([first for run in counted for first in run.first_seconds]):.2f}",
        f"{max(max(run.first_seconds) for run in counted):.2f}",
        f"{1000 * median(gaps):.0f}",
        f"{1000 * max(gaps):.0f}",
        spread([run.others for run in counted], 2),
    ]


def chosen(names: str) -> list[Scenario]:
    """Return the scenarios of a list with commas. Raises: SystemExit for an unknown one."""
    if unknown := [name for name in names.split(",") if name not in SCENARIOS]:
        raise SystemExit(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    return [SCENARIOS[name] for name in names.split(",")]


async def measure() -> None:
    """Compare texts, then measure every scenario, and record both."""
    options = parser()
    options.add_argument("--scenarios", default=",".join(SCENARIOS))
    options.add_argument("--exact", choices=("first", "only", "no"), default="first", help="compare texts")
    given, _ = options.parse_known_args()
    scenarios = chosen(given.scenarios)
    async with contest(given, ADAPTERS) as ready:
        await warm(ready, ADAPTERS)
        heading = await ready.heading()
        print(heading, machine(), sep="\n", flush=True)
        if given.exact != "no":
            what = f"Greedy texts: alone, together, and beside the other server. {heading}"
            publish(given, "serving_exact", what, EXACT_COLUMNS, await compare(ready))
        if given.exact != "only":
            table = [row for scenario in scenarios for row in await measured(ready, scenario)]
            what = f"{(__doc__ or '').splitlines()[0]} {heading} {given.tokens} tokens each; ratio: to the last server."
            publish(given, "serving", what, COLUMNS, table)


async def measured(ready: Contest, scenario: Scenario) -> list[list[str]]:
    """Return the lines of one scenario."""
    return rows(scenario, await turns(ready, scenario), ready.options.max_others)


def publish(
    given: argparse.Namespace, name: str, what: str, columns: Sequence[str], table: Sequence[Sequence[str]]
) -> None:
    """Record a table under its name, the model's and the label, or with `--dry` only print it."""
    if given.dry:
        print(what, columns, *table, sep="\n")
    else:
        name = "_".join((name, given.model, given.label) if given.label else (name, given.model))
        print("written to", record(name, what, columns, table))


def main() -> None:
    """Measure."""
    run_to_the_end(measure())


if __name__ == "__main__":
    main()
