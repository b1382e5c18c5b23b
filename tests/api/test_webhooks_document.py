"""The receiver of docs/webhooks.md, as it stands there, is told of a job that ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx2
import pytest

from rose.settings import Settings
from rose.webhooks.delivery import Deliverer
from rose.webhooks.sending import Sender
from tests.api.running import Running, Trainer, free_port
from tests.eventually import eventually

pytestmark = pytest.mark.anyio
DOCUMENT = Path(__file__).parents[2] / "docs" / "webhooks.md"


@pytest.fixture
def api_settings(settings: Callable[..., Settings]) -> Settings:
    return settings(port=free_port(), webhook_private_targets=True)


@contextmanager
def running(code: str, folder: Path, **environment: str) -> Iterator[Path]:
    """Run the program and yield the file with what it prints."""
    printed, script = folder / "printed", folder / "receiver.py"
    script.write_text(code)
    with printed.open("wb") as out:
        process = subprocess.Popen([sys.executable, script], env={**os.environ, **environment}, stdout=out)
    try:
        yield printed
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx2.post(url, content=b"{}", trust_env=False).status_code == 400
    except httpx2.ConnectError:
        return False


async def test_the_receiver_of_the_document(api: Running, seed_file: Path, tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n# receiver\.py\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    port = free_port()
    url = f"http://127.0.0.1:{port}/rose"
    made = await api.openai.webhooks.create(
        event_types=["fine_tuning.job.succeeded", "fine_tuning.job.cancelled"], name="ci", url=url
    )
    environment = {
        "OPENAI_WEBHOOK_SECRET": made.signing_secret,
        "OPENAI_BASE_URL": f"{api.services.settings.url}/v1",
        "PORT": str(port),
    }
    with running(code, tmp_path, **environment) as printed:
        await eventually(lambda: anyio.to_thread.run_sync(answers, url))
        async with Sender(private=True) as sender, anyio.create_task_group() as tasks:
            tasks.start_soon(Deliverer(api.services.pool, sender).deliver)
            trained, ended = await api.job(seed_file), await api.job(seed_file)
            await Trainer(api.services, trained.id).run_to_success()
            await api.openai.fine_tuning.jobs.cancel(ended.id)
            await eventually(lambda: len(printed.read_text().splitlines()) == 2)
            await api.openai.webhooks.test(made.id, event_type="fine_tuning.job.failed")
            await eventually(lambda: len(printed.read_text().splitlines()) == 3)
            tasks.cancel_scope.cancel()
        model = (await api.openai.fine_tuning.jobs.retrieve(trained.id)).fine_tuned_model
        assert set(printed.read_text().splitlines()) == {
            f"{trained.id} is succeeded; its model: {model}",
            f"{ended.id} is cancelled; its model: None",
            "fine_tuning.job.failed of ftjob_sample, which was made up for a test",
        }
