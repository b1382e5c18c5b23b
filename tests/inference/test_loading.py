"""What is loaded, what is refused, and what leaves memory again."""

from __future__ import annotations

import gc
import json
import queue
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rose.domain.job_values import BaseModel
from rose.errors import InvalidRequest, NotFound, RoseError
from rose.inference.batching.model import BatchedModel
from rose.inference.engine import TorchEngine
from rose.inference.generation import Accepted, Done, EngineBusy, Failed, Piece, Text
from rose.inference.request import Target
from rose.language_models.tiny import build_fixture
from tests.inference.asking import SECONDS, Listener, World, ask, make_adapter, refusal, reply

Start = Callable[..., TorchEngine]


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second base of the same shape, so that an adapter would fit it."""
    return build_fixture(tmp_path_factory.mktemp("other") / "fixture", seed=1)


def other_target(world: World, folder: Path) -> Any:
    return world.target(base=BaseModel(source=str(folder), revision=None, fingerprint=""), model="other")


def test_a_base_that_is_not_there_is_named_with_what_to_do(engine: TorchEngine, world: World) -> None:
    base = BaseModel(source="owner/never-heard-of", revision=None, fingerprint="f" * 64)
    error = refusal(engine, ask(world.target(base=base, model="my-model")))
    assert isinstance(error, NotFound)
    assert (error.code, error.param) == ("model_not_available", "model")
    for part in ("my-model", "owner/never-heard-of", "rose models pull"):
        assert part in str(error)


def test_a_base_whose_files_changed_is_refused(engine: TorchEngine, world: World, other_base: Path) -> None:
    base = msgspec.structs.replace(world.base, source=str(other_base), fingerprint="e" * 64)
    error = refusal(engine, ask(world.target(base=base)))
    assert (error.status, error.code, error.param) == (400, "base_changed", "model")
    assert f"is not the one that the model '{world.target().model}' was made with" in error.message


def test_an_adapter_is_refused_on_another_base_although_it_would_fit(
    engine: TorchEngine, world: World, other_base: Path
) -> None:
    from rose.language_models.locate import locate

    base = locate(str(other_base), models_dir=other_base).base_model()
    error = refusal(engine, ask(world.target(world.red, base=base)))
    assert (error.status, error.code) == (400, "base_changed")
    assert base.fingerprint[:12] in error.message


def test_an_adapter_without_a_stated_base_is_refused(world: World) -> None:
    base = msgspec.structs.replace(world.base, fingerprint="")
    with pytest.raises(InvalidRequest, match="fingerprint"):
        ask(world.target(world.white, base=base))


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone"])
def test_a_damaged_adapter_is_refused_and_the_others_go_on(start_engine: Start, world: World, damage: str) -> None:
    engine = start_engine()
    seed = {"flipped": 11, "shorter": 12, "gone": 13}[damage]
    artifact = make_adapter(world.folder, world.blobs, world.base, seed)
    weights = world.blobs.path(artifact.path) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content if damage == "flipped" else content[:-1])
    error = refusal(engine, ask(world.target(artifact)))
    assert (error.status, error.code) == (500, "blob_mismatch")
    assert reply(engine, ask(world.target(world.red))).text()


def test_a_base_without_fingerprint_and_with_it_is_loaded_once(start_engine: Start, world: World) -> None:
    engine = start_engine()
    reply(engine, ask(world.target(base=msgspec.structs.replace(world.base, fingerprint=""))))
    reply(engine, ask(world.target(world.red)))
    (loaded,) = engine.status().bases
    assert (loaded.fingerprint, loaded.adapters) == (world.base.fingerprint, (world.red.sha256,))


def test_an_idle_base_leaves_memory_and_comes_back(start_engine: Start, world: World) -> None:
    engine = start_engine(idle_seconds=0.0)
    listener = Listener(engine, ask(world.target(world.red)))
    assert isinstance(listener.next(), Accepted)
    resident = weakref.ref(engine._residents[world.base.fingerprint])  # pyright: ignore[reportPrivateUsage]
    first = listener.all_text()
    until(lambda: not engine.status().bases)
    until(lambda: resident() is None)
    assert reply(engine, ask(world.target(world.red))).text() == first


def test_the_longest_unused_adapter_leaves_when_there_are_too_many(start_engine: Start, world: World) -> None:
    engine = start_engine(max_adapters=2)
    third = make_adapter(world.folder, world.blobs, world.base, 3)
    answers = {adapter.sha256: reply(engine, ask(world.target(adapter))).text() for adapter in (world.red, world.white)}
    reply(engine, ask(world.target(world.red)))
    reply(engine, ask(world.target(third)))
    (loaded,) = engine.status().bases
    assert set(loaded.adapters) == {world.red.sha256, third.sha256}
    for adapter in (world.white, world.red):
        assert reply(engine, ask(world.target(adapter))).text() == answers[adapter.sha256]


class Held:
    """An engine with one slot for adapters, which is held before its first and its third step."""

    def __init__(self, start_engine: Start) -> None:
        self.steps = 0
        self.go = {1: threading.Event(), 3: threading.Event()}
        self.heard: list[tuple[str, type[Piece]]] = []
        self._engine = start_engine(max_adapters=1, before_step=self._before_step)

    def _before_step(self) -> None:
        self.steps += 1
        if self.steps in self.go:
            assert self.go[self.steps].wait(SECONDS)

    def submit(self, name: str, target: Target) -> Callable[[], None]:
        return self._engine.submit(ask(target), lambda piece: self.heard.append((name, type(piece))))

    def ends(self, kind: type[Piece]) -> list[str]:
        return [name for name, heard in self.heard if heard is kind]


def test_more_adapters_than_slots_take_turns_and_the_longest_wait_is_next(start_engine: Start, world: World) -> None:
    """While one adapter answers, another is asked: who comes later for the first does not keep it out."""
    held = Held(start_engine)
    held.submit("red", world.target(world.red))
    until(lambda: held.steps)
    held.submit("white", world.target(world.white))
    held.submit("late red", world.target(world.red))
    held.submit("base", world.target())
    for gate in held.go.values():
        gate.set()
    until(lambda: len(held.ends(Done)) == 4)
    assert held.ends(Accepted) == ["red", "base", "white", "late red"]


def test_an_adapter_that_was_to_leave_stays_when_nobody_waits_for_its_slot(start_engine: Start, world: World) -> None:
    held = Held(start_engine)
    held.submit("red", world.target(world.red))
    until(lambda: held.steps)
    cancel = held.submit("white", world.target(world.white))
    held.submit("late red", world.target(world.red))
    held.go[1].set()
    until(lambda: held.steps == 3)
    assert held.ends(Accepted) == ["red"]
    cancel()
    held.go[3].set()
    until(lambda: len(held.ends(Done)) == 2)
    assert [name for name, kind in held.heard if kind in (Accepted, Done)] == ["red", "late red", "red", "late red"]


def test_a_request_that_gets_no_slot_in_time_is_told_so(start_engine: Start, world: World) -> None:
    pause = threading.Event()
    engine = start_engine(max_adapters=1, patience_seconds=0.5, before_step=lambda: pause.wait(0.02))
    until(lambda: isinstance(Listener(engine, ask(world.target(world.red), max_tokens=1)).next(), Accepted))
    long = Listener(engine, ask(world.target(world.red), max_tokens=200))
    assert isinstance(long.next(), Accepted)
    failed = Listener(engine, ask(world.target(world.white))).next()
    long.cancel()
    assert isinstance(failed, Failed)
    assert "All 1 adapters" in failed.error.message


def test_a_model_that_does_not_fit_takes_the_place_of_an_unused_one(
    start_engine: Start, world: World, other_base: Path
) -> None:
    free = 10_000_000
    engines: list[TorchEngine] = []

    def free_bytes(_: torch.device) -> int:
        return free if not engines or not engines[0].status().bases else 0

    engine = start_engine(free_bytes=free_bytes)
    engines.append(engine)
    reply(engine, ask(world.target()))
    reply(engine, ask(other_target(world, other_base)))
    assert [base.source for base in engine.status().bases] == [str(other_base)]


def test_a_model_that_does_not_fit_beside_busy_ones_is_refused_for_a_while(
    start_engine: Start, world: World, other_base: Path
) -> None:
    engines: list[TorchEngine] = []

    def free_bytes(_: torch.device) -> int:
        return 10_000_000 if not engines or not engines[0].status().bases else 0

    engine = start_engine(free_bytes=free_bytes)
    engines.append(engine)
    busy = Listener(engine, ask(world.target(), max_tokens=2000))
    assert isinstance(busy.next(), Accepted)
    error = refusal(engine, ask(other_target(world, other_base)))
    busy.cancel()
    assert isinstance(error, EngineBusy)
    assert (error.status, error.code) == (503, "not_enough_memory")
    assert error.retry_after_seconds is not None
    assert error.retry_after_seconds > 0


def test_a_model_that_never_fits_says_how_much_it_needs(start_engine: Start, world: World) -> None:
    error = refusal(start_engine(free_bytes=lambda _: 1000), ask(world.target()))
    assert (error.status, error.code) == (503, "not_enough_memory")
    assert "GiB" in error.message
    assert error.hint


def test_a_model_that_the_allocator_refuses_is_no_failure_of_the_engine(
    start_engine: Start, world: World, other_base: Path, tmp_path: Path
) -> None:
    """torch's CPU allocator raises a plain RuntimeError, which must not become a 500."""
    folder = Path(shutil.copytree(other_base, tmp_path / "huge"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1 << 42}))
    error = refusal(start_engine(), ask(other_target(world, folder)))
    assert (error.status, error.code) == (503, "not_enough_memory")


