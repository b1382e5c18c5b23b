"""Old commands are forgotten in batches, by any number of processes at once; nothing else is touched."""

from __future__ import annotations

import anyio
import pytest

from rose.domain import job_commands
from rose.log.append import append
from rose.log.forget import BATCH, forget_commands
from rose.log.pool import Pool
from rose.log.queries import QUERIES
from rose.log.read import read_all
from tests.checker import check_log
from tests.integration.writes import ACTOR, claim, file_write, queued_job, steps, tell

pytestmark = pytest.mark.anyio

DAY = 86400.0
AGE = "update rose.commands set created_at = created_at - make_interval(days => 2)"
COUNT = "select count(*) from rose.commands"


async def test_a_job_goes_on_without_the_commands_that_made_it(pool: Pool, database_dsn: str) -> None:
    job_id = await queued_job(pool)
    lease = await claim(pool, job_id)
    await pool.execute("alter table rose.events disable trigger events_immutable")
    await pool.execute("update rose.events set recorded_at = recorded_at - interval '2 days'")
    await pool.execute("alter table rose.events enable always trigger events_immutable")
    before = await read_all(pool, after_position=0)
    await pool.execute(AGE)
    young = file_write()
    await append(pool, [young], command_id="young", actor=ACTOR)
    assert await forget_commands(pool, older_than_seconds=DAY) > 0
    assert await pool.fetchval("select array_agg(command_id) from rose.commands") == ["young"]
    assert (await append(pool, [young], command_id="young", actor=ACTOR)).replayed
    assert (await read_all(pool, after_position=0))[: len(before)] == before
    await tell(pool, job_id, job_commands.ReportSteps(epoch=lease.epoch, steps=steps(1, 3)), epoch=lease.epoch)
    assert await check_log(database_dsn) == []


async def test_several_processes_forget_at_once(pool: Pool) -> None:
    many = 3 * BATCH + 7
    fill = "insert into rose.commands (command_id) select 'c' || number from generate_series(1, $1) as number"
    await pool.execute(fill, many)
    await pool.execute(AGE)
    forgotten: list[int] = []

    async def forget() -> None:
        forgotten.append(await forget_commands(pool, older_than_seconds=DAY))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(forget)
    assert sum(forgotten) == many, "each is forgotten by one of them"
    assert await pool.fetchval(COUNT) == 0


async def test_a_command_in_progress_is_waited_for_by_nobody(pool: Pool, database_dsn: str) -> None:
    await append(pool, [file_write()], command_id="held", actor=ACTOR)
    await pool.execute("insert into rose.commands (command_id) values ('free')")
    await pool.execute(AGE)
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select 1 from rose.commands where command_id = 'held' for update")
        with anyio.fail_after(5):
            assert await forget_commands(pool, older_than_seconds=DAY) == 1
    assert await forget_commands(pool, older_than_seconds=DAY) == 1


async def test_the_oldest_are_found_by_an_index(pool: Pool) -> None:
    await pool.execute(
        "insert into rose.commands (command_id, created_at) select gen_random_uuid(), "
        "clock_timestamp() - make_interval(secs => number) from generate_series(1, 20000) as number"
    )
    await pool.execute("analyze rose.commands")
    plan = "\n".join(row[0] for row in await pool.fetch(f"explain {QUERIES['forget_commands']}", DAY, BATCH))
    assert "Index Scan using commands_created" in plan, plan
    assert "Index Cond: (created_at <" in plan, "all of the young ones would be looked at"
