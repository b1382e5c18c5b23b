"""Each process by itself: what it refuses, how it ends, and that it needs no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from rose import leases
from rose.log.pool import open_pool
from rose.settings import Settings, to_environment
from tests.eventually import eventually
from tests.in_own_loop import in_own_loop
from tests.local.rose_up import free_port

pytestmark = pytest.mark.timeout(300)
Make = Callable[..., Settings]
WITHOUT_TORCH = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'peft'))); "
    "from rose.app import main; sys.exit(main(sys.argv[1]))"
)


def environment(settings: Settings) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ROSE_")}
    return {**inherited, "ROSE_CONFIG": "/nonexistent", **to_environment(settings)}


def refused(kind: str, settings: Settings) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "rose.app", kind],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


@contextmanager
def process(kind: str, settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process without torch until it has announced itself; kill it at the end."""
    log = settings.data_dir / f"{kind}.log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_TORCH, kind], env=environment(settings), stdout=output, stderr=output
        )

    async def announced() -> None:
        pool = await open_pool(settings, min_size=1, max_size=1)
        try:

            async def there() -> bool:
                assert started.poll() is None, log.read_text()
                return started.pid in {worker.pid for worker in await leases.workers(pool, kind)}

            await eventually(there, 120)
        finally:
            await pool.close()

    try:
        in_own_loop(announced())
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()


@pytest.fixture
def given(settings: Make, database_dsn_for_processes: str) -> Settings:
    async def migrated() -> None:
        from rose.log.migrate import migrate

        await migrate(database_dsn_for_processes)

    in_own_loop(migrated())
    return settings(database_url=database_dsn_for_processes, port=free_port())


def test_full_collections_become_rare_and_garbage_is_still_collected() -> None:
    program = """
import gc, weakref
from rose.http_server import FULL_COLLECTION_AFTER, spare_full_collections
class Node: pass
kept = [[] for _ in range(1000)]
spare_full_collections()
assert gc.isenabled() and gc.get_freeze_count() > 1000
assert gc.get_threshold()[:2] == (700, 10) and gc.get_threshold()[2] == FULL_COLLECTION_AFTER
node = Node(); node.itself = node; gone = weakref.ref(node); del node
made = []
for _ in range(20):
    made.append([[] for _ in range(700)])
assert gone() is None
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_database_it_says_how_to_get_one(settings: Make) -> None:
    status, said = refused("projections", settings())
    assert status == 7
    assert "There is no database" in said
    assert "rose up" in said
    assert "Traceback" not in said


def test_an_unknown_service_is_a_usage_error(settings: Make) -> None:
    status, said = refused("apis", settings())
    assert status == 2
    assert "api, projections, trainer, inference" in said


def test_an_open_door_without_keys_is_refused(given: Settings, settings: Make) -> None:
    status, said = refused("api", settings(database_url=given.database_url, host="0.0.0.0", port=free_port()))
    assert status == 2
    assert "ROSE_API_KEYS" in said


@pytest.mark.parametrize("kind", ["api", "projections", "trainer"])
def test_it_runs_without_torch_and_ends_at_a_signal(kind: str, given: Settings) -> None:
    with process(kind, given) as running:
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 0

    async def left() -> list[leases.Worker]:
        pool = await open_pool(given, min_size=1, max_size=1)
        try:
            return await leases.workers(pool, kind)
        finally:
            await pool.close()

    assert in_own_loop(left()) == [], "it took its leave"


def test_two_apis_on_one_port_is_a_sentence(given: Settings) -> None:
    with process("api", given):
        status, said = refused("api", given)
    assert status == 7
    assert f"Port {given.port} on 127.0.0.1 cannot be used" in said


def test_a_stop_signal_ends_open_event_streams_at_once(given: Settings, tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    with process("api", given) as running:
        with httpx2.Client(base_url=given.url, trust_env=False, timeout=60) as client:
            file = client.post("/v1/files", files={"file": ("a.jsonl", line)}, data={"purpose": "fine-tune"}).json()
            job = client.post("/v1/fine_tuning/jobs", json={"training_file": file["id"], "model": "tiny"}).json()
            with client.stream("GET", f"/v1/fine_tuning/jobs/{job['id']}/events", params={"stream": "true"}) as stream:
                lines = stream.iter_lines()
                assert next(lines).startswith("id:")
                running.send_signal(signal.SIGTERM)
                rest = list(lines)
        assert running.wait(timeout=60) == 0
    assert "data: [DONE]" not in rest, "the job has not ended, so a client comes back"
    assert "timeout graceful shutdown exceeded" not in (given.data_dir / "api.log").read_text()


def test_on_windows_it_points_to_wsl() -> None:
    code = "import sys; sys.platform = 'win32'; import rose.local"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "On Windows use WSL" in done.stderr
