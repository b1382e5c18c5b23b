"""What `rose status` says about engines: those of services that run apart, and where nothing runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rose import leases
from rose.inference.generation import EngineStatus, LoadedBase
from rose.log.pool import Pool
from tests.cli.conftest import call

pytestmark = pytest.mark.anyio

BASE = LoadedBase(
    source="smollm2", fingerprint="f" * 64, dtype="float32", adapters=("a", "b"), weights="fp16", batched=True
)
STATUS = EngineStatus(
    device="cpu",
    active_requests=12,
    bases=(BASE, msgspec.structs.replace(BASE, source="tiny", adapters=("a",), batched=False, batch_invariant=True)),
    loading=("qwen",),
    max_requests=64,
    waiting=3,
    rows=9,
    cache_bytes=300 << 20,
    cache_limit_bytes=2 << 30,
    tokens_per_second=71.25,
    threads=1,
)


@pytest.fixture
def environment(database_dsn: str, tmp_path: Path) -> dict[str, str]:
    return {"ROSE_DATABASE_URL": database_dsn, "ROSE_DATA_DIR": str(tmp_path)}


async def announce(pool: Pool, capabilities: dict[str, object]) -> None:
    worker = leases.Worker(
        id="inference_a", kind="inference", host="here", url="http://127.0.0.1:5", capabilities=capabilities, pid=7
    )
    await leases.announce(pool, worker)


async def test_an_engine_shows_what_it_does_and_has(pool: Pool, environment: dict[str, str]) -> None:
    await announce(pool, msgspec.to_builtins(STATUS))
    done = await call("status", environment=environment)
    assert done.status == 0, done.err
    assert done.out.splitlines() == [
        "The services at ROSE_DATABASE_URL:",
        "  inference   process 7 on here",
        "engine http://127.0.0.1:5 (process 7 on here)",
        "  12 of 64 requests, 3 waiting, 9 rows, 71.2 tokens/s, cache 300 MiB of 2048 MiB, cpu, 1 thread",
        "  loading qwen",
        "  smollm2: 2 adapters, weights fp16, batched, not batch-invariant",
        "  tiny: 1 adapter, weights fp16, one request at a time, the same bits in every batch",
    ]
    [engine] = msgspec.json.decode((await call("status", "--json", environment=environment)).out)["engines"]
    assert (engine["url"], engine["rows"], engine["cache_limit_bytes"]) == ("http://127.0.0.1:5", 9, 2 << 30)


async def test_another_engine_is_only_named(pool: Pool, environment: dict[str, str]) -> None:
    await announce(pool, {"model": "theirs"})
    done = await call("status", environment=environment)
    assert done.out.splitlines()[-1] == "engine http://127.0.0.1:5 (process 7 on here)"


async def test_where_nothing_runs_it_says_so(environment: dict[str, str]) -> None:
    done = await call("status", environment=environment)
    assert (done.status, done.out) == (7, "No service is there. Start them: rose serve\n")
    away = {**environment, "ROSE_DATABASE_URL": "postgresql://127.0.0.1:1/nowhere"}
    done = await call("status", environment=away)
    assert done.status == 7
    assert "Postgres does not answer" in done.out
