"""Many requests at once: they share steps, and none feels the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from rose.inference.batching.model import CHUNK_TOKENS
from rose.inference.engine import TorchEngine
from rose.inference.generation import Accepted, Text
from rose.inference.loading import Loader
from tests.inference.asking import Listener, World, ask, refusal, reply

Start = Callable[..., TorchEngine]

STORY = [{"role": "user", "content": "Roses are red, violets are blue. " * 20}]


def test_requests_share_each_step(start_engine: Start, world: World) -> None:
    steps: list[None] = []
    submitted = threading.Event()

    def before_step() -> None:
        submitted.wait(60)
        steps.append(None)

    engine = start_engine(before_step=before_step)
    asked = [ask(world.target(adapter), max_tokens=30) for adapter in (None, world.red, world.white, None) * 2]
    listeners = [Listener(engine, request) for request in asked]
    submitted.set()
    for listener in listeners:
        assert listener.all().done.completion_tokens == 30
    assert len(steps) < 2 * 30 + 10, "eight answers of 30 tokens took more steps than two would one after the other"


def test_an_answer_has_the_same_bits_alone_and_among_others(start_engine: Start, world: World) -> None:
    engine = start_engine()
    asked = [
        ask(world.target(adapter), logprobs=True, top_logprobs=2, max_tokens=16, seed=seed, **sampling)
        for seed, adapter in enumerate((None, world.red, world.white, None, world.red))
        for sampling in ({"temperature": 0}, {"temperature": 1, "messages": STORY})
    ]
    alone = [reply(engine, request) for request in asked]
    together = [listener.all() for listener in [Listener(engine, request) for request in asked]]
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs() == other.logprobs()
    (base,) = engine.status().bases
    assert base.batched
    assert base.batch_invariant


def test_the_beginning_of_a_prompt_is_read_once_for_each_adapter(start_engine: Start, world: World) -> None:
    engine = start_engine()

    def cached(adapter: Any = None, **body: Any) -> tuple[int, str]:
        answer = reply(engine, ask(world.target(adapter), messages=STORY, **body))
        return answer.done.cached_tokens, answer.text()

    first, text = cached()
    again, same = cached()
    assert (first, same) == (0, text)
    assert again > 100
    assert again % CHUNK_TOKENS == 0
    assert cached(world.red)[0] == 0, "an adapter makes other keys and values of the same text"
    assert cached(world.red)[0] == again
    assert cached(n=2, temperature=1)[0] == again
    elsewhere = reply(engine, ask(world.target(project="other"), messages=STORY))
    assert elsewhere.done.cached_tokens == 0, "a count would tell one project what another asked"
    assert engine.status().cache_bytes > 0


def test_where_there_is_no_room_for_all_projects_take_turns(world: World) -> None:
    gate = threading.Event()
    loader = Loader(world.blobs, models_dir=world.folder.parent, offline=True, device="cpu", cache_bytes=1)

    def wait() -> None:
        gate.wait(60)

    engine = TorchEngine(loader, before_step=wait)
    try:
        order: list[str] = []

        def sink(name: str) -> Callable[[Any], None]:
            return lambda piece: order.append(name) if isinstance(piece, Text) and name not in order else None

        for number in range(12):
            engine.submit(ask(world.target(project="many"), max_tokens=20), sink(f"many{number}"))
        few = Listener(engine, ask(world.target(project="few"), max_tokens=20))
        gate.set()
        few.all()
        assert len(order) < 12, "the other project's one request waited for all of the first one's"
    finally:
        gate.set()
        engine.stop()
        assert engine.join(30)


def test_answers_that_never_fit_are_refused_at_once(world: World) -> None:
    loader = Loader(world.blobs, models_dir=world.folder.parent, offline=True, device="cpu", cache_bytes=1)
    engine = TorchEngine(loader)
    try:
        error = refusal(engine, ask(world.target(), n=8))
        assert (error.status, error.param) == (400, "n")
        assert reply(engine, ask(world.target())).text()
    finally:
        engine.stop()
        assert engine.join(30)


def test_status_tells_of_rows_memory_and_speed(start_engine: Start, world: World) -> None:
    engine = start_engine()
    listener = Listener(engine, ask(world.target(world.red), max_tokens=2000, n=2))
    assert isinstance(listener.next(), Accepted)
    while not isinstance(listener.next(), Text):
        pass
    while not (status := engine.status()).rows:
        pass
    assert status.rows == 2
    assert 0 < status.cache_bytes <= status.cache_limit_bytes
    assert status.tokens_per_second > 0
    assert status.bases[0].adapters == (world.red.sha256,)
    assert status.bases[0].weights == "fp32"
    listener.cancel()
