"""Each knob in both places where it may stand: at the top level and in the method, which wins; echoed in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.running import Running, Trainer

pytestmark = pytest.mark.anyio

KNOBS: dict[str, tuple[Any, Any]] = {
    "n_epochs": (2, 4),
    "batch_size": (1, 2),
    "learning_rate_multiplier": (0.5, 2.0),
    "validation_split": (0.1, 0.5),
    "early_stopping_patience": (2, 3),
    "warmup_ratio": (0.1, 0.25),
    "thinking": (True, False),
    "use_lora": (False, True),
    "lora_config": (
        {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
        {"r": 8, "lora_alpha": 16, "lora_dropout": 0.2, "target_modules": ["v_proj"]},
    ),
}
"""Two values of each, neither of them the default where that can be."""


def in_the_method(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


async def created(api: Running, training_file: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "training_file": training_file, **body}
    answer = await api.http.post("/v1/fine_tuning/jobs", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def echoed(job: dict[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that both places show."""
    assert job["hyperparameters"] == job["method"]["supervised"]["hyperparameters"]
    return job["hyperparameters"]


@pytest.mark.parametrize("knob", list(KNOBS))
async def test_a_knob_is_taken_in_either_place_and_the_method_wins(
    shared_api: Running, shared_file: str, knob: str
) -> None:
    one, other = KNOBS[knob]
    for value in (one, other, "auto"):
        top = await created(shared_api, shared_file, hyperparameters={knob: value})
        inside = await created(shared_api, shared_file, method=in_the_method({knob: value}))
        if value != "auto" or knob != "lora_config":
            assert echoed(top)[knob] == value
        assert echoed(inside) == echoed(top)
    both = await created(shared_api, shared_file, hyperparameters={knob: one}, method=in_the_method({knob: other}))
    assert echoed(both)[knob] == other


@pytest.mark.parametrize(("said", "meant"), [("on", True), ("off", False)])
async def test_thinking_is_on_or_off_too(shared_api: Running, shared_file: str, said: str, meant: bool) -> None:
    job = await created(shared_api, shared_file, hyperparameters={"thinking": said})
    assert echoed(job)["thinking"] is meant


@pytest.mark.parametrize("place", ["top", "method"])
async def test_every_auto_becomes_a_number_with_a_reason(api: Running, seed_file: Path, place: str) -> None:
    asked = dict.fromkeys((*KNOBS, "validation_split"), "auto")
    asked["lora_config"] = dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules"), "auto")  # type: ignore[assignment]
    body = {"hyperparameters": asked} if place == "top" else {"method": in_the_method(asked)}
    job = await created(api, await api.upload(seed_file), **body)
    await Trainer(api.services, job["id"]).validate()
    shown = (await api.http.get(f"/v1/fine_tuning/jobs/{job['id']}")).json()
    chosen = echoed(shown)
    assert "auto" not in [*chosen.values(), *chosen["lora_config"].values()]
    assert (chosen["n_epochs"], chosen["batch_size"], chosen["use_lora"]) == (25, 1, True)
    assert chosen["thinking"] is False
    assert chosen["lora_config"] == {
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "target_modules": chosen["lora_config"]["target_modules"],
    }
    reasons = shown["resolved_hyperparameters"]["reasons"]
    assert set(KNOBS) - {"lora_config", "use_lora"} <= set(reasons), sorted(reasons)
    assert all(reasons.values())
