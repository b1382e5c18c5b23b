"""The embedded Postgres: any folder, any leftover, and a sentence where it cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import asyncpg
import psutil
import pytest

from rose.errors import Unavailable
from rose.local import account, postgres, processes
from rose.local.postgres import Postgres
from tests.in_own_loop import in_own_loop
from tests.services import Server

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to drop its rights")


def query(service: Postgres, text: str) -> object:
    async def ask() -> object:
        connection = await asyncpg.connect(service.dsn(), timeout=10)
        try:
            return await connection.fetchval(text)
        finally:
            await connection.close()

    return in_own_loop(ask())


def test_data_survives_a_stop_and_a_crash(private_folder: Path) -> None:
    server = Server(Postgres(private_folder))
    try:
        server.start()
        query(server.service, "create table kept as select 1 as n")
        server.stop()
        assert not server.service.answers()
        server.start()
        query(server.service, "insert into kept values (2)")
        server.kill()
        server.start()
        assert query(server.service, "select sum(n) from kept") == 3
    finally:
        server.stop()


def test_only_the_owner_reaches_it_and_only_by_its_socket(private_folder: Path) -> None:
    server = Server(Postgres(private_folder))
    try:
        server.start()
        assert query(server.service, "show listen_addresses") == ""
        assert server.service.socket.stat().st_mode & 0o777 == 0o700
        assert server.service.data.stat().st_mode & 0o777 == 0o700
        listening = psutil.Process(server.process.pid).net_connections(kind="inet")
        assert not [one for one in listening if one.status == psutil.CONN_LISTEN]
    finally:
        server.stop()


def test_a_long_path_gets_a_short_private_socket_folder(private_folder: Path) -> None:
    deep = private_folder / ("long-" * 20)
    private_folder.chmod(0o711)
    server = Server(Postgres(deep))
    try:
        server.start()
        assert len(os.fsencode(server.service.socket)) <= postgres.LONGEST_SOCKET_PATH
        assert server.service.sockets.stat().st_mode & 0o777 == 0o700
        assert query(server.service, "select 1") == 1
        assert Postgres(deep).socket == server.service.socket, "the next start must find it again"
    finally:
        server.stop()
        shutil.rmtree(server.service.sockets)


def test_a_socket_folder_of_somebody_else_is_refused(private_folder: Path) -> None:
    service = Postgres(private_folder)
    (private_folder / "elsewhere").mkdir()
    service.sockets.symlink_to(private_folder / "elsewhere")
    with pytest.raises(Unavailable, match="belongs to somebody else"):
        service.prepare()


@pytest.mark.parametrize("suspended", [False, True], ids=["running", "suspended"])
def test_a_leftover_is_found_and_stopped(private_folder: Path, suspended: bool) -> None:
    server = Server(Postgres(private_folder))
    server.start()
    pid = server.process.pid
    if suspended:
        server.suspend()
    later = Server(Postgres(private_folder))
    try:
        later.start()
        server.process.wait(timeout=10)
        assert later.process.pid != pid
        assert query(later.service, "select 1") == 1
    finally:
        later.stop()


def test_a_leftover_without_its_socket_file_is_found(private_folder: Path) -> None:
    server = Server(Postgres(private_folder))
    server.start()
    server.service.socket.unlink()
    try:
        assert Postgres(private_folder).stop_leftover()
        server.process.wait(timeout=10)
    finally:
        server.stop()


def test_a_stale_pid_file_that_names_a_stranger_does_not_matter(private_folder: Path) -> None:
    service = Postgres(private_folder)
    service.prepare()
    owner = service.account
    stranger = subprocess.Popen(
        ["sleep", "600"], **({"user": owner.uid, "group": owner.gid, "extra_groups": []} if owner else {})
    )
    pid_file = service.data / "postmaster.pid"
    pid_file.write_text(f"{stranger.pid}\n{service.data}\n")
    if owner:
        os.chown(pid_file, owner.uid, owner.gid)
    server = Server(service)
    try:
        server.start()
        assert query(service, "select 1") == 1
        assert stranger.poll() is None, "a stranger must be left alone"
    finally:
        server.stop()
        stranger.kill()
        stranger.wait()


def test_a_half_made_cluster_is_made_anew(private_folder: Path) -> None:
    service = Postgres(private_folder)
    (private_folder / "postgres.new").mkdir()
    (private_folder / "postgres.new" / "PG_VERSION").write_text("18\n")
    service.prepare()
    assert (service.data / "global" / "pg_control").exists()
    assert not (private_folder / "postgres.new").exists()


def test_data_of_another_major_version_is_refused_with_the_way_out(private_folder: Path) -> None:
    service = Postgres(private_folder)
    service.data.mkdir()
    (service.data / "PG_VERSION").write_text("16\n")
    with pytest.raises(Unavailable) as refused:
        service.prepare()
    assert "written by Postgres 16; this ROSE runs Postgres 18" in refused.value.message
    assert f"mv {service.data} {service.data}-16" in (refused.value.hint or "")


@only_root
def test_a_folder_below_a_closed_one_is_refused_and_nothing_is_opened(private_folder: Path) -> None:
    with pytest.raises(Unavailable) as refused:
        Postgres(private_folder / "data").prepare()
    assert f"lies below {private_folder}, which only root can enter" in refused.value.message
    assert private_folder.stat().st_mode & 0o777 == 0o700


@only_root
def test_binaries_that_the_account_cannot_reach_are_copied(
    private_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = postgres.packaged_binaries()
    site = tmp_path / "closed"
    shutil.copytree(real.parent, site / postgres.PACKAGE / real.parent.name, symlinks=True)
    shutil.copytree(real.parents[2] / f"{postgres.PACKAGE}.libs", site / f"{postgres.PACKAGE}.libs", symlinks=True)
    site.chmod(0o700)
    closed = site / postgres.PACKAGE / real.parent.name / "bin"
    monkeypatch.setattr(postgres, "packaged_binaries", lambda: closed)
    (private_folder / "postgres-binaries-0.1").mkdir()
    server = Server(Postgres(private_folder))
    try:
        server.start()
        assert server.service.bin.is_relative_to(private_folder)
        assert len(list(private_folder.glob("postgres-binaries-*"))) == 1, "those of an older version are gone"
        assert psutil.Process(server.process.pid).exe().startswith(str(private_folder))
        assert query(server.service, "select 1") == 1
    finally:
        server.stop()


@only_root
def test_as_root_it_runs_as_an_account_without_rights(private_folder: Path) -> None:
    server = Server(Postgres(private_folder))
    try:
        server.start()
        process = psutil.Process(server.process.pid)
        assert process.username() in account.CANDIDATES
        assert private_folder.stat().st_mode & 0o777 == 0o711
    finally:
        server.stop()


def test_nobody_listens_on_a_missing_socket(private_folder: Path) -> None:
    assert processes.listener(private_folder / "nothing") is None
