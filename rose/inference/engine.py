"""The engine: one thread that moves all requests on, step by step, and one that loads models meanwhile.

Requests and cancellations come from any thread through a queue; models, adapters and requests belong to the engine's
thread. All rows of one base go through it together; where there is no room for all, projects take turns.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import torch

from rose.errors import RoseError
from rose.inference.decoding import Decoding, adapter_key
from rose.inference.generation import (
    STOPPING,
    EngineBusy,
    EngineStatus,
    Failed,
    LoadedBase,
    Piece,
    Scored,
    ScoringRequest,
)
from rose.inference.loading import Loader, NotEnoughMemory, full_key
from rose.inference.meter import Meter
from rose.inference.request import GenerationRequest, Target
from rose.inference.resident import Resident
from rose.inference.rows import Row
from rose.inference.scoring import Scoring
from rose.language_models.adapters import StoredAdapter
from rose.language_models.load import is_out_of_memory

log = logging.getLogger(__name__)

Work = Decoding | Scoring

MAX_REQUESTS = 64
"""Requests at a time, those that wait for room or for a model included."""
MAX_STARTS = 4
"""Prompts that are rendered between two steps; more would hold up those who wait for a token."""
MAX_ADAPTERS = 32
"""Adapters that are on one base at a time, unless a setting says otherwise; the least recently used one leaves."""
LOADING_PATIENCE_SECONDS = 240.0
"""How long a request waits for its model; loading goes on afterwards, and asking again finds it."""
IDLE_POLL_SECONDS = 1.0


class _Loaded(msgspec.Struct, frozen=True):
    """The loader's thread is done with `target`."""

    target: Target
    resident: Resident | None = None
    adapter: StoredAdapter | None = None
    error: RoseError | None = None


