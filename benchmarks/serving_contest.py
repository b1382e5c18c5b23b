"""The options of the serving benchmarks, the servers that they start, and one run of streams on one of them."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from typing import Any

import msgspec

from benchmarks.chat_client import Reply, ask
from benchmarks.contestants import THREADS, Rose, Server, Vllm, answer_one, wait_until_up
from benchmarks.figures import median
from benchmarks.processor_time import halted, sample, shares
from benchmarks.serving_world import MODELS, World, build, question
from benchmarks.streams_under_training import tree_of
from rose.domain.artifacts import Artifact

PAIRS = 5
TOKENS = 64
MAX_OTHERS = 0.3
"""A run during which others used more cores than this does not count."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one scenario on one server."""

    tokens_per_second: float
    first_seconds: list[float]
    """To the first token, of each stream."""
    gap_seconds: list[float]
    """Between one text and the next, of all streams."""
    others: float
    """Cores that strangers used."""
    peers: float
    """Cores that the servers used that were not asked."""


class Contest(msgspec.Struct, frozen=True, kw_only=True):
    """Servers that are up, with the base loaded on each, and what they are asked for."""

    world: World
    servers: Sequence[Server]
    options: argparse.Namespace

    @property
    def ours(self) -> Server:
        """The one from this tree."""
        return self.servers[0]

    def alone(self, server: Server) -> AbstractContextManager[None]:
        """Halt the servers that are not asked: an idle vLLM uses most of a core, which the other side would lack."""
        idle = [one.pid for one in self.servers if one is not server]
        return nullcontext() if self.options.leave_idle else halted(idle)

    async def heading(self) -> str:
        """Say which model, threads and weights are measured."""
        told = "; ".join([await server.about() for server in self.servers])
        return f"Model {self.world.name}. {told}."


def parser() -> argparse.ArgumentParser:
    """Return the options that the serving benchmarks share."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", choices=MODELS, default="smollm2")
    options.add_argument("--against", default="vllm", help="vllm, none, or a commit whose ROSE is the other side")
    options.add_argument("--pairs", type=int, default=PAIRS, help="runs of each side")
    options.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each answer")
    options.add_argument("--max-others", type=float, default=MAX_OTHERS, help="cores that others may use in a run")
    options.add_argument("--rose-threads", type=int)
    options.add_argument("--rose-set", action="append", default=[], metavar="NAME=VALUE", help="ROSE's environment")
    options.add_argument("--vllm-threads", type=int, help="bound to the first cores; default: as vLLM sees fit")
    options.add_argument("--vllm-dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--leave-idle", action="store_true", help="do not halt the server that is not asked")
    options.add_argument("--label", help="record under the model's name and this one, beside what is there")
    options.add_argument("--dry", action="store_true", help="record nothing")
    return options


def rose_settings(given: argparse.Namespace) -> dict[str, str]:
    """Return the environment variables that the options name."""
    settings = dict(text.split("=", 1) for text in given.rose_set)
    if given.rose_threads is not None:
        settings[THREADS] = str(given.rose_threads)
    return settings


@asynccontextmanager
async def contest(given: argparse.Namespace, adapters: int) -> AsyncGenerator[Contest]:
    """Start the servers and give them as long as the context lasts."""
    world = build(given.model, adapters)
    with ExitStack() as stack:
        servers: list[Rose | Vllm] = [Rose(world, stack, settings=rose_settings(given))]
        if given.against == "vllm":
            servers.append(Vllm(world, stack, threads=given.vllm_threads, dtype=given.vllm_dtype))
        elif given.against != "none":
            tree = stack.enter_context(tree_of(given.against))
            servers.append(Rose(world, stack, tree=tree, name=given.against, settings=rose_settings(given)))
        for server in servers:
            await wait_until_up(server)
            await answer_one(server, None)
        yield Contest(world=world, servers=servers, options=given)


def body(
    server: Server, world: World, text: str, adapter: Artifact | None = None, *, tokens: int = TOKENS, **more: Any
) -> dict[str, Any]:
    """Return a greedy request whose answer has exactly so many tokens."""
    bias = {str(token): -100 for token in world.end_tokens}
    asked = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens}
    return {**asked, "logit_bias": bias, **server.fields(adapter), **more}


def check(replies: Sequence[Reply], tokens: int) -> None:
    """Raises: RuntimeError unless every answer is complete and as long as was asked for."""
    for reply in replies:
        if not reply.complete or reply.completion_tokens != tokens:
            raise RuntimeError(f"an answer ended with {reply.error} after {reply.completion_tokens} of {tokens} tokens")


async def run_streams(
    contest: Contest, server: Server, streams: int, adapters: int, first_question: int, tokens: int
) -> Run:
    """Ask so many questions at once, over so many adapters (0: the base), from a certain question on."""
    world = contest.world
    chosen = [world.adapters[stream % adapters] if adapters else None for stream in range(streams)]
    bodies = [
        body(server, world, question(first_question + stream), adapter, tokens=tokens)
        for stream, adapter in enumerate(chosen)
    ]
    roots = [one.pid for one in contest.servers]
    with contest.alone(server):
        before = sample(roots)
        replies = await asyncio.gather(*(ask(server.port, asked) for asked in bodies))
        used = shares(before, sample(roots))
    check(replies, tokens)
    seconds = max(reply.ended for reply in replies) - min(reply.sent for reply in replies)
    return Run(
        tokens_per_second=streams * tokens / seconds,
        first_seconds=[reply.first_seconds for reply in replies],
        gap_seconds=[gap for reply in replies for gap in reply.gaps],
        others=used.others,
        peers=sum(cores for root, cores in used.each.items() if root != server.pid),
    )


async def warm(contest: Contest, adapters: int) -> None:
    """Load the first adapters on every server."""
    for server in contest.servers:
        for adapter in contest.world.adapters[:adapters]:
            await server.load(adapter)


def kept(runs: Sequence[Run], max_others: float) -> list[Run]:
    """Return the runs that count; all of them when none does, since a table with a warning is better than none."""
    return [run for run in runs if run.others <= max_others] or list(runs)


def line(server: Server, what: str, run: Run) -> str:
    """Return one run in words."""
    first, gap = median(run.first_seconds), median(run.gap_seconds)
    return (
        f"{what}, {server.name}: {run.tokens_per_second:.1f} tokens/s, first {first:.2f} s, gap {1000 * gap:.0f} ms; "
        f"others used {run.others:.2f} cores, idle servers {run.peers:.2f}"
    )
