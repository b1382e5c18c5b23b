"""What churn and soak share: texts of a one-by-one run, and the judgement of answers that came while much else ran."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.chat_client import Reply, ask
from benchmarks.contestants import Server
from benchmarks.serving_world import World
from rose.domain.artifacts import Artifact

ADAPTER_HEADER = "x-rose-adapter"
"""In an answer: the SHA-256 of the adapter that made it."""
BROKEN_TEXT = "\ufffd"
"""Stands for a character whose last bytes were cut off by the limit of tokens."""

Texts = dict[tuple[int, int], str]
"""(adapter's number, question's number) -> the whole answer; adapter -1 is the base."""
BASE = -1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the crowd."""

    adapter: int
    question: int
    tokens: int
    leave_after: int | None
    """The client goes away after so many texts."""


class Tally:
    """Counts how requests ended, and what was wrong."""

    def __init__(self, world: World, texts: Texts, tokens: int) -> None:
        """`tokens`: how long the texts are that answers are compared with."""
        self.ends: Counter[str] = Counter()
        """How the requests ended: answered, left, or an error's code."""
        self.wrong: list[str] = []
        """One sentence for each answer that is not what it should be."""
        self.named = 0
        """Answers that told in their header which adapter made them."""
        self.first_seconds: list[float] = []
        self.longest_gap = 0.0
        self._world, self._texts, self._tokens = world, texts, tokens

    def add(self, job: Job, reply: Reply) -> None:
        """Count one request and judge its text."""
        self.ends["answered" if reply.complete else "left" if reply.left else str(reply.error)] += 1
        if reply.arrivals:
            self.first_seconds.append(reply.first_seconds)
            self.longest_gap = max(self.longest_gap, *reply.gaps, 0.0)
        if (told := reply.headers.get(ADAPTER_HEADER)) is not None:
            self.named += 1
            if told != self._world.adapters[job.adapter].sha256:
                self.wrong.append(f"asked for adapter {job.adapter}, the header names {told[:12]}")
        if not self._fits(job, reply):
            self.wrong.append(f"adapter {job.adapter}, question {job.question}: {self._whose(job, reply.text)}")

    def _fits(self, job: Job, reply: Reply) -> bool:
        """Tell whether the text is the beginning of the expected one, and all of it where all was asked for."""
        expected, text = self._texts[job.adapter, job.question], reply.text.rstrip(BROKEN_TEXT)
        if reply.complete and job.tokens == self._tokens:
            return reply.text == expected
        as_long = not reply.complete or reply.completion_tokens == job.tokens
        return as_long and expected.startswith(text)

    def _whose(self, job: Job, text: str) -> str:
        for (adapter, question), expected in self._texts.items():
            known = question == job.question and adapter != job.adapter
            if known and text and expected.startswith(text.rstrip(BROKEN_TEXT)):
                return f"{text!r} is what {'the base' if adapter == BASE else f'adapter {adapter}'} says"
        return f"{text!r} is what nobody says; expected {self._texts[job.adapter, job.question]!r}"


def body(server: Server, world: World, questions: Sequence[str], job: Job) -> dict[str, Any]:
    """Return the request of a job."""
    adapter: Artifact | None = None if job.adapter == BASE else world.adapters[job.adapter]
    messages = [{"role": "user", "content": questions[job.question]}]
    bias = {str(token): -100 for token in world.end_tokens}
    fields = server.fields(adapter)
    return {"messages": messages, "temperature": 0, "max_tokens": job.tokens, "logit_bias": bias, **fields}


async def one_by_one(server: Server, world: World, questions: Sequence[str], tokens: int) -> Texts:
    """Return the texts of the base and of all adapters, each asked when the one before it had ended.

    Raises: RuntimeError when the server does not answer.
    """
    texts: Texts = {}
    for adapter in range(BASE, len(world.adapters)):
        for question in range(len(questions)):
            job = Job(adapter=adapter, question=question, tokens=tokens, leave_after=None)
            reply = await ask(server.port, body(server, world, questions, job))
            if not reply.complete:
                raise RuntimeError(f"{server.name} does not answer: {reply.error}")
            texts[adapter, question] = reply.text
    return texts


def alike(texts: Texts) -> int:
    """Return how many answers of adapters another adapter or the base gives, too: these prove nothing."""
    times = Counter((question, text) for (_, question), text in texts.items())
    return sum(times[question, text] > 1 for (adapter, question), text in texts.items() if adapter != BASE)


def draw(chance: random.Random, adapters: int, questions: int, tokens: Sequence[int], leaving: float) -> Job:
    """Return a random job; `leaving` is the share of clients that go away after one to three texts."""
    return Job(
        adapter=chance.randrange(adapters),
        question=chance.randrange(questions),
        tokens=chance.choice(tokens),
        leave_after=chance.randint(1, 3) if chance.random() < leaving else None,
    )
