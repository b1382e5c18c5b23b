"""compose.yaml works: each service by the command line and environment written there, two trainers, the workflow."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import yaml

from rose.bus import Bus, BusRefused, BusUnavailable
from rose.log import read
from rose.log.pool import open_pool
from rose.subjects import STREAM, Message
from tests import services
from tests.acceptance.seed import MODEL, Workflow, training_data
from tests.eventually import eventually
from tests.in_own_loop import in_own_loop
from tests.local.composed import COMPOSE, Composed, interpolated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEY = secrets.token_hex(8)


class WorkflowWithKey(Workflow):
    """Someone whose server wants a key."""

    def run(self, command: str, *, status: int = 0) -> str:
        """Run a command of the page; curl gets the key that the SDKs and the CLI take from OPENAI_API_KEY."""
        with_key = command.replace("curl ", f'curl -H "Authorization: Bearer {KEY}" ')
        return super().run(with_key, status=status)


def wait_until(condition: Callable[[], bool]) -> None:
    in_own_loop(eventually(condition))


@pytest.fixture(scope="module")
def composed(fixture_base: Path) -> Iterator[Composed]:
    """All services of compose.yaml, with two trainers."""
    secret_names = re.findall(r"^(\w+)=$", (COMPOSE.parent / ".env.example").read_text(), re.MULTILINE)
    variables = {name: secrets.token_hex(24) for name in secret_names}
    variables |= {"ROSE_API_KEYS": KEY, "ROSE_MODEL_ALIASES": f"qwen-coder={fixture_base}"}
    with services.private_folder() as folder:
        running = Composed(folder, variables)
        try:
            for name in ("postgres", "nats", "api", "projections", "inference"):
                running.start(name)
            for number in (1, 2):
                running.start("trainer", f"trainer-{number}")
            running.wait_until_ready(trainers=2, engines=1)
            yield running
        finally:
            statuses = running.stop_all()
        assert set(statuses.values()) == {0}, statuses


def test_every_service_is_there_and_restarts() -> None:
    written: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(written) == {"postgres", "nats", "api", "projections", "trainer", "inference"}
    for name in ("api", "projections", "trainer", "inference"):
        assert written[name]["command"] == ["rose", "serve", name]
        assert written[name]["volumes"] == ["rose-data:/var/lib/rose"], "they share files and adapters"
    assert {service["restart"] for service in written.values()} == {"unless-stopped"}


def test_a_missing_password_is_named_before_anything_starts() -> None:
    written = yaml.safe_load(COMPOSE.read_text())["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"]
    with pytest.raises(KeyError, match=r"ROSE_POSTGRES_PASSWORD: set it in \.env"):
        interpolated(written, {})


def test_the_workflow_runs_on_it(composed: Composed, tmp_path: Path) -> None:
    workflow = WorkflowWithKey(tmp_path, composed.url, {**os.environ, "OPENAI_API_KEY": KEY})
    outputs = workflow.follow(before="## Change your mind")
    [created] = [msgspec.json.decode(text) for command, text in outputs.items() if command.startswith("curl")]
    assert created["status"] == "validating_files"
    prompt, wanted = msgspec.json.decode(training_data().splitlines()[0])["messages"]
    shown = workflow.rose("chat", prompt["content"], "--model", workflow.known[MODEL], "--temperature", "0")
    assert wanted["content"].splitlines()[0] in shown


def test_without_a_key_nobody_comes_in(composed: Composed) -> None:
    assert httpx2.get(f"{composed.url}/v1/models", trust_env=False).status_code == 401


def test_only_the_relay_may_publish_and_a_reader_may_follow(composed: Composed) -> None:
    uploaded = httpx2.post(
        f"{composed.url}/v1/files",
        headers={"Authorization": f"Bearer {KEY}"},
        files={"file": ("one.jsonl", training_data().encode())},
        data={"purpose": "fine-tune"},
        trust_env=False,
    )
    assert uploaded.status_code == 200

    def url(service: str) -> str:
        return composed.environment(service)["ROSE_NATS_URL"]

    async def try_both() -> None:
        forged = Message(subject="rose.v2.default.job.ftjob_x.succeeded", body=b"{}", headers={})
        async with Bus(url("trainer")) as reader:
            assert await reader.wait_connected(30)
            with pytest.raises((BusRefused, BusUnavailable)):
                await reader.publish(forged)
            async with reader.consumer(STREAM, "follower") as consumer:
                first = await consumer.next(timeout_seconds=10)
                assert first is not None
                assert first.sequence == 1
                assert first.subject.startswith("rose.v2.default.file.")
                await first.ack()

    in_own_loop(try_both())


def test_everything_goes_on_without_nats_and_the_relay_catches_up(composed: Composed, tmp_path: Path) -> None:
    composed.stop("nats")
    workflow = WorkflowWithKey(tmp_path, composed.url, {**os.environ, "OPENAI_API_KEY": KEY})
    wait_until(lambda: composed.ready().get("nats") == "away")
    assert composed.ready()["status"] == "degraded"
    workflow.rose("finetune", "create", "training_data.jsonl", "--model", "qwen-coder", "--epochs", "2")
    assert "successfully completed" in workflow.rose("finetune", "events", "last")
    composed.start("nats")
    relay = composed.environment("projections")["ROSE_NATS_URL"]
    database = composed.environment("api")["ROSE_DATABASE_URL"]

    async def caught_up() -> None:
        pool = await open_pool(database, min_size=1, max_size=1)
        try:
            async with Bus(relay) as bus:
                assert await bus.wait_connected(60)

                async def level() -> bool:
                    facts = await bus.stream(STREAM)
                    return facts is not None and facts.last_sequence == await read.head(pool)

                await eventually(level)
        finally:
            await pool.close()

    in_own_loop(caught_up())
    wait_until(lambda: composed.ready().get("status") == "ready")
