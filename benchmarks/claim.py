"""Time from a trainer's claim of a job to its first step, beside a script that loads the same model and steps once.

The claim's and the step's times are those of the log; most of both is importing torch and transformers.
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


def main() -> None:
    """Run RUNS jobs one after the other, each beside a bare script."""
    with private_folder() as folder, private_folder() as data_dir:
        model = build_fixture(folder / "model")
        data = folder / "training_data.jsonl"
        data.write_text(training_data())
        bares: list[float] = []
        with rose_up(data_dir, {"ROSE_TORCH_THREADS": "1"}) as up:
            for _ in range(RUNS):
                up.rose("finetune", "create", str(data), "--model", str(model), "--epochs", "1", "--watch")
                bares.append(bare(model))
            own = anyio.run(first_steps, up.settings)
    assert len(own) == RUNS
    rows = [
        [
            f"{statistics.median(own):.2f}",
            f"{min(own):.2f}-{max(own):.2f}",
            f"{statistics.median(bares):.2f}",
            f"{statistics.median(own) / statistics.median(bares):.2f}",
        ]
    ]
    columns = ("claim to first step s", "range s", "bare script s", "ratio")
    print("written to", record("claim", __doc__.splitlines()[0], columns, rows))


if __name__ == "__main__":
    main()
