"""A data folder that the version before projects made: it opens, verifies, and what it holds goes on.

`old_data_folder/make.sh` made it, with that version: a job that succeeded, one that was paused at step 101 of 180, one
that failed, a deleted file.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from rose.local import account
from tests.local.rose_up import RoseUp, json, rose_up
from tests.services import private_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

ARCHIVE = Path(__file__).parent / "old_data_folder" / "before_projects.tar.xz"
PAUSED = "ftjob_oz223nydgs6icdyzrbld"
SUCCEEDED = "ftjob_zl6pnfou6cdkpys5lzrq"
FAILED = "ftjob_3mr7ojkpjfevsyezd3mf"
MODEL = "tiny-ft-20261127_191200-old"


@pytest.fixture(scope="module")
def up() -> Iterator[RoseUp]:
    with private_folder() as data:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(data, filter="tar")
        for path in (data, *data.rglob("*")):
            os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
        postgres = data / "postgres"
        if (unprivileged := account.needed()) is not None:
            for path in (postgres, *postgres.rglob("*")):
                os.chown(path, unprivileged.uid, unprivileged.gid)
        # Else two runs of this test at once, on one machine, would each take the other's NATS for what it left behind.
        (data / "nats" / "port").unlink()
        with rose_up(data, {"ROSE_DEVICE": "cpu", "ROSE_IDEMPOTENCY_SECONDS": "1e9"}) as running:
            yield running


def test_every_view_is_what_the_log_says(up: RoseUp) -> None:
    verified = up.rose("projections", "verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "Every view is what the log says." in verified.stdout


def test_what_it_holds_belongs_to_the_default_project(up: RoseUp) -> None:
    listed = up.rose("finetune", "list").stdout.splitlines()
    assert [line.split("\t")[:2] for line in listed] == [
        [FAILED, "failed"],
        [PAUSED, "paused"],
        [SUCCEEDED, "succeeded"],
    ]
    assert MODEL in up.rose("models", "list", "-q").stdout.split()
    assert len(up.rose("files", "list", "-q").stdout.split()) == 4
    job = up.rose("finetune", "get", PAUSED, "--json").stdout
    assert json(job)["user_provided_suffix"] == "paused"


def test_a_repeated_request_gets_the_answer_of_then(up: RoseUp) -> None:
    body = {"model": "tiny", "training_file": "file_of_then"}
    url = f"{up.settings.url}/v1/fine_tuning/jobs"
    again = httpx2.post(url, json=body, headers={"Idempotency-Key": "old-key"}, timeout=60)
    assert (again.status_code, again.json()["error"]["code"]) == (400, "idempotency_key_reused")


def test_the_stream_in_nats_is_made_anew_with_the_subjects_of_today(up: RoseUp) -> None:
    log = (up.settings.logs / "projections.log").read_text()
    assert "had the subjects rose.v1.> of an older ROSE; it is made anew" in log


def test_a_paused_job_goes_on_where_it_was(up: RoseUp) -> None:
    assert up.rose("models", "build", seconds=500).returncode == 0
    assert up.rose("finetune", "resume", PAUSED).returncode == 0
    watched = up.rose("finetune", "events", PAUSED, seconds=300)
    assert "Training resumed from step 101" in watched.stdout
    assert "training begins anew" not in watched.stdout
    assert json(up.rose("finetune", "get", PAUSED, "--json").stdout)["status"] == "succeeded"
    model = json(up.rose("finetune", "get", SUCCEEDED, "--json").stdout)["fine_tuned_model"]
    assert model == MODEL
    answer = up.rose("chat", "What is recursion?", "--model", MODEL, "--max-tokens", "8")
    assert answer.returncode == 0, answer.stderr