class TorchEngine:
    """An Engine (see generation.py) on torch. Starts its thread at once."""

    def __init__(
        self,
        loader: Loader,
        *,
        idle_seconds: float = 1800.0,
        patience_seconds: float = LOADING_PATIENCE_SECONDS,
        max_requests: int = MAX_REQUESTS,
        max_adapters: int = MAX_ADAPTERS,
        before_step: Callable[[], None] | None = None,
    ) -> None:
        """`before_step` is called in the engine's thread before each step."""
        self._loader = loader
        self._idle_seconds = idle_seconds
        self._patience_seconds = patience_seconds
        self._max_requests = max_requests
        self._max_adapters = max_adapters
        self._before_step = before_step
        self._orders: queue.SimpleQueue[Work | _Loaded | None] = queue.SimpleQueue()
        self._deadlines: dict[Work, float] = {}
        """Requests that wait for a model, oldest first, and until when (monotonic seconds)."""
        self._active: list[Work] = []
        self._residents: dict[str, Resident] = {}
        self._loading: Target | None = None
        self._stopping = False
        self._open = 0
        self._counting = threading.Lock()
        self._bases: tuple[LoadedBase, ...] = ()
        self._meter = Meter()
        self._rows = self._waiting = self._cache_bytes = self._cache_limit_bytes = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- called from any thread

    def submit(self, request: GenerationRequest, sink: Callable[[Piece], None]) -> Callable[[], None]:
        """See Engine.submit."""
        return self._queue(Decoding(request, sink))

    def score(self, request: ScoringRequest, sink: Callable[[Scored | Failed], None]) -> Callable[[], None]:
        """See Engine.score."""
        return self._queue(Scoring(request, sink))

    def _queue(self, decoding: Work) -> Callable[[], None]:
        if self._stopping:
            raise _stopping()
        with self._counting:
            if self._open >= self._max_requests:
                raise EngineBusy(
                    f"The engine answers {self._open} requests already, as many as it takes.", retry_after_seconds=2
                )
            self._open += 1
        self._orders.put(decoding)

        def cancel() -> None:
            decoding.cancelled = True
            self._orders.put(None)

        return cancel

    def status(self) -> EngineStatus:
        """See Engine.status."""
        loading = self._loading
        return EngineStatus(
            device=str(self._loader.device),
            active_requests=self._open,
            bases=self._bases,
            loading=() if loading is None else (loading.base.source,),
            max_requests=self._max_requests,
            waiting=self._waiting,
            rows=self._rows,
            cache_bytes=self._cache_bytes,
            cache_limit_bytes=self._cache_limit_bytes,
            tokens_per_second=round(self._meter.per_second(time.monotonic()), 1),
        )

    def stop(self) -> None:
        """See Engine.stop."""
        self._stopping = True
        self._orders.put(None)

    def join(self, timeout_seconds: float) -> bool:
        """See Engine.join."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    # --- the engine's thread

    def _run(self) -> None:
        ending = _stopping()
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._take_orders()
                    self._arrange()
                    self._place()
                    self._move_all()
                    self._note_load()
        except Exception as error:  # the thread's boundary: without it requests would wait for ever
            ending = _as_rose_error(error)
            self._stopping = True
        for decoding in [*self._active, *self._deadlines]:
            self._close(decoding, ending)
        self._refuse_late_orders()

    def _take_orders(self) -> None:
        """Take in all that was ordered; wait for it when there is nothing else to do."""
        try:
            order = self._orders.get(timeout=None if self._active else IDLE_POLL_SECONDS, block=not self._active)
            while True:
                if isinstance(order, (Decoding, Scoring)):
                    self._deadlines[order] = time.monotonic() + self._patience_seconds
                elif isinstance(order, _Loaded):
                    self._take_loaded(order)
                order = self._orders.get_nowait()
        except queue.Empty:
            return

    def _refuse_late_orders(self) -> None:
        """Refuse what was submitted while the engine stopped."""
        with contextlib.suppress(queue.Empty):
            while True:
                order = self._orders.get_nowait()
                if isinstance(order, (Decoding, Scoring)):
                    self._close(order, _stopping())

    def _take_loaded(self, loaded: _Loaded) -> None:
        self._loading = None
        error = loaded.error
        if loaded.resident is not None:
            self._residents[loaded.resident.key] = loaded.resident
            error = self._put_on(loaded.resident, loaded.target, loaded.adapter)
            self._note_bases()
            if error is None:
                return
        if isinstance(error, NotEnoughMemory):
            if self._make_room():
                return  # the request still waits, so its model is loaded again
            if self._residents:
                error = EngineBusy(
                    f"{error.message} Other models are answering.",
                    code=NotEnoughMemory.default_code,
                    retry_after_seconds=20,
                )
        for decoding in [one for one in self._deadlines if _needs(one.target) == _needs(loaded.target)]:
            self._close(decoding, error)

    def _put_on(self, resident: Resident, target: Target, stored: StoredAdapter | None) -> RoseError | None:
        """Give a model the adapter that was read for it, between two steps; return why it cannot be done."""
        key = adapter_key(target)
        if stored is None or key is None:
            return None
        try:
            resident.runner.add_adapter(key, stored)
        except Exception as error:  # the boundary between one adapter and all requests; logged or passed on
            return _as_rose_error(error)
        log.info("loaded adapter %s of %s", key[:12], target.model)
        return None

    def _arrange(self) -> None:
        """Load for requests whose model is missing, start those whose model is there, drop what nobody needs."""
        for decoding in [one for one in self._deadlines if one.cancelled]:
            self._close(decoding)
        self._load_missing()
        may_start = self._may_start()
        for decoding, resident in list(may_start.items())[:MAX_STARTS]:
            self._start(decoding, resident)
        for decoding, deadline in list(self._deadlines.items()):
            if time.monotonic() > deadline and decoding not in may_start:
                self._close(decoding, self._not_in_time(decoding.target))
        self._drop_idle()

    def _start(self, decoding: Work, resident: Resident) -> None:
        del self._deadlines[decoding]
        self._active.append(decoding)
        try:
            decoding.start(resident)
        except Exception as error:  # the boundary between one request and all others; logged or passed on
            self._close(decoding, _as_rose_error(error))

    def _place(self) -> None:
        """Give rows their places while there is room: the project with the fewest rows first, then the oldest request.

        Who is next and finds no room keeps the room for itself that others leave: nobody small overtakes it for ever.
        """
        waiting = [work for work in self._active if work.unplaced]
        rows = Counter[str]()
        for work in self._active:
            rows[work.target.project] += work.rows()
        full: set[str] = set()
        while waiting:
            work = min(waiting, key=lambda one: rows[one.target.project])
            waiting.remove(work)
            resident = work.resident
            if resident is None or resident.key in full or work.cancelled:
                continue
            try:
                there = resident.runner.admit(work.unplaced)
            except Exception as error:  # as in _start: the device may have no memory after all
                self._close(work, _as_rose_error(error))
                continue
            if there:
                rows[work.target.project] += len(work.unplaced)
                work.unplaced = []
            else:
                full.add(resident.key)

    def _move_all(self) -> None:
        """Move the rows of every model on by one step."""
        for work in [one for one in self._active if one.cancelled]:
            self._close(work)
        for resident in list(self._residents.values()):
            of = {row: work for work in self._active if work.resident is resident for row in work.going()}
            if of and not self._stopping:
                self._move(resident, of)
        for work in list(self._active):
            if work.finish():
                self._close(work)

    def _move(self, resident: Resident, of: dict[Row, Work]) -> None:
        """Move rows of one model on; `of` says whose they are."""
        if self._before_step is not None:
            self._before_step()
        try:
            rows, logits = resident.runner.step(list(of))
            best = _largest(logits)
        except Exception as error:  # the boundary between one step and the engine; logged or passed on
            failed = _as_rose_error(error)
            for work in dict.fromkeys(of.values()):
                self._close(work, failed)
            return
        made = 0
        for number, row in enumerate(rows):
            work = of[row]
            if work.resident is None:  # closed by what came of another of its rows
                continue
            try:
                made += work.take(row, logits[number], best[number])
            except Exception as error:  # as in _start
                self._close(work, _as_rose_error(error))
        self._meter.add(time.monotonic(), made)

    def _note_load(self) -> None:
        runners = [resident.runner for resident in self._residents.values()]
        self._rows = sum(work.rows() for work in self._active)
        self._waiting = len(self._deadlines) + sum(bool(work.unplaced) for work in self._active)
        self._cache_bytes = sum(runner.cache_bytes() for runner in runners)
        self._cache_limit_bytes = sum(runner.cache_limit_bytes() for runner in runners)

    def _close(self, decoding: Work, error: RoseError | None = None) -> None:
        """Forget a request and its cache; with `error`, tell it."""
        self._deadlines.pop(decoding, None)
        if decoding in self._active:
            self._active.remove(decoding)
        if decoding.resident is not None:
            decoding.resident.touch(adapter_key(decoding.target))
            decoding.release()
        with self._counting:
            self._open -= 1
        if error is not None:
            decoding.fail(error)

    # --- models

    def _find(self, target: Target) -> Resident | None:
        """Return the model that `target` needs, if it is loaded; its adapter may still be missing."""
        if target.kind == "full":
            return self._residents.get(full_key(target.adapter)) if target.adapter else None
        if target.base.fingerprint:
            return self._residents.get(target.base.fingerprint)
        for resident in self._residents.values():
            located = resident.located
            same = located.source == target.base.source and target.base.revision in (None, located.revision)
            if same and resident.key == located.fingerprint:
                return resident
        return None

    def _ready(self, target: Target) -> Resident | None:
        resident = self._find(target)
        adapter = adapter_key(target)
        return resident if resident is not None and (adapter is None or adapter in resident.runner.adapters()) else None

    def _may_start(self) -> dict[Work, Resident]:
        """Return the waiting requests that may start, oldest first, and on which model."""
        found: dict[Work, Resident] = {}
        leaving: set[str] = set()
        for work in self._deadlines:
            resident = self._find(work.target)
            if resident is None:
                continue
            if self._ready(work.target) is None:
                leaving |= {resident.leaving} if resident.leaving else set()
            elif adapter_key(work.target) not in leaving:
                found[work] = resident
        return found

    def _load_missing(self) -> None:
        """Load for the oldest waiting request for which there is room: a base, or an adapter that gets a slot."""
        missing = [one.target for one in self._deadlines if self._ready(one.target) is None]
        if self._loading is not None:
            missing = [target for target in missing if _needs(target) != _needs(self._loading)]
        wanted: dict[str, Target] = {}
        for target in missing:
            resident = self._find(target)
            if resident is not None:
                wanted.setdefault(resident.key, target)
            elif self._loading is None:
                self._load(target, None)
        for key, resident in self._residents.items():
            if key not in wanted:
                resident.leaving = None
            elif self._loading is None and resident.make_slot(self._max_adapters, self._rows_before(wanted[key])):
                self._load(wanted[key], resident)

    def _rows_before(self, target: Target) -> Counter[str | None]:
        """Count by adapter the requests that go on, and those that wait longer than the first for `target`."""
        rows = Counter(adapter_key(work.target) for work in self._active)
        for work in self._deadlines:
            if work.target == target:
                break
            rows[adapter_key(work.target)] += 1
        return rows

    def _load(self, target: Target, resident: Resident | None) -> None:
        """Load what `target` needs in a thread of its own, an adapter for `resident`; one at a time."""
        self._loading = target

        def load() -> None:
            try:
                self._orders.put(_Loaded(target, *self._loader.load(target, resident)))
            except Exception as error:  # the thread's boundary: it goes to the log and to the requests that wait
                self._orders.put(_Loaded(target, error=_as_rose_error(error)))

        threading.Thread(target=load, name="loader", daemon=True).start()

    def _used(self) -> list[Target]:
        waiting = [decoding.target for decoding in self._deadlines]
        active = [decoding.target for decoding in self._active]
        return [*waiting, *active, *([self._loading] if self._loading else [])]

    def _unused(self) -> list[str]:
        """Return the keys of the models that no request needs, the longest unused first."""
        used = {resident.key for target in self._used() if (resident := self._find(target)) is not None}
        return sorted(self._residents.keys() - used, key=lambda key: self._residents[key].last_used)

    def _make_room(self) -> bool:
        """Drop the longest unused model; False when all are in use."""
        unused = self._unused()
        if unused:
            self._drop(unused[0])
        return bool(unused)

    def _drop_idle(self) -> None:
        for key in self._unused():
            if time.monotonic() - self._residents[key].last_used > self._idle_seconds:
                self._drop(key)

    def _drop(self, key: str) -> None:
        """Forget a model; nothing else refers to it, so its memory is free when this returns."""
        log.info("drop %s", self._residents[key].located.source)
        del self._residents[key]
        self._note_bases()
        gc.collect()  # a model's modules refer to each other in circles
        if self._loader.device.type == "cuda":
            torch.cuda.empty_cache()

    def _not_in_time(self, target: Target) -> RoseError:
        """Return what a request is told that waited too long for its model."""
        if self._find(target) is not None and self._loading is None:
            return EngineBusy(
                f"All {self._max_adapters} adapters that the engine keeps on {target.base.source!r} are answering.",
                retry_after_seconds=15,
            )
        return EngineBusy(
            f"The base {target.base.source!r} of '{target.model}' is still being loaded.",
            code="model_loading",
            retry_after_seconds=15,
        )

    def _note_bases(self) -> None:
        self._bases = tuple(
            LoadedBase(
                source=resident.located.source,
                fingerprint=resident.located.fingerprint,
                dtype=resident.dtype,
                adapters=tuple(resident.runner.adapters()),
                weights=resident.runner.weights,
                batched=resident.runner.batched,
                batch_invariant=resident.runner.batch_invariant,
            )
            for resident in self._residents.values()
        )


def _needs(target: Target) -> Target:
    """Return what has to be loaded for a target, whoever asks. By its name: a refusal tells it."""
    return msgspec.structs.replace(target, project="")


def _largest(logits: torch.Tensor) -> Sequence[tuple[float, int]]:
    """Return for each row of `logits` [rows, V] the largest one and its token."""
    if not logits.numel():
        return []
    values, ids = logits.max(dim=1)
    return list(zip(values.tolist(), ids.tolist(), strict=True))


def _stopping() -> RoseError:
    return EngineBusy("The inference engine is stopping.", code=STOPPING, retry_after_seconds=5)


def _as_rose_error(error: Exception) -> RoseError:
    """Return what a client may know of `error`; the log gets all of it."""
    if isinstance(error, RoseError):
        return error
    log.error("the engine failed", exc_info=error)
    if is_out_of_memory(error):
        return EngineBusy("The device has too little memory for this request now.", retry_after_seconds=5)
    return RoseError("The inference engine failed; its log has the details.", code="engine_error")
