"""The model view: one row per fine-tuned model, written by the append itself, and the queries that read it."""

from __future__ import annotations

import msgspec

from projections.damage import DamagedRow, whole
from rose.domain.models import ModelState, initial
from rose.log.append import EntityRow
from rose.log.pool import Pool, Record, fetch, fetch_row

VIEW = "models"
LIST = "select id, doc from rose.models where project = $1 and not deleted order by created_position desc"
GET = "select id, doc from rose.models where id = $1 and not deleted"
FIND = "select id, doc from rose.models where id = $1"
BY_NAME = "select id, doc from rose.models where name = $1 and project = $2 and not deleted"


class DamagedModel(ModelState, frozen=True, kw_only=True):
    """What can be read of a model whose row is damaged. For showing alone, never to be stored."""

    damage: str
    """What happened and what helps."""


def row(state: ModelState) -> EntityRow:
    """Return the row that stands for `state`, under its job's id; its document is the state, so also the snapshot."""
    return EntityRow(kind="models", id=state.job_id, doc=msgspec.json.encode(state))


async def newest_first(pool: Pool, project: str) -> list[ModelState]:
    """Return every fine-tuned model of the project that answers, newest first; a damaged row as DamagedModel."""
    return [_shown(found) for found in await fetch(pool, LIST, project)]


async def find(pool: Pool, job_id: str) -> ModelState | None:
    """Return the model that a job made, also when it was deleted. Raises: DamagedRow."""
    return _state(await fetch_row(pool, FIND, job_id))


async def of_job(pool: Pool, job_id: str) -> ModelState | None:
    """Return the model that a job made; None when it made none or the model was deleted. Raises: DamagedRow."""
    return _state(await fetch_row(pool, GET, job_id))


async def by_name(pool: Pool, project: str, name: str) -> ModelState | None:
    """Return the project's model that answers under `name`, or None.

    Raises: DamagedRow; its `remains` are a DamagedModel.
    """
    found = await fetch_row(pool, BY_NAME, name, project)
    state = None if found is None else _shown(found)
    if isinstance(state, DamagedModel):
        raise DamagedRow(VIEW, state.job_id, state)
    return state


def _state(found: Record | None) -> ModelState | None:
    return None if found is None else whole(VIEW, found["id"], found["doc"], initial)


def _shown(found: Record) -> ModelState:
    try:
        return whole(VIEW, found["id"], found["doc"], initial)
    except DamagedRow as error:
        left = {**msgspec.structs.asdict(error.remains), "job_id": found["id"]}
        return DamagedModel(**left, damage=str(error))
