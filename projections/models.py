"""The model view: one row per fine-tuned model, written by the append itself, and the queries that read it."""

from __future__ import annotations

import msgspec

from rose.domain.models import ModelState
from rose.log.append import EntityRow
from rose.log.pool import Pool, Record, fetch, fetch_row

LIST = "select doc from rose.models where project = $1 and not deleted order by created_position desc"
GET = "select doc from rose.models where id = $1 and not deleted"
FIND = "select doc from rose.models where id = $1"
BY_NAME = "select doc from rose.models where name = $1 and project = $2 and not deleted"


def row(state: ModelState) -> EntityRow:
    """Return the row that stands for `state`, under its job's id; its document is the state, so also the snapshot."""
    return EntityRow(kind="models", id=state.job_id, doc=msgspec.json.encode(state))


async def newest_first(pool: Pool, project: str) -> list[ModelState]:
    """Return every fine-tuned model of the project that answers, newest first."""
    rows = await fetch(pool, LIST, project)
    return [msgspec.json.decode(found["doc"], type=ModelState) for found in rows]


async def find(pool: Pool, job_id: str) -> ModelState | None:
    """Return the model that a job made, also when it was deleted."""
    return _state(await fetch_row(pool, FIND, job_id))


async def of_job(pool: Pool, job_id: str) -> ModelState | None:
    """Return the model that a job made; None when it made none or the model was deleted."""
    return _state(await fetch_row(pool, GET, job_id))


async def by_name(pool: Pool, project: str, name: str) -> ModelState | None:
    """Return the project's model that answers under `name`, or None."""
    return _state(await fetch_row(pool, BY_NAME, name, project))


def _state(found: Record | None) -> ModelState | None:
    return None if found is None else msgspec.json.decode(found["doc"], type=ModelState)
