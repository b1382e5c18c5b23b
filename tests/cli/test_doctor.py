"""The doctor: for each of its lines that thing is broken, the line fails, and it names what mends it.

What is not installed is seen in tests/acceptance/test_bare_wheel.py, in an environment without it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.commands import doctor
from rose import leases
from rose.log.pool import Pool
from rose.settings import DEFAULT_ALIASES, Settings
from tests.cli.conftest import Done, call

pytestmark = pytest.mark.anyio

Findings = dict[str, dict[str, Any]]


@pytest.fixture
def environment(settings: Callable[..., Settings], tmp_path: Path) -> dict[str, str]:
    """A private data folder, no aliases but one that is right, a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"ROSE_CONFIG": str(tmp_path), "ROSE_DATA_DIR": str(settings().data_dir), "ROSE_PORT": str(port)}


async def examine(environment: dict[str, str]) -> tuple[Done, Findings]:
    """Run the doctor and return its findings by name."""
    done = await call("doctor", "--json", environment=environment)
    return done, {one["name"]: one for one in msgspec.json.decode(done.out)}


async def test_a_good_machine_passes_and_warns_of_what_is_still_to_come(environment: dict[str, str]) -> None:
    done, findings = await examine({**environment, "ROSE_MODEL_ALIASES": "mine=tiny"})
    assert done.status == 0
    warned = {name for name, one in findings.items() if one["verdict"] == "warn"}
    assert {one["verdict"] for name, one in findings.items() if name not in warned} == {"ok"}
    assert warned <= {"database", *(f"model {alias}" for alias in DEFAULT_ALIASES)}
    assert "rose up" in findings["database"]["mend"]
    assert "is built before its first job" in findings["model mine"]["text"]
    plain = await call("doctor", environment=environment)
    assert plain.out.splitlines()[-1] == "Everything that ROSE needs is there."


async def test_a_python_that_is_too_old_is_named(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No older one can be had here, so the bound is moved above this one."""
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    done, findings = await examine(environment)
    assert done.status == 1
    assert findings["python"]["verdict"] == "fail"
    assert "is too old" in findings["python"]["text"]
    assert findings["python"]["mend"] == "use Python 3.11 or newer"


async def test_each_broken_thing_is_named_with_what_mends_it(environment: dict[str, str], tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    (tmp_path / "a file").touch()
    aliases = {"mine": "/no/such/folder", "other": "nothing", "a": "b", "b": "a", "far": "nobody/knows-this"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        broken = {
            "ROSE_DATA_DIR": str(tmp_path / "a file" / "x"),
            "ROSE_MIN_FREE_BYTES": str(1 << 60),
            "ROSE_PORT": str(taken.getsockname()[1]),
            "ROSE_MODEL_ALIASES": msgspec.json.encode(aliases).decode(),
            "ROSE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x",
            "ROSE_HUB_OFFLINE": "1",
        }
        mends = {
            "data folder": "ROSE_DATA_DIR",
            "space": "rose models delete",
            "address": "rose up --port",
            "model mine": "ROSE_MODEL_ALIASES=mine=",
            "model other": "ROSE_MODEL_ALIASES=other=",
            "model a": "ROSE_MODEL_ALIASES",
            "model far": "rose models pull far",
            "database": "ROSE_DATABASE_URL",
        }
        await assert_named({**environment, **broken}, mends)
    await assert_named({**environment, "ROSE_PORT": "many"}, {"settings": "setting"})
    await assert_named({**environment, "ROSE_DATA_DIR": str(open_folder)}, {"data folder": f"chmod go-w {open_folder}"})


async def assert_named(environment: dict[str, str], mends: dict[str, str]) -> None:
    """Fail unless each of these lines fails and says what mends it."""
    done, findings = await examine(environment)
    assert done.status == 1
    for name, mend in mends.items():
        assert findings[name]["verdict"] == "fail", (name, findings[name])
        assert mend in findings[name]["mend"], (name, findings[name])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's Postgres runs under another account")
async def test_a_folder_that_roots_postgres_cannot_reach_is_named(
    environment: dict[str, str], private_folder: Path
) -> None:
    await assert_named(
        {**environment, "ROSE_DATA_DIR": str(private_folder / "data")}, {"data folder": f"chmod o+x {private_folder}"}
    )


async def test_a_model_that_is_still_at_the_hub_is_a_warning(environment: dict[str, str]) -> None:
    aliases = {"ROSE_MODEL_ALIASES": "far=nobody/knows-this", "ROSE_HUB_OFFLINE": "0", "HF_HUB_OFFLINE": "0"}
    _, findings = await examine({**environment, **aliases})
    assert findings["model far"]["verdict"] == "warn"
    assert "rose models pull far" in findings["model far"]["mend"]


async def test_an_empty_database_needs_its_migrations(environment: dict[str, str], empty_database_dsn: str) -> None:
    done, findings = await examine({**environment, "ROSE_DATABASE_URL": empty_database_dsn})
    assert done.status == 1
    assert (findings["database"]["verdict"], findings["database"]["mend"]) == ("fail", "rose db migrate")
    migrated = await call("db", "migrate", environment={**environment, "ROSE_DATABASE_URL": empty_database_dsn})
    assert migrated.status == 0, migrated.err
    _, findings = await examine({**environment, "ROSE_DATABASE_URL": empty_database_dsn})
    assert findings["database"]["verdict"] == "ok"


async def test_processes_and_nats_that_are_missing_are_named(
    environment: dict[str, str], database_dsn: str, pool: Pool, nats_url: str
) -> None:
    environment = {**environment, "ROSE_DATABASE_URL": database_dsn, "ROSE_NATS_URL": "nats://127.0.0.1:1"}
    done, findings = await examine(environment)
    assert done.status == 1
    for kind in ("trainer", "inference", "projections"):
        assert findings[kind]["verdict"] == "fail"
        assert f"rose serve {kind}" in findings[kind]["mend"]
    assert findings["events"]["verdict"] == "fail"
    assert "ROSE_NATS_URL" in findings["events"]["mend"]
    for kind in ("trainer", "inference", "projections"):
        worker = leases.Worker(id=f"{kind}_x", kind=kind, host="here", url=None, capabilities={}, pid=1)
        await leases.announce(pool, worker)
    done, findings = await examine({**environment, "ROSE_NATS_URL": nats_url})
    assert done.status == 0, done.out
    assert {findings[name]["verdict"] for name in ("trainer", "inference", "projections", "events")} == {"ok"}


async def test_something_else_in_the_place_of_nats_is_named(
    environment: dict[str, str], database_dsn: str, api_settings: Settings
) -> None:
    import threading

    def greet(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"220 mail.example.org ESMTP\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, args=(server,), daemon=True).start()
        url = f"nats://127.0.0.1:{server.getsockname()[1]}"
        _, findings = await examine({**environment, "ROSE_DATABASE_URL": database_dsn, "ROSE_NATS_URL": url})
    assert findings["events"]["verdict"] == "fail"
    assert "is no NATS" in findings["events"]["text"]
