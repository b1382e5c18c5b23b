"""One `rose up` per data folder, and everybody else finds it."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable

import msgspec
import pytest

from rose.errors import InvalidState, Unavailable
from rose.local import ports, state
from rose.settings import Settings

Make = Callable[..., Settings]


def running(settings: Settings) -> state.Running:
    return state.Running(
        pid=os.getpid(), url="http://127.0.0.1:8004", data_dir=str(settings.data_dir), started_at="2026-01-01T00:00:00"
    )


def test_a_second_start_is_told_where_the_first_one_answers(settings: Make) -> None:
    given = settings()
    with state.hold(given):
        state.store(given, running(given))
        with pytest.raises(InvalidState) as refused, state.hold(given):
            raise AssertionError("held twice")
    assert f"answers at http://127.0.0.1:8004 (process {os.getpid()})" in refused.value.message
    assert refused.value.exit_code == 5


def test_nothing_counts_once_the_lock_is_gone(settings: Make) -> None:
    given = settings()
    with state.hold(given):
        state.store(given, running(given))
        assert state.status(given) == running(given)
        assert state.held(given)
    assert not state.held(given)
    state.store(given, running(given))  # as a killed one leaves it
    assert state.status(given) is None
    assert state.down(given) is False


def test_addresses_are_filled_in_from_the_running_one_and_are_private(settings: Make) -> None:
    given = settings()
    stored = state.Connection(database_url="postgresql:///rose?host=/run", nats_url="nats://x:1", nats_token="secret")
    with state.hold(given):
        state.store(given, stored)
        found = state.connection(given)
        path = given.data_dir / "connection.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (found.database_url, found.nats_url, found.nats_token) == msgspec.structs.astuple(stored)
        other = state.connection(settings(database_url="postgresql://elsewhere/rose"))
        assert (other.database_url, other.nats_url) == ("postgresql://elsewhere/rose", None)
    with pytest.raises(Unavailable, match="There is no database"):
        state.connection(given)


def test_a_taken_port_names_who_has_it_and_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port: int = taken.getsockname()[1]
        with pytest.raises(Unavailable) as refused:
            ports.listen("127.0.0.1", port)
    assert f"(process {os.getpid()}) has it" in refused.value.message
    assert f"rose up --port {port + 1}" in (refused.value.hint or "")
    ports.listen("127.0.0.1", port).close()


def test_a_host_that_is_not_here_is_a_sentence() -> None:
    with pytest.raises(Unavailable, match=r"192\.0\.2\.1"):
        ports.listen("192.0.2.1", 8004)
