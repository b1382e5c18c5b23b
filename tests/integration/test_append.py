"""rose.append on a real Postgres: positions, versions, several streams, commands, names and refusals."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import uuid4

import anyio
import msgspec
import pytest

from rose.domain import files, job_commands, jobs
from rose.errors import Conflict, InvalidRequest, RoseError, Unavailable
from rose.ids import new_id
from rose.log.append import Appended, EntityRow, ModelNameTaken, StreamWrite, UnreadableEvent, append
from rose.log.pool import Pool, open_pool
from rose.log.read import find_command, find_request, head, load_row, read_all, read_stream
from tests.checker import check_log
from tests.eventually import eventually
from tests.integration.proxy import answer_losing_proxy
from tests.integration.writes import (
    ACTOR,
    ARTIFACT,
    claim,
    create_command,
    created_job,
    file_write,
    job_write,
    load_job,
    queued_job,
    steps,
    tell,
)

pytestmark = pytest.mark.anyio

WRITERS = 20
ROUNDS = 10
KILL_ONE = """
select pg_terminate_backend(pid) from (
    select pid from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
    order by random() limit 1
)
"""


async def put(pool: Pool, *writes: StreamWrite, command_id: str | None = None) -> Appended:
    return await append(pool, writes, command_id=command_id or str(uuid4()), actor=ACTOR)


async def test_an_append_is_read_back(pool: Pool) -> None:
    write = file_write("file_a")
    appended = await append(pool, [write], command_id="c1", actor=ACTOR)
    assert (appended.position, appended.replayed) == (1, False)
    (event,) = await read_stream(pool, "file/file_a")
    assert (event.position, event.version, event.type, event.schema) == (1, 1, "file.uploaded", 2)
    assert event.event == write.events[0]
    assert event.metadata == {
        "actor": {"kind": "system", "name": "test"},
        "request_id": "req_1",
        "command_id": "c1",
    }
    assert event.recorded_at.tzinfo is not None
    found = await load_row(pool, "files", "file_a")
    assert found is not None
    assert found[1] == 1
    assert write.row is not None
    assert msgspec.json.decode(found[0]) == msgspec.json.decode(write.row.doc)


async def test_concurrent_appends_to_own_streams_leave_no_gap(pool: Pool, database_dsn: str) -> None:
    positions: list[int] = []

    async def write_files() -> None:
        for _ in range(ROUNDS):
            positions.append((await put(pool, file_write())).position)

    async with anyio.create_task_group() as tasks:
        for _ in range(WRITERS):
            tasks.start_soon(write_files)
    assert sorted(positions) == list(range(1, WRITERS * ROUNDS + 1))
    assert [event.position for event in await read_all(pool, after_position=0, limit=1000)] == sorted(positions)
    assert await check_log(database_dsn) == []


async def test_concurrent_appends_to_one_stream_give_each_version_once(pool: Pool, database_dsn: str) -> None:
    job_id = await queued_job(pool)
    first = (await load_row(pool, "jobs", job_id) or (b"", 0))[1]
    conflicts = 0

    async def pause_and_resume() -> None:
        nonlocal conflicts
        for _ in range(ROUNDS):
            while True:
                found = await load_row(pool, "jobs", job_id)
                assert found is not None
                state = msgspec.json.decode(found[0], type=jobs.JobState)
                command = job_commands.ResumeJob(at=1) if state.status == "paused" else job_commands.PauseJob(at=1)
                write, _ = job_write(job_id, state, found[1], command)
                try:
                    await put(pool, write)
                    break
                except Conflict:
                    conflicts += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(WRITERS):
            tasks.start_soon(pause_and_resume)
    events = await read_stream(pool, f"job/{job_id}")
    assert [event.version for event in events] == list(range(1, first + WRITERS * ROUNDS + 1))
    assert conflicts > 0
    assert await check_log(database_dsn) == []


async def test_concurrent_births_of_one_stream_succeed_once(pool: Pool, database_dsn: str) -> None:
    outcomes: list[str] = []

    async def give_birth() -> None:
        try:
            await put(pool, file_write("file_same"))
            outcomes.append("born")
        except Conflict:
            outcomes.append("conflict")

    async with anyio.create_task_group() as tasks:
        for _ in range(WRITERS):
            tasks.start_soon(give_birth)
    assert sorted(outcomes) == ["born"] + ["conflict"] * (WRITERS - 1)
    assert await check_log(database_dsn) == []


async def test_several_streams_are_written_together_or_not_at_all(pool: Pool, database_dsn: str) -> None:
    job_id = new_id("ftjob_")
    birth, _ = job_write(job_id, jobs.initial, 0, create_command(job_id))
    appended = await put(pool, birth, file_write("file_b"))
    assert appended.position == 2
    assert [event.stream_id for event in await read_all(pool, after_position=0)] == [f"job/{job_id}", "file/file_b"]
    other = new_id("ftjob_")
    second, _ = job_write(other, jobs.initial, 0, create_command(other))
    with pytest.raises(Conflict, match="file/file_b is at version 1, not 0"):
        await put(pool, second, file_write("file_b"))
    assert await load_row(pool, "jobs", other) is None
    assert await head(pool) == 2
    assert await check_log(database_dsn) == []


async def test_appends_that_cross_their_streams_do_not_deadlock(pool: Pool, database_dsn: str) -> None:
    first, second = await created_job(pool), await created_job(pool)
    accepted = 0

    async def cross(order: tuple[str, str]) -> None:
        nonlocal accepted
        for _ in range(ROUNDS):
            loaded = {job_id: await load_row(pool, "jobs", job_id) for job_id in order}
            writes = [
                StreamWrite(
                    stream_id=f"job/{job_id}",
                    expected_version=found[1],
                    events=(jobs.JobQueued(reason="resumed"),),
                    row=None,
                )
                for job_id, found in loaded.items()
                if found is not None
            ]
            try:
                await put(pool, *writes)
                accepted += 1
            except Conflict:
                continue

    async with anyio.create_task_group() as tasks:
        for number in range(WRITERS):
            tasks.start_soon(cross, (first, second) if number % 2 else (second, first))
    deadlocks = await pool.fetchval("select deadlocks from pg_stat_database where datname = current_database()")
    assert deadlocks == 0
    assert accepted > 0


async def test_the_same_command_id_gives_the_same_answer(pool: Pool) -> None:
    write = file_write()
    first = await append(pool, [write], command_id="key", request_hash="h", response=b'{"n": 1}', actor=ACTOR)
    again = await append(pool, [file_write()], command_id="key", request_hash="h", response=b"other", actor=ACTOR)
    assert again == Appended(position=first.position, replayed=True, response=b'{"n": 1}')
    assert await head(pool) == 1


async def test_the_same_command_id_sent_at_once_is_accepted_once(pool: Pool, database_dsn: str) -> None:
    answers: list[Appended] = []

    async def send(number: int) -> None:
        response = str(number).encode()
        answers.append(
            await append(pool, [file_write()], command_id="key", request_hash="h", response=response, actor=ACTOR)
        )

    async with anyio.create_task_group() as tasks:
        for number in range(WRITERS):
            tasks.start_soon(send, number)
    assert [answer.replayed for answer in answers].count(False) == 1
    assert len({answer.response for answer in answers}) == 1
    assert await head(pool) == 1
    assert await check_log(database_dsn) == []


async def test_a_command_id_of_another_request_is_refused(pool: Pool) -> None:
    await append(pool, [file_write()], command_id="key", request_hash="h", actor=ACTOR)
    with pytest.raises(InvalidRequest) as caught:
        await append(pool, [file_write()], command_id="key", request_hash="other", actor=ACTOR)
    assert caught.value.code == "idempotency_key_reused"
    assert await head(pool) == 1


async def test_a_refused_command_leaves_nothing_and_may_be_tried_again(pool: Pool) -> None:
    await put(pool, file_write("file_a"))
    with pytest.raises(Conflict):
        await put(pool, file_write("file_a"), command_id="key")
    assert await find_command(pool, "key") is None
    assert not (await put(pool, file_write("file_b"), command_id="key")).replayed


async def test_an_equal_request_is_found_for_a_while(pool: Pool) -> None:
    await append(pool, [file_write()], command_id="a", request_hash="h", response=b"1", actor=ACTOR)
    await append(pool, [file_write()], command_id="b", request_hash="h", response=b"2", actor=ACTOR)
    found = await find_request(pool, "h")
    assert found is not None
    assert (found.command_id, found.response, found.position) == ("b", b"2", 2)
    assert await find_request(pool, "unknown") is None
    assert await find_request(pool, "h", within_seconds=0) is None


async def test_a_model_name_is_reserved_by_one_job(pool: Pool) -> None:
    first, second = new_id("ftjob_"), new_id("ftjob_")
    await put(pool, job_write(first, jobs.initial, 0, create_command(first, "taken"))[0])
    with pytest.raises(ModelNameTaken) as caught:
        await put(pool, job_write(second, jobs.initial, 0, create_command(second, "taken"))[0])
    assert "taken" in caught.value.message
    await put(pool, job_write(second, jobs.initial, 0, create_command(second, "free"))[0])
    assert (await load_job(pool, second)).model_name == "free"


async def test_entity_rows_know_when_they_were_born(pool: Pool) -> None:
    born = [(await put(pool, file_write(f"file_{name}"))).position for name in "cab"]
    rows = await pool.fetch("select id, created_position from rose.files order by created_position desc")
    assert [row["id"] for row in rows] == ["file_b", "file_a", "file_c"]
    assert sorted(row["created_position"] for row in rows) == born


async def test_floats_come_back_bit_for_bit(pool: Pool) -> None:
    odd = [0.1 + 0.2, 1e-300, 5e-324, 1.7976931348623157e308, 2**-0.5, 123456789.123456789]
    doc = msgspec.json.encode({"status": "queued", "model_name": "m", "odd": odd})
    write = msgspec.structs.replace(file_write("file_a"), row=EntityRow(kind="jobs", id="j", doc=doc))
    await put(pool, write)
    found = await load_row(pool, "jobs", "j")
    assert found is not None
    assert msgspec.convert(msgspec.json.decode(found[0])["odd"], list[float]) == odd


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
async def test_text_that_cannot_be_stored_is_named(pool: Pool, text: str) -> None:
    write = file_write("file_a")
    event = files.FileUploaded(
        project="default", file_id="file_a", created_at=1, filename=text, purpose="fine-tune", artifact=ARTIFACT
    )
    with pytest.raises(InvalidRequest) as caught:
        await put(pool, msgspec.structs.replace(write, events=(event,)))
    assert caught.value.code == "invalid_text"
    assert await head(pool) == 0


@pytest.mark.parametrize("change", [{"train_loss": float("nan")}, {"valid_loss": float("inf")}])
async def test_a_number_that_json_cannot_hold_is_refused(pool: Pool, change: dict[str, float]) -> None:
    """As null it would be in the log for ever, and no reader could pass it."""
    lease = await claim(pool, await queued_job(pool))
    before = await head(pool)
    step = msgspec.structs.replace(steps(1)[0], **change)
    with pytest.raises(UnreadableEvent, match=r"job\.steps_reported of job/ftjob_"):
        await tell(pool, lease.job_id, job_commands.ReportSteps(epoch=lease.epoch, steps=(step,)), epoch=lease.epoch)
    assert await head(pool) == before


async def test_an_oversized_event_is_refused(pool: Pool) -> None:
    write = file_write("file_a")
    event = files.FileUploaded(
        project="default",
        file_id="file_a",
        created_at=1,
        filename="x" * 256_000,
        purpose="fine-tune",
        artifact=ARTIFACT,
    )
    with pytest.raises(RoseError, match=r"file\.uploaded of file/file_a has 256\d+ bytes"):
        await put(pool, msgspec.structs.replace(write, events=(event,)))


async def test_an_append_outlives_the_death_of_its_connections(pool: Pool, database_dsn: str) -> None:
    """Backends are killed while appends run: each is in the log exactly once, whatever its client saw first."""
    done: list[Appended] = []

    async def write_files() -> None:
        for _ in range(ROUNDS):
            done.append(await put(pool, file_write()))

    killed = 0
    async with pool.acquire() as killer, anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(write_files)
        for written in range(0, 5 * ROUNDS, 4):
            await eventually(lambda written=written: len(done) >= written)
            killed += len(await killer.fetch(KILL_ONE))
    assert killed > 0
    assert await head(pool) == 5 * ROUNDS
    assert sorted(answer.position for answer in done) == list(range(1, 5 * ROUNDS + 1))
    assert await check_log(database_dsn) == []


async def test_an_append_whose_answer_is_lost_is_written_once(database_dsn: str, private_folder: Path) -> None:
    """The connection breaks after the commit and before the answer: the second try gets the stored answer."""
    async with answer_losing_proxy(database_dsn, private_folder) as proxy:
        pool = await open_pool(proxy.dsn, min_size=1, max_size=1)
        await put(pool, file_write())
        proxy.lose_next_answer()
        answer = await append(pool, [file_write()], command_id="key", response=b"answer", actor=ACTOR)
        assert proxy.lost == 1
        assert answer == Appended(position=2, replayed=True, response=b"answer")
        assert await head(pool) == 2
        await pool.close()


async def test_an_absent_database_is_one_sentence(private_folder: Path) -> None:
    with pytest.raises(Unavailable, match="Postgres does not answer"):
        await open_pool(f"postgresql://rose@/rose?host={private_folder}")


async def test_a_database_that_is_not_there_is_named(database_dsn: str) -> None:
    with pytest.raises(Unavailable, match='database "rose_test_nowhere" does not exist') as caught:
        await open_pool(re.sub(r"rose_test_\w+", "rose_test_nowhere", database_dsn))
    assert caught.value.code == "database_refused"


async def test_an_address_that_is_none_is_the_setting_to_change() -> None:
    with pytest.raises(InvalidRequest) as caught:
        await open_pool("mysql://somewhere/rose")
    assert caught.value.param == "database_url"


async def test_a_database_without_tables_says_how_to_make_them(empty_database_dsn: str) -> None:
    pool = await open_pool(empty_database_dsn)
    for call in (head(pool), put(pool, file_write())):
        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.hint == "Run `rose db migrate`."
    await pool.close()
