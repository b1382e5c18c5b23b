"""Time from a trainer's claim of a job to its first step, beside a script that loads the same model and steps once.

The claim's and the step's times are those of the log. With a waiting child each job is created once one is ready;
without, most of both is importing torch and transformers.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import anyio

from benchmarks.record import record
from rose.domain.job_events import RunStarted, StepsReported
from rose.language_models.tiny import build_fixture
from rose.local import state
from rose.log import read
from rose.log.pool import open_pool
from rose.settings import Settings
from tests.acceptance.seed import training_data
from tests.local.rose_up import rose_up
from tests.services import private_folder

RUNS = 5
CHILD_SECONDS = 180
BARE = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model
torch.set_num_threads(1)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(target_modules="all-linear"))
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(0, 500, (1, 64))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
"""


async def first_steps(settings: Settings) -> list[float]:
    """Return for each job in the log the seconds from its claim to its first step."""
    pool = await open_pool(state.connection(settings), min_size=1, max_size=1)
    found: list[float] = []
    try:
        claimed: dict[str, datetime] = {}
        for event in await read.read_all(pool, after_position=0, limit=100_000):
            if isinstance(event.event, RunStarted):
                claimed[event.stream_id] = event.recorded_at
            elif isinstance(event.event, StepsReported) and event.stream_id in claimed:
                found.append((event.recorded_at - claimed.pop(event.stream_id)).total_seconds())
    finally:
        await pool.close()
    return found


def bare(model: Path) -> float:
    """Return the seconds of a script that loads the model and makes one step."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", BARE, str(model)], check=True, capture_output=True)
    return time.perf_counter() - begin


def wait_for_child(settings: Settings, number: int) -> None:
    """Wait until the trainer had `number` waiting children ready."""
    begin = time.monotonic()
    while (settings.logs / "trainer.log").read_text().count("waits for the next run") < number:
        assert time.monotonic() - begin < CHILD_SECONDS, "no child was ready"
        time.sleep(0.1)


def contest(data: Path, model: Path, *, warm: bool) -> tuple[list[float], list[float]]:
    """Run RUNS jobs one after the other, each beside a bare script; return the seconds of both."""
    bares: list[float] = []
    environment = {"ROSE_TORCH_THREADS": "1", "ROSE_WARM_CHILD": str(int(warm))}
    with private_folder() as data_dir, rose_up(data_dir, environment) as up:
        for number in range(1, RUNS + 1):
            if warm:
                wait_for_child(up.settings, number)
            up.rose("finetune", "create", str(data), "--model", str(model), "--epochs", "1", "--watch")
            bares.append(bare(model))
        own = anyio.run(first_steps, up.settings)
    assert len(own) == RUNS
    return own, bares


def main() -> None:
    """Measure with a waiting child and without."""
    rows: list[list[str]] = []
    with private_folder() as folder:
        model = build_fixture(folder / "model")
        data = folder / "training_data.jsonl"
        data.write_text(training_data())
        for warm in (True, False):
            own, bares = contest(data, model, warm=warm)
            rows.append(
                [
                    "yes" if warm else "no",
                    f"{statistics.median(own):.2f}",
                    f"{min(own):.2f}-{max(own):.2f}",
                    f"{statistics.median(bares):.2f}",
                    f"{statistics.median(own) / statistics.median(bares):.2f}",
                ]
            )
    columns = ("waiting child", "claim to first step s", "range s", "bare script s", "ratio")
    print("written to", record("claim", __doc__.splitlines()[0], columns, rows))


if __name__ == "__main__":
    main()
