"""Every bad request gets a 4xx in OpenAI's shape that names the field; nothing is ever a 500."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from rose.api import decoding
from rose.decoding import MAX_DEPTH, check_values
from rose.errors import InvalidRequest
from tests.api.running import Running

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


def assert_error(answer: httpx2.Response, status: int, param: str | None, code: str | None = None) -> dict[str, Any]:
    """Check the shape of an error and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error


BAD_JOBS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": None}, "model", "invalid_type"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": ""}, "model", "invalid_value"),
    ({"model": "x" * 600}, "model", "invalid_value"),
    ({"model": "no-such-model"}, "model", "model_not_found"),
    ({"model": "../../etc"}, "model", "model_not_found"),
    ({"model": "/models/../etc"}, "model", "model_not_found"),
    ({"model": "a/b/c"}, "model", "model_not_found"),
    ({"model": "ti\0ny"}, "model", "invalid_text"),
    ({"model": "tiny-ft-20240611_123456:ckpt-step-9"}, "model", "model_not_found"),
    ({"training_file": None}, "training_file", "invalid_type"),
    ({"training_file": ["a"]}, "training_file", "invalid_type"),
    ({"training_file": "file_abc123"}, "training_file", "file_not_found"),
    ({"training_file": "\ud800"}, "training_file", "invalid_text"),
    ({"validation_file": "file_abc123"}, "validation_file", "file_not_found"),
    ({"validation_file": 1}, "validation_file", "invalid_type"),
    ({"suffix": ""}, "suffix", "invalid_value"),
    ({"suffix": "a/b"}, "suffix", "invalid_value"),
    ({"suffix": "a" * 65}, "suffix", "invalid_value"),
    ({"suffix": "ä"}, "suffix", "invalid_value"),
    ({"suffix": 7}, "suffix", "invalid_type"),
    ({"suffix": "a\n"}, "suffix", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": 2**31}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"seed": True}, "seed", "invalid_type"),
    ({"seed": "1"}, "seed", "invalid_type"),
    ({"hyperparameters": []}, "hyperparameters", "invalid_type"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"n_epochs": 10**400}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"warmup_ratio": 10**400}}, "hyperparameters.warmup_ratio", "invalid_value"),
    ({"hyperparameters": {"lora_config": {"lora_alpha": 2**64}}}, "hyperparameters.lora_config.lora_alpha", None),
    ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size", "invalid_value"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "unknown_parameter"),
    ({"hyperparameters": {"lora_config": {"rank": 3}}}, "hyperparameters.lora_config.rank", "unknown_parameter"),
    (
        {"hyperparameters": {"lora_config": {"use_dora": True}}},
        "hyperparameters.lora_config.use_dora",
        "unsupported_parameter",
    ),
    ({"hyperparameters": {"x\0y": 3}}, "hyperparameters.x?y", "invalid_text"),
    ({"method": "supervised"}, "method", "invalid_type"),
    ({"method": {"type": "magic"}}, "method.type", "unsupported_method"),
    ({"method": {"type": ["dpo"]}}, "method.type", "invalid_type"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta", None),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta", None),
    ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_method"),
    ({"method": {"type": "supervised", "supervised": 3}}, "method.supervised", "invalid_type"),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": 3}}},
        "method.supervised.hyperparameters",
        "invalid_type",
    ),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}},
        "method.supervised.hyperparameters.beta",
        "unknown_parameter",
    ),
    ({"metadata": ["a"]}, "metadata", "invalid_type"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", "invalid_value"),
    ({"metadata": {"k" * 65: "x"}}, "metadata", "invalid_value"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "invalid_value"),
    ({"metadata": {"a": "b\0"}}, "metadata.a", "invalid_text"),
    ({"metadata": {"a": "\udfff"}}, "metadata.a", "invalid_text"),
    ({"integrations": {}}, "integrations", "invalid_type"),
    ({"integrations": [1]}, "integrations[0]", "invalid_type"),
    ({"integrations": [{"type": "mlflow"}]}, "integrations[0].type", "invalid_value"),
    ({"integrations": [{"type": "wandb"}]}, "integrations[0].wandb", "missing_required_parameter"),
    ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations[0].wandb.project", "missing_required_parameter"),
]


@pytest.mark.parametrize(("change", "param", "code"), BAD_JOBS, ids=[str(one[0])[:50] for one in BAD_JOBS])
async def test_a_bad_job_names_the_field(
    shared_api: Running, shared_file: str, change: dict[str, Any], param: str, code: str | None
) -> None:
    body = {"model": "tiny", "training_file": shared_file, **change}
    answer = await shared_api.http.post(JOBS, content=json.dumps(body), headers={"content-type": "application/json"})
    error = assert_error(answer, 400, param, code)
    assert error["type"] == "invalid_request_error"
    assert (await shared_api.http.get(JOBS)).json()["data"] == []


async def test_a_wrong_purpose_is_named(shared_api: Running) -> None:
    other = await shared_api.openai.files.create(file=("a.txt", b"text"), purpose="user_data")
    answer = await shared_api.http.post(JOBS, json={"model": "tiny", "training_file": other.id})
    error = assert_error(answer, 400, "training_file", "invalid_file_purpose")
    assert "user_data" in error["message"]


async def test_an_unknown_model_is_told_what_is_known(shared_api: Running, shared_file: str) -> None:
    answer = await shared_api.http.post(JOBS, json={"model": "qwen", "training_file": shared_file})
    error = assert_error(answer, 400, "model", "model_not_found")
    assert "'qwen'" in error["message"]
    assert "qwen-coder" in error["message"]


BAD_BODIES = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b"null",
    b'"text"',
    b'{"model": NaN}',
    b"\xff\xfe\xfd",
    b"[" * 200_000,
    b'{"seed": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("content", BAD_BODIES, ids=[repr(body[:12]) for body in BAD_BODIES])
