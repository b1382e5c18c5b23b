"""Whether an answer depends on what else is being answered, and how it differs from another server's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import msgspec

from benchmarks.chat_client import Reply, ask
from benchmarks.contestants import Server
from benchmarks.serving_contest import Contest, body, check
from benchmarks.serving_world import question
from rose.domain.artifacts import Artifact

PROMPTS = 20
TOP = 5
STAGGER_SECONDS = 0.15
"""Between one arrival and the next, where requests come while others are being answered."""
FIRST_NUMBER = 100_000
"""Of these questions; no run of streams asks the same."""
COLUMNS = ("compared", "texts", "equal", "equal to the bit", "largest |d logprob|", "largest gap where texts part")


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How two answers to the same request differ."""

    same_text: bool
    same_bits: bool
    """Texts and all log-probabilities are equal."""
    logprob: float
    """Largest difference of a chosen token's log-probability before the texts part, nats."""
    gap: float
    """How much likelier the first side found its own token than the other's, where they part; 0: they do not."""


def difference(one: Reply, other: Reply) -> Difference:
    """Compare two answers with log-probabilities."""
    largest, gap = 0.0, 0.0
    for mine, theirs in zip(one.tokens, other.tokens, strict=False):
        if mine.token != theirs.token:
            known = {top.token: top.logprob for top in mine.top_logprobs}
            gap = mine.logprob - known[theirs.token] if theirs.token in known else math.inf
            break
        largest = max(largest, abs(mine.logprob - theirs.logprob))
    same = one.text == other.text
    return Difference(same_text=same, same_bits=same and one.tokens == other.tokens, logprob=largest, gap=gap)


async def compare(contest: Contest) -> list[list[str]]:
    """Return the lines of the table."""
    adapters = contest.world.adapters
    ours, base = contest.ours, [None] * PROMPTS
    mixed = [adapters[number % len(adapters)] if number % 2 else None for number in range(PROMPTS)]
    alone = await one_by_one(contest, ours, base)
    found = [("alone and together", differences(alone, await together(contest, ours, base, 0.0)))]
    mixed_alone = [reply if adapter is None else None for reply, adapter in zip(alone, mixed, strict=True)]
    expected = await one_by_one(contest, ours, mixed, mixed_alone)
    arriving = await together(contest, ours, mixed, STAGGER_SECONDS)
    found.append(("alone and arriving one after the other, half with adapters", differences(expected, arriving)))
    for server in contest.servers[1:]:
        theirs = await together(contest, server, mixed, 0.0)
        check_prompts(expected, theirs)
        found.append((f"{ours.name} and {server.name}, half with adapters", differences(expected, theirs)))
    return [row(name, all_) for name, all_ in found]


def differences(some: Sequence[Reply], others: Sequence[Reply]) -> list[Difference]:
    """Compare answers in pairs."""
    return [difference(one, other) for one, other in zip(some, others, strict=True)]


def check_prompts(ours: Sequence[Reply], theirs: Sequence[Reply]) -> None:
    """Raises: RuntimeError when two servers made different prompts of the same messages."""
    counts = [(one.prompt_tokens, other.prompt_tokens) for one, other in zip(ours, theirs, strict=True)]
    if wrong := [pair for pair in counts if pair[0] != pair[1]]:
        raise RuntimeError(f"the prompts have different lengths in tokens: {wrong[0]}")


async def one_by_one(
    contest: Contest, server: Server, adapters: Sequence[Artifact | None], known: Sequence[Reply | None] | None = None
) -> list[Reply]:
    """Ask each question when the one before it is answered; what is `known` is not asked again."""
    replies: list[Reply] = []
    for number, adapter in enumerate(adapters):
        reply = known[number] if known else None
        replies.append(reply or await _asked(contest, server, number, adapter, 0.0))
    return replies


async def together(
    contest: Contest, server: Server, adapters: Sequence[Artifact | None], stagger_seconds: float
) -> list[Reply]:
    """Ask all questions at once, or each a little after the one before it."""
    asking = (
        _asked(contest, server, number, adapter, number * stagger_seconds) for number, adapter in enumerate(adapters)
    )
    return list(await asyncio.gather(*asking))


async def _asked(contest: Contest, server: Server, number: int, adapter: Artifact | None, delay: float) -> Reply:
    await asyncio.sleep(delay)
    tokens = contest.options.tokens
    more = {"logprobs": True, "top_logprobs": TOP}
    asked = body(server, contest.world, question(FIRST_NUMBER + number), adapter, tokens=tokens, **more)
    reply = await ask(server.port, asked)
    check([reply], tokens)
    return reply


def row(name: str, found: Sequence[Difference]) -> list[str]:
    """Return one line of the table."""
    return [
        name,
        str(len(found)),
        f"{sum(one.same_text for one in found) / len(found):.0%}",
        f"{sum(one.same_bits for one in found) / len(found):.0%}",
        f"{max(one.logprob for one in found):.1e}",
        f"{max(one.gap for one in found):.1e}",
    ]