def test_who_waits_too_long_for_a_model_is_told_to_ask_again_and_then_finds_it(
    start_engine: Start, world: World
) -> None:
    may_load = threading.Event()

    def slowly(_: torch.device) -> int:
        may_load.wait(60)
        return 1 << 40

    engine = start_engine(free_bytes=slowly, patience_seconds=0.0)
    error = refusal(engine, ask(world.target()))
    assert isinstance(error, EngineBusy)
    assert error.code == "model_loading"
    assert engine.status().loading == (world.base.source,)
    may_load.set()
    until(lambda: engine.status().bases)
    assert reply(engine, ask(world.target())).text()


def test_loading_one_model_does_not_hold_up_answers_of_another(
    start_engine: Start, world: World, other_base: Path
) -> None:
    may_load = threading.Event()
    may_load.set()

    def when_allowed(_: torch.device) -> int:
        may_load.wait(60)
        return 1 << 40

    engine = start_engine(free_bytes=when_allowed)
    expected = reply(engine, ask(world.target())).text()
    may_load.clear()
    waiting = Listener(engine, ask(other_target(world, other_base)))
    assert reply(engine, ask(world.target())).text() == expected
    may_load.set()
    assert waiting.all().text() != expected


def test_too_many_requests_are_refused_and_freed_places_are_taken(start_engine: Start, world: World) -> None:
    engine = start_engine(max_requests=2)
    listeners = [Listener(engine, ask(world.target(), max_tokens=2000)) for _ in range(2)]
    with pytest.raises(EngineBusy) as refused:
        engine.submit(ask(world.target()), lambda piece: None)
    assert refused.value.status == 503
    for listener in listeners:
        listener.cancel()
    wait_until_free(engine)
    assert reply(engine, ask(world.target())).text()


