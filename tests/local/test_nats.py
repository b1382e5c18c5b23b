"""The embedded nats-server: private token, JetStream that syncs, leftovers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rose.bus import Bus, StreamSettings
from rose.local.nats import Nats
from rose.subjects import Message
from tests.services import NatsServer

pytestmark = pytest.mark.anyio
Factory = Callable[[], NatsServer]


async def test_only_the_token_opens_it(nats_server: Factory) -> None:
    server = nats_server()
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
    async with Bus(server.url.replace("rose:", "rose:guessed")) as bus:
        assert not await bus.wait_connected(2)


def test_what_it_keeps_is_private(nats_server: Factory) -> None:
    folder = nats_server().service.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("token", "system_password", "nats.conf", "readers.conf"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_every_message_is_synced_before_it_is_acknowledged(nats_server: Factory) -> None:
    assert "sync_interval: always" in nats_server().service.configuration.read_text()


def test_token_and_port_stay_the_same_over_a_stop(nats_server: Factory) -> None:
    server = nats_server()
    before = server.url
    server.stop()
    server.start()
    assert server.url == before


async def test_what_was_kept_before_there_were_accounts_goes_on(nats_server: Factory) -> None:
    server = nats_server()
    stream = StreamSettings(name="TRY", subjects=("try.>",))
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
        await bus.create_stream(stream, first_sequence=7, metadata={"made": "before"})
        await bus.publish(Message(subject="try.1", body=b"kept", headers={}))
        await bus.create_consumer("TRY", "somebody", filter_subject="try.>")
    server.stop()
    kept = server.service.folder / "jetstream"
    (kept / "ROSE").rename(kept / "$G")
    for name in ("readers.conf", "system_password"):
        (server.service.folder / name).unlink()
    server.start()
    async with Bus(server.url) as bus:
        assert await bus.wait_connected(30)
        facts = await bus.stream("TRY")
        assert facts is not None
        assert (facts.last_sequence, facts.metadata["made"]) == (7, "before")
        assert await bus.consumers("TRY") == {"somebody"}


@pytest.mark.parametrize("suspended", [False, True], ids=["running", "suspended"])
def test_a_leftover_is_stopped_first(private_folder: Path, suspended: bool) -> None:
    left = NatsServer(Nats(private_folder))
    left.start()
    assert left.process is not None
    if suspended:
        left.suspend()
    later = NatsServer(Nats(private_folder))
    try:
        later.start()
        left.process.wait(timeout=10)
        assert later.service.answers()
    finally:
        later.stop()


def test_another_program_on_its_old_port_is_left_alone(private_folder: Path, nats_server: Factory) -> None:
    stranger = nats_server()
    server = NatsServer(Nats(private_folder))
    server.service.prepare()
    (server.service.folder / "port").write_text(stranger.url.rsplit(":", 1)[1])
    try:
        server.start()
        assert server.url != stranger.url
        assert stranger.service.answers()
    finally:
        server.stop()


def test_it_ends_with_whoever_started_it(private_folder: Path) -> None:
    code = (
        "import subprocess, sys; from pathlib import Path; from tests.services import NatsServer; "
        "from rose.local.nats import Nats; s = NatsServer(Nats(Path(sys.argv[1]))); s.start(); "
        "print(s.process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(private_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    with parent.stdin, parent.stdout:
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
    server.wait(10)
