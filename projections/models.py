"""The model view: one row per fine-tuned model, written by the append itself, and the queries that read it."""

from __future__ import annotations

import msgspec

from rose.domain.models import ModelState
from rose.log.append import EntityRow


def row(state: ModelState) -> EntityRow:
    """Return the row that stands for `state`, under its job's id; its document is the state, so also the snapshot."""
    return EntityRow(kind="models", id=state.job_id, doc=msgspec.json.encode(state))