@pytest.mark.parametrize("path", [JOBS, "/v1/chat/completions"])
async def test_a_body_that_is_no_json_object(shared_api: Running, path: str, content: bytes) -> None:
    answer = await shared_api.http.post(path, content=content, headers={"content-type": "application/json"})
    assert_error(answer, 400, None, "invalid_json")


NESTED = "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.mark.parametrize("path", [JOBS, "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("given", "param"),
    [
        ('"seed": 1e999', "seed"),
        ('"seed": -18446744073709551616', "seed"),
        ('"else": {"of": [1, {"no": 1e400}]}', "else.of[1].no"),
        (f'"else": {NESTED}', "else"),
        ('"else": "\\udc00"', "else"),
        ('"el\\ud800se": 1', "el?se"),
    ],
)
async def test_values_that_no_field_can_have(
    shared_api: Running, shared_file: str, path: str, given: str, param: str
) -> None:
    known = f'"model": "tiny", "training_file": "{shared_file}", "messages": [{{"role": "user", "content": "x"}}]'
    answer = await shared_api.http.post(path, content=f"{{{known}, {given}}}")
    assert_error(answer, 400, param)


def test_large_values_are_checked_in_little_memory() -> None:
    value: Any = [0] * 20_000 + ["\0"]
    for _ in range(MAX_DEPTH - 2):
        value = {"k" * 80: value}
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as refused:
            check_values(value)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (refused.value.param or "").endswith("k[20000]")
    assert peak < 1 << 20


async def test_a_large_body_is_read_aside_and_its_fault_is_named(shared_api: Running, shared_file: str) -> None:
    body = {"model": "tiny", "training_file": shared_file, "metadata": {"a": "x" * (1 << 20)}}
    answer = await shared_api.http.post(JOBS, json=body)
    assert_error(answer, 400, "metadata.a", "invalid_value")


async def test_a_body_that_stands_still_is_given_up(shared_api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BODY_SECONDS", 0.2)
    request = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{"
    async with await anyio.connect_tcp("127.0.0.1", shared_api.services.settings.port) as stream:
        await stream.send(request)
        with anyio.fail_after(30):
            answer = await stream.receive()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


async def test_a_huge_json_body_is_refused(shared_api: Running) -> None:
    answer = await shared_api.http.post(JOBS, content=b" " * (17 << 20))
    assert_error(answer, 413, None, "too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("POST", "/v1/fine-tunes", 404, "unknown_url"),
        ("PUT", "/v1/files", 405, "method_not_supported"),
        ("DELETE", JOBS, 405, "method_not_supported"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("POST", "/v1/embeddings", 404, "unsupported_endpoint"),
        ("GET", "/v1/files/file_abc", 404, None),
        ("GET", "/v1/files/..%2F..%2Fetc%2Fpasswd", 404, None),
        ("GET", "/v1/models/no%2Fsuch", 404, "model_not_found"),
        ("GET", "/v1/models/..", 404, None),
        ("DELETE", "/v1/models/no-such", 404, "model_not_found"),
        ("DELETE", "/v1/models/tiny", 400, "base_model"),
        ("GET", "/v1/adapters/tiny", 404, "model_not_found"),
        ("GET", "/v1/files/%00", 400, "invalid_text"),
        ("GET", f"{JOBS}/%00", 400, "invalid_text"),
        ("GET", f"{JOBS}/a%2Fb", 404, None),
        ("POST", f"{JOBS}/%F0%9F%98%80/cancel", 404, "fine_tune_not_found"),
        ("GET", "/v1/models/%00", 400, "invalid_text"),
        ("GET", f"{JOBS}?limit=-1", 400, "invalid_value"),
        ("GET", f"{JOBS}?limit=ten", 400, "invalid_value"),
        ("GET", f"{JOBS}?after=%00", 400, "invalid_text"),
        ("GET", f"{JOBS}?metadata[a]=%00", 400, "invalid_text"),
        ("GET", f"{JOBS}?metadata=x", 400, "invalid_value"),
        ("GET", "/v1/files?limit=10001", 400, "invalid_value"),
        ("GET", "/v1/files?order=up", 400, "invalid_value"),
        ("GET", "/v1/files?purpose=%00", 400, "invalid_text"),
        ("GET", "/v1/files?limit=99999999999999999999999", 400, "invalid_value"),
    ],
)
async def test_addresses_and_parameters(
    shared_api: Running, method: str, path: str, status: int, code: str | None
) -> None:
    answer = await shared_api.http.request(method, path)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    if code:
        assert error["code"] == code


async def test_a_failure_inside_never_shows_itself(
    shared_api: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from projections import jobs

    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret of the inside")

    monkeypatch.setattr(jobs, "newest_first", broken)
    answer = await shared_api.http.get(JOBS)
    error = assert_error(answer, 500, None)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    assert "a secret of the inside" in caplog.text


async def test_the_seeds_own_curl_call_is_accepted(api: Running, seed_file: Path) -> None:
    body = {
        "training_file": await api.upload(seed_file),
        "model": "qwen-coder",
        "suffix": "custom-model",
        "hyperparameters": {
            "n_epochs": 3,
            "batch_size": "auto",
            "learning_rate_multiplier": 1.5,
            "validation_split": 0.1,
            "early_stopping_patience": 3,
            "warmup_ratio": 0.1,
            "use_lora": True,
            "lora_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
        },
        "a_key_of_tomorrow": None,
        "method": None,
    }
    answer = await api.http.post(JOBS, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["hyperparameters"]["lora_config"]["r"] == 16
    assert answer.json()["reserved_model"].startswith("qwen-coder-ft-")
