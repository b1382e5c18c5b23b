"""What a worker has and what a job needs: who cannot run a job leaves it to others."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rose.domain.job_values import BaseModel, BaseRequest
from rose.domain.jobs import initial
from trainer.capabilities import Capabilities, detect, missing_base, unsuitable

CPU = Capabilities(device="cpu", memory_bytes=8 << 30, cores=2)
GPU = Capabilities(device="cuda:1", memory_bytes=80 << 30, cores=16)
JOB = msgspec.structs.replace(initial, id="ftjob_a", base=BaseModel(source="tiny", revision=None, fingerprint="f"))


@pytest.mark.parametrize(
    ("needs", "cpu_fits", "gpu_fits"),
    [
        ({}, True, True),
        ({"device": "any"}, True, True),
        ({"device": "cpu"}, True, True),
        ({"device": "cuda"}, False, True),
        ({"device": "mps"}, False, False),
        ({"memory_bytes": 8 << 30}, True, True),
        ({"memory_bytes": (8 << 30) + 1}, False, True),
        ({"device": "cuda", "memory_bytes": 81 << 30}, False, False),
    ],
)
def test_needs_are_compared_with_what_is_there(needs: dict[str, int | str], cpu_fits: bool, gpu_fits: bool) -> None:
    job = msgspec.structs.replace(JOB, needs=needs)
    assert (unsuitable(job, CPU) is None) == cpu_fits
    assert (unsuitable(job, GPU) is None) == gpu_fits


def test_a_job_that_is_logged_elsewhere_is_left_to_workers_that_can() -> None:
    job = msgspec.structs.replace(JOB, integrations=({"type": "wandb", "wandb": {"project": "roses"}},))
    able = msgspec.structs.replace(CPU, integrations=("wandb",))
    assert unsuitable(job, able) is None
    assert "wandb" in (unsuitable(job, CPU) or "")
    assert unsuitable(msgspec.structs.replace(JOB, integrations=()), CPU) is None


def test_what_is_installed_here_is_announced() -> None:
    assert detect("cpu").integrations == ("wandb",)


def test_a_base_in_a_folder_that_is_not_here_is_found_missing(tmp_path: Path) -> None:
    here = msgspec.structs.replace(JOB, base=None, base_request=BaseRequest(source=str(tmp_path)))
    elsewhere = msgspec.structs.replace(JOB, base=None, base_request=BaseRequest(source=str(tmp_path / "none")))
    assert missing_base(here) is None
    assert missing_base(elsewhere) == str(tmp_path / "none")


def test_the_resolved_base_counts_more_than_the_requested_one(tmp_path: Path) -> None:
    job = msgspec.structs.replace(JOB, base_request=BaseRequest(source=str(tmp_path / "none")))
    assert missing_base(job) is None


def test_a_wanted_device_is_announced_as_it_was_wanted() -> None:
    found = detect("cpu")
    assert found.device == "cpu"
    assert found.memory_bytes > 64 << 20
    assert found.cores >= 1


def test_hidden_gpus_are_not_there() -> None:
    assert detect("auto", {"CUDA_VISIBLE_DEVICES": ""}).device in ("cpu", "mps")