def test_cancel_frees_a_request_within_one_step(start_engine: Start, world: World) -> None:
    steps: queue.SimpleQueue[None] = queue.SimpleQueue()
    allowed = threading.Semaphore(3)

    def hold() -> None:
        allowed.acquire(timeout=60)
        steps.put(None)

    engine = start_engine(before_step=hold)
    listener = Listener(engine, ask(world.target(), max_tokens=2000))
    assert isinstance(listener.next(), Accepted)
    for _ in range(3):
        steps.get(timeout=60)
    listener.cancel()
    for _ in range(100):
        allowed.release()
    wait_until_free(engine)
    assert steps.qsize() <= 1, "the step that was waiting may still be made, no other"


def test_a_cancelled_request_leaves_no_cache_behind(start_engine: Start, world: World) -> None:
    engine = start_engine()
    reply(engine, ask(world.target()))
    kept: list[weakref.ref[Any]] = []
    listener = Listener(engine, ask(world.target(), max_tokens=2000))
    while not isinstance(listener.next(), Text):
        pass
    decoding = engine._active[0]  # pyright: ignore[reportPrivateUsage]
    (row,) = decoding.going()
    kept.append(weakref.ref(row))
    held = engine.status().cache_bytes
    assert held > 0
    del decoding, row
    listener.cancel()
    del listener
    wait_until_free(engine)
    reply(engine, ask(world.target(), max_tokens=1))
    gc.collect()
    assert kept[0]() is None
    until(lambda: engine.status().cache_bytes == 0)


def test_stopping_ends_every_request_at_once_and_refuses_new_ones(start_engine: Start, world: World) -> None:
    engine = start_engine()
    listener = Listener(engine, ask(world.target(), max_tokens=2000))
    while not isinstance(listener.next(), Text):
        pass
    engine.stop()
    assert engine.join(30)
    piece = listener.next()
    while isinstance(piece, Text):
        piece = listener.next()
    assert isinstance(piece, Failed)
    assert (piece.error.status, piece.error.code) == (503, "engine_stopping")
    with pytest.raises(RoseError, match="stopping"):
        engine.submit(ask(world.target()), lambda piece: None)


def test_a_request_that_fails_does_not_end_the_engine(
    start_engine: Start, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start_engine()
    reply(engine, ask(world.target()))

    def broken(*_: Any) -> None:
        raise RuntimeError("secret detail of the device")

    with monkeypatch.context() as patched:
        patched.setattr(BatchedModel, "step", broken)
        error = refusal(engine, ask(world.target()))
    assert (error.status, error.code) == (500, "engine_error")
    assert "secret" not in str(error)
    assert "secret detail" in caplog.text
    assert reply(engine, ask(world.target())).text()


def test_an_error_in_the_engine_itself_reaches_every_request_and_ends_it(
    start_engine: Start, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start_engine()
    listener = Listener(engine, ask(world.target(), max_tokens=2000))
    assert isinstance(listener.next(), Accepted)
    monkeypatch.setattr(engine, "_drop_idle", lambda: 1 / 0)
    with pytest.raises(RoseError) as ended:
        listener.all()
    assert ended.value.code == "engine_error"
    assert engine.join(30)
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(EngineBusy):
        engine.submit(ask(world.target()), lambda piece: None)


def wait_until_free(engine: TorchEngine) -> None:
    """Wait until the engine has no request. Raises: AssertionError after a minute."""
    until(lambda: engine.status().active_requests == 0)


def until(condition: Callable[[], object]) -> None:
    """Wait until the engine's thread has made the condition true. Raises: AssertionError after a minute."""
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it does not come true")
