"""`rose finetune metrics`: at a glance, as a table for spreadsheets, as the API's object."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from cli.commands.metrics import sparkline
from tests.api.running import Running, Trainer
from tests.cli.conftest import Rose

pytestmark = pytest.mark.anyio


async def measured(api: Running, path: Path, steps: int) -> str:
    """Return a job that has measured so many steps."""
    job = await api.job(path, hyperparameters={"n_epochs": 1, "batch_size": 1})
    trainer = Trainer(api.services, job.id)
    await trainer.validate(examples=steps)
    await trainer.start()
    await trainer.steps(1, steps, valid_loss=lambda number: 0.5 if number % 10 == 0 else None)
    return job.id


async def test_a_job_at_a_glance(api: Running, rose: Rose, seed_file: Path) -> None:
    job_id = await measured(api, seed_file, 40)
    done = await rose("finetune", "metrics", job_id)
    assert (done.status, done.err) == (0, "")
    shown = {line.split("\t")[0]: line.split("\t")[1:] for line in done.out.splitlines()}
    assert shown["train_loss"] == ["1", "0.025", "0.025 at step 40", "1 at step 1"]
    assert shown["valid_loss"] == ["0.5", "0.5", "0.5 at step 10", "0.5 at step 40"]
    assert "full_valid_loss" not in shown, "it was never measured"


async def test_every_step_for_a_spreadsheet(api: Running, rose: Rose, seed_file: Path) -> None:
    job_id = await measured(api, seed_file, 40)
    done = await rose("finetune", "metrics", "last", "--csv", "--metrics", "train_loss,valid_loss")
    assert done.status == 0
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert [float(row["train_loss"]) for row in rows] == [1 / number for number in range(1, 41)]
    assert [row["valid_loss"] for row in rows[:10]] == [""] * 9 + ["0.5"]
    fewer = await rose("finetune", "metrics", job_id, "--csv", "--metrics", "train_loss", "--points", "10")
    assert 2 < len(fewer.out.splitlines()) <= 11


async def test_the_object_is_whole_however_many_pages_it_takes(
    api: Running, rose: Rose, seed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rose.api.schema.MAX_METRIC_STEPS", 15)
    job_id = await measured(api, seed_file, 40)
    found = json.loads((await rose("finetune", "metrics", job_id, "--json")).out)
    assert found["object"] == "fine_tuning.job.metrics"
    assert found["steps"] == list(range(1, 41))
    assert found["series"]["train_loss"] == [1 / number for number in range(1, 41)]
    assert found["has_more"] is False


async def test_what_cannot_be_asked_is_said(api: Running, rose: Rose, seed_file: Path) -> None:
    job = await api.job(seed_file)
    nothing = await rose("finetune", "metrics", job.id)
    assert (nothing.status, nothing.out, nothing.err) == (0, "", "Nothing has been measured yet.\n")
    refused = await rose("finetune", "metrics", job.id, "--metrics", "loss")
    assert (refused.status, "train_loss" in refused.err) == (2, True), refused
    both = await rose("finetune", "metrics", job.id, "--csv", "--json")
    assert (both.status, both.out) == (2, ""), both
    missing = await rose("finetune", "metrics", "ftjob_aaaaaaaaaaaaaaaaaaaa")
    assert missing.status == 3


def test_a_sparkline_follows_its_column() -> None:
    assert sparkline([8, 7, 6, 5, None, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == sparkline([None]) == ""
    assert len(sparkline([float(number) for number in range(1000)], 32)) == 32
