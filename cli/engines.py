"""The lines in which `rose status` shows the inference engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from rose.inference.generation import EngineStatus, LoadedBase
from rose.leases import Worker


def engine_lines(workers: Sequence[Worker]) -> Iterator[str]:
    """Yield what each engine does and has loaded, as it announced it, at most a few seconds ago."""
    for worker in workers:
        status = _status(worker)
        yield f"engine {worker.url} (process {worker.pid} on {worker.host})"
        if status is not None:
            yield f"  {', '.join(_does(status))}"
            yield from (f"  loading {source}" for source in status.loading)
            yield from (f"  {_has(base)}" for base in status.bases)


def facts(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Return the same for `--json`."""
    return [{"url": one.url, "host": one.host, "pid": one.pid, **one.capabilities} for one in workers]


def _status(worker: Worker) -> EngineStatus | None:
    """Return what an engine has announced, None when it is none of ours."""
    try:
        return msgspec.convert(worker.capabilities, EngineStatus)
    except msgspec.ValidationError:
        return None


def _does(status: EngineStatus) -> Iterator[str]:
    yield f"{status.active_requests} of {status.max_requests} requests"
    yield f"{status.waiting} waiting"
    yield f"{status.rows} row{'' if status.rows == 1 else 's'}"
    yield f"{status.tokens_per_second:.1f} tokens/s"
    limit = f" of {_mib(status.cache_limit_bytes)}" if status.cache_limit_bytes else ""
    yield f"cache {_mib(status.cache_bytes)}{limit}"
    yield status.device
    if status.threads:
        yield f"{status.threads} thread{'' if status.threads == 1 else 's'}"


def _has(base: LoadedBase) -> str:
    adapters = len(base.adapters)
    return ", ".join(
        (
            f"{base.source}: {adapters} adapter{'' if adapters == 1 else 's'}",
            f"weights {base.weights}",
            "batched" if base.batched else "one request at a time",
            "the same bits in every batch" if base.batch_invariant else "not batch-invariant",
        )
    )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
