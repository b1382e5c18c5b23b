"""`GET …/metrics`: a job's series whole, page by page, and as an outline that keeps what people look for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError

from projections import metrics as metrics_view
from tests.api.running import Running, Trainer
from tests.api.teams import House

pytestmark = pytest.mark.anyio

MEASURED = {"full_valid_loss": lambda number: 2.0 if number % 10 == 0 else None}


async def started(api: Running, path: Path, steps: int) -> tuple[str, Trainer]:
    """Return a job of so many steps that has just begun, and its trainer."""
    job = await api.job(path, hyperparameters={"n_epochs": 1, "batch_size": 1})
    trainer = Trainer(api.services, job.id)
    await trainer.validate(examples=steps)
    await trainer.start()
    return job.id, trainer


async def asked(api: Running, job_id: str, **queries: Any) -> dict[str, Any]:
    answer = await api.http.get(f"/v1/fine_tuning/jobs/{job_id}/metrics", params=queries)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refusal(api: Running, job_id: str, **queries: Any) -> dict[str, Any]:
    answer = await api.http.get(f"/v1/fine_tuning/jobs/{job_id}/metrics", params=queries)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


async def test_all_steps_stand_in_columns(api: Running, seed_file: Path) -> None:
    job_id, trainer = await started(api, seed_file, 20)
    await trainer.steps(1, 12, **MEASURED)
    await trainer.steps(13, 20, **MEASURED)
    found = await asked(api, job_id)
    assert (found["object"], found["job_id"]) == ("fine_tuning.job.metrics", job_id)
    assert found["steps"] == list(range(1, 21))
    assert set(found["series"]) == set(metrics_view.NAMES)
    assert found["series"]["train_loss"] == [1 / number for number in range(1, 21)]
    assert found["series"]["trained_tokens"] == [10 * number for number in range(1, 21)]
    assert found["series"]["full_valid_loss"] == [MEASURED["full_valid_loss"](number) for number in range(1, 21)]
    assert found["series"]["valid_loss"] == [None] * 20
    assert (found["has_more"], found["downsampled_from"]) == (False, None)


async def test_it_shows_what_the_job_shows_and_what_comes_later(api: Running, seed_file: Path) -> None:
    job_id, trainer = await started(api, seed_file, 20)
    empty = await asked(api, job_id)
    assert (empty["steps"], empty["series"]["train_loss"], empty["has_more"]) == ([], [], False)
    assert (await asked(api, job_id, points=26))["steps"] == []
    for last in (7, 20):
        await trainer.steps(last - 6, last)
        job = (await api.http.get(f"/v1/fine_tuning/jobs/{job_id}")).json()
        assert (await asked(api, job_id, metrics="train_loss"))["steps"][-1] == job["progress"]["step"] == last


async def test_pages_are_the_whole(api: Running, seed_file: Path) -> None:
    job_id, trainer = await started(api, seed_file, 50)
    await trainer.steps(1, 50, **MEASURED)
    whole = await asked(api, job_id, metrics="train_loss,full_valid_loss")
    assert list(whole["series"]) == ["train_loss", "full_valid_loss"]
    steps: list[int] = []
    series: dict[str, list[float | None]] = {"train_loss": [], "full_valid_loss": []}
    more = True
    while more:
        page = await asked(api, job_id, metrics="train_loss,full_valid_loss", limit=20, after=steps[-1] if steps else 0)
        assert len(page["steps"]) <= 20
        steps += page["steps"]
        for name in series:
            series[name] += page["series"][name]
        more = page["has_more"]
    assert (steps, series) == (whole["steps"], whole["series"])
    assert (await asked(api, job_id, after=50))["steps"] == []
    assert (await asked(api, job_id, limit=50))["has_more"] is False


async def test_an_outline_keeps_the_ends_and_every_extreme(api: Running, seed_file: Path) -> None:
    total, points = 20_000, 200
    job_id, trainer = await started(api, seed_file, total)
    spikes = {777: 99.0, 12_345: -1.0}
    measured = {
        "train_loss": lambda number: spikes.get(number, 3.0 + number % 7 / 10),
        "valid_loss": lambda number: {4_000: 1.5, 8_000: 1.25, 12_000: 1.75, 16_000: 1.0}.get(number),
    }
    for first in range(1, total, 500):
        await trainer.steps(first, first + 499, **measured)
    whole = metrics_view.NAMES
    assert len((await asked(api, job_id))["steps"]) == 10_000, "the size of a page"
    found = await asked(api, job_id, points=points, metrics="train_loss,valid_loss,learning_rate")
    steps = found["steps"]
    assert found["downsampled_from"] == total
    assert found["has_more"] is False
    assert points * 0.8 < len(steps) <= points, "the room is used"
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, total)
    assert {777, 12_345, 4_000, 8_000, 12_000, 16_000} <= set(steps)
    for name in measured:
        assert found["series"][name] == [measured[name](step) for step in steps]
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) < 2 * total / ((points - 2) // 6), "no part of the run is left out"
    later = await asked(api, job_id, points=points, after=12_345, metrics="train_loss")
    assert (later["steps"][0], later["steps"][-1]) == (12_346, total)
    assert 12_345 not in later["steps"]
    assert set((await asked(api, job_id, points=26))["series"]) == set(whole)


async def test_an_outline_of_few_steps_is_all_of_them(api: Running, seed_file: Path) -> None:
    job_id, trainer = await started(api, seed_file, 40)
    await trainer.steps(1, 40)
    found = await asked(api, job_id, points=40)
    assert (found["steps"], found["downsampled_from"]) == (list(range(1, 41)), None)
    for points in (26, 33, 39):
        fewer = await asked(api, job_id, points=points)
        assert 20 <= len(fewer["steps"]) <= points
        assert fewer["downsampled_from"] == 40


@pytest.mark.parametrize(
    ("queries", "param", "words"),
    [
        ({"metrics": "train_loss,loss"}, "metrics", ("'loss'", "train_loss", "valid_loss")),
        ({"metrics": "train_loss'"}, "metrics", ("series are",)),
        ({"points": "25"}, "points", ("points is 25;", "26 to 10000", "12 series")),
        ({"points": "3", "metrics": "train_loss"}, "points", ("4 to 10000", "1 series")),
        ({"points": "many"}, "points", ("'many'",)),
        ({"limit": "-1"}, "limit", ("0 to 10000",)),
        ({"limit": "10001"}, "limit", ("0 to 10000",)),
        ({"after": "ftevent_1"}, "after", ("whole number",)),
        ({"after": "9" * 30}, "after", ("whole number",)),
        ({"points": "100", "limit": "5"}, "points", ("limit",)),
    ],
)
async def test_what_cannot_be_asked(
    shared_api: Running, shared_file: str, queries: Any, param: str, words: tuple[str, ...]
) -> None:
    created = await shared_api.http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": shared_file})
    error = await refusal(shared_api, created.json()["id"], **queries)
    assert error["param"] == param
    assert all(word in error["message"] for word in words), error["message"]


async def test_a_job_that_is_not_there(shared_api: Running) -> None:
    answer = await shared_api.http.get("/v1/fine_tuning/jobs/ftjob_aaaaaaaaaaaaaaaaaaaa/metrics")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "fine_tune_not_found"


async def test_another_projects_job_is_not_there_either(house: House, seed_file: Path) -> None:
    admin = await house.administrator()
    (_, ours), (_, theirs) = await house.team(admin, "ours"), await house.team(admin, "theirs")
    file = await ours.files.create(file=seed_file, purpose="fine-tune")
    job = await ours.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    path = f"/fine_tuning/jobs/{job.id}/metrics"
    assert (await ours.get(path, cast_to=dict[str, Any]))["job_id"] == job.id
    with pytest.raises(NotFoundError) as refused:
        await theirs.get(path, cast_to=dict[str, Any])
    assert refused.value.code == "fine_tune_not_found"


async def test_what_a_method_measures_stands_beside_it(api: Running, seed_file: Path) -> None:
    job_id, trainer = await started(api, seed_file, 20)
    await trainer.steps(1, 9, measured=lambda _: {"reward_margin": 0.25})
    await trainer.steps(
        10, 10, measured=lambda _: {"reward_margin": 0.5}, valid_measured=lambda _: {"reward_margin": 0.125}
    )
    found = await asked(api, job_id, metrics="reward_margin,valid_reward_margin", after=8)
    assert found["steps"] == [9, 10]
    assert found["series"] == {"reward_margin": [0.25, 0.5], "valid_reward_margin": [None, 0.125]}
    assert {"reward_margin", "valid_reward_margin", "train_loss"} <= (await asked(api, job_id))["series"].keys()
    outline = await asked(api, job_id, metrics="reward_margin,train_loss", points=6)
    assert outline["series"]["reward_margin"][-1] == 0.5
    error = await refusal(api, job_id, metrics="reward_marg")
    assert "reward_margin" in error["message"]
