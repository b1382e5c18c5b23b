"""A key of a job's creation that nobody reads is refused, and what was meant is named."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from rose.api import schema
from rose.decoding import convert
from tests.api.running import Running

pytestmark = pytest.mark.anyio

WANDB = {"type": "wandb", "wandb": {"project": "p"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"validation_fle": "file_x"}, "validation_fle", "Did you mean validation_file?"),
    ({"trainingFile": "file_x"}, "trainingFile", "Did you mean training_file?"),
    ({"n_epochs": 1}, "n_epochs", "Did you mean hyperparameters.n_epochs?"),
    ({"epochs": 1}, "epochs", "Did you mean hyperparameters.n_epochs?"),
    ({"lora_config": {"r": 4}}, "lora_config", "Did you mean hyperparameters.lora_config?"),
    ({"r": 4}, "r", "Did you mean hyperparameters.lora_config.r?"),
    ({"thinking": "on"}, "thinking", "Did you mean hyperparameters.thinking?"),
    ({"wandb": {"project": "p"}}, "wandb", "Did you mean integrations[0].wandb?"),
    ({"classes": 3}, "classes", "Allowed are model, training_file, validation_file,"),
    ({"": 3}, "", "Allowed are model"),
    ({"x" * 500: 3}, "x" * 80, "Allowed are model"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "Did you mean hyperparameters.n_epochs?"),
    ({"hyperparameters": {"lora_r": 3}}, "hyperparameters.lora_r", "Did you mean hyperparameters.lora_config.r?"),
    (
        {"hyperparameters": {"lora_config": {"rank": 8}}},
        "hyperparameters.lora_config.rank",
        "Did you mean hyperparameters.lora_config.r?",
    ),
    ({"hyperparameters": {"lr": 1}}, "hyperparameters.lr", "Did you mean hyperparameters.learning_rate_multiplier?"),
    ({"hyperparameters": {"optimizer": "x"}}, "hyperparameters.optimizer", "Allowed are hyperparameters.n_epochs,"),
    ({"file": "file_x"}, "file", "Did you mean training_file?"),
    (
        {"hyperparameters": {"lora_config": {"alpha": 8}}},
        "hyperparameters.lora_config.alpha",
        "Did you mean hyperparameters.lora_config.lora_alpha?",
    ),
    ({"method": {"hyperparameters": {}}}, "method.hyperparameters", "Did you mean method.supervised.hyperparameters?"),
    ({"method": {"supervized": {}}}, "method.supervized", "Did you mean method.supervised?"),
    (
        {"method": {"type": "supervised", "supervised": {"n_epochs": 1}}},
        "method.supervised.n_epochs",
        "Did you mean method.supervised.hyperparameters.n_epochs?",
    ),
    ({"method": {"seed": 1}}, "method.seed", "Did you mean seed?"),
    ({"integrations": [WANDB, {**WANDB, "project": "p"}]}, "integrations[1].project", "integrations[0].wandb.project?"),
    (
        {"integrations": [{"type": "wandb", "wandb": {"project": "p", "tag": ["a"]}}]},
        "integrations[0].wandb.tag",
        "Did you mean integrations[0].wandb.tags?",
    ),
]


@pytest.mark.parametrize(("more", "param", "says"), REFUSED, ids=[one[1][:40] for one in REFUSED])
async def test_an_unknown_key_is_refused_and_what_was_meant_is_named(
    shared_api: Running, shared_file: str, more: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await shared_api.openai.fine_tuning.jobs.create(model="tiny", training_file=shared_file, extra_body=more)
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", param)
    assert says in refused.value.message
    assert (await shared_api.openai.fine_tuning.jobs.list()).data == []


async def test_a_misspelt_required_key_is_named_rather_than_missed(shared_api: Running, shared_file: str) -> None:
    answer = await shared_api.http.post("/v1/fine_tuning/jobs", json={"modle": "tiny", "training_file": shared_file})
    assert answer.status_code == 400
    assert "Did you mean model?" in answer.json()["error"]["message"]


async def test_what_the_official_sdks_own_tests_send_is_legal(api: Running, seed_file: Any) -> None:
    """All three methods at once, and keys of newer SDKs that are null."""
    job = await api.openai.fine_tuning.jobs.create(
        model="tiny",
        training_file=await api.upload(seed_file),
        hyperparameters={"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"},
        metadata={"foo": "string"},
        method={
            "type": "supervised",
            "dpo": {"hyperparameters": {"batch_size": "auto", "beta": "auto", "n_epochs": "auto"}},
            "reinforcement": {
                "grader": {"input": "i", "name": "n", "operation": "eq", "reference": "r", "type": "string_check"},
                "hyperparameters": {"compute_multiplier": "auto", "reasoning_effort": "default"},
            },
            "supervised": {"hyperparameters": {"batch_size": "auto", "n_epochs": 2}},
        },
        seed=42,
        suffix="x",
        extra_body={"integrations": None, "validation_file": None, "service_tier": None},
    )
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 2


def test_integrations_as_the_official_sdk_sends_them_have_known_keys() -> None:
    wandb = {"project": "p", "name": "n", "entity": None, "tags": ["t"], "group": None}
    body = {"model": "tiny", "training_file": "file_x", "integrations": [{"type": "wandb", "wandb": wandb}]}
    assert convert(body, schema.CreateJob).integrations


async def test_the_document_says_which_keys_there_are(shared_api: Running) -> None:
    document = (await shared_api.http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/fine_tuning/jobs"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] == {"type": "null"}
    assert set(body["required"]) == {"model", "training_file"}
    knobs = body["properties"]["hyperparameters"]["anyOf"][0]
    assert knobs["additionalProperties"] == {"type": "null"}
    assert {"n_epochs", "thinking", "lora_config"} <= set(knobs["properties"])
