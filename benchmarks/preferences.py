"""Preference training (DPO) beside TRL's DPOTrainer: the same model, adapter, pairs and order; one thread, fp32.

TRL lives in an environment of its own, as for benchmarks.train:

    ROSE_BENCH_TRL_PYTHON=/tmp/trl/bin/python python -m benchmarks preferences

Losses, reward margins and gradient norms of every step are compared; ratios are of processor time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

from benchmarks import train
from benchmarks.record import record

PAIRS = 32
BETA = 0.1
LEARNING_RATE = 2e-4
TOLERANCE = 1e-5
COLUMNS = ("engine", "pairs/cpu s", "ratio", "peak MB", "loss first", "last", "margin last", "gradient norm last")


def make_job(folder: Path) -> None:
    """Write the model and adapter of benchmarks.train with pairs of answers of different lengths."""
    train.make_job(folder)
    job = json.loads((folder / "job.json").read_text())
    draw = random.Random(train.SEED)

    def tokens(middle: float) -> list[int]:
        return [draw.randrange(200) for _ in range(max(4, round(draw.lognormvariate(middle, 0.6))))][:200]

    pairs = [{"prompt": tokens(3.5), "chosen": tokens(3.8), "rejected": tokens(3.5)} for _ in range(PAIRS)]
    job |= {"pairs": pairs, "documents": [], "beta": BETA, "learning_rate": LEARNING_RATE}
    (folder / "job.json").write_text(json.dumps(job))


def run_rose(folder: Path) -> None:
    """Train as a run does, on the job's pairs in their order, and print what was measured."""
    import torch

    from rose.domain.hyperparameter_requests import HyperparametersRequest
    from rose.domain.hyperparameters import DataFacts, resolve
    from rose.language_models.load import load_model
    from rose.language_models.lora import attach, load_adapter
    from rose.methods import dpo
    from rose.methods.method import Document, Unit
    from trainer.batches import Schedule
    from trainer.forward import choose_forward
    from trainer.hardware import Hardware
    from trainer.optimization import Optimization
    from trainer.protocol import RunSpec
    from trainer.recovery import RunState
    from trainer.trained_model import TrainedModel

    def document(prompt: list[int], answer: list[int]) -> Document:
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        return Document(ids=array("q", prompt + answer), weights=array("f", weights))

    job = json.loads((folder / "job.json").read_text())
    units = [Unit(tuple(document(one["prompt"], one[side]) for side in ("chosen", "rejected"))) for one in job["pairs"]]
    facts = DataFacts(
        examples=len(units),
        validation_file_examples=None,
        hidden_size=train.WIDTH,
        model_type="qwen3",
        context_tokens=train.LONGEST,
        base_learning_rate=job["learning_rate"],
        method_options={"beta": (job["beta"], "as TRL")},
    )
    asked = {"n_epochs": job["epochs"], "batch_size": job["batch_size"], "warmup_ratio": 0.0}
    numbers = resolve(HyperparametersRequest(**asked), facts, job["seed"])
    assert numbers.lora_config is not None
    torch.set_num_threads(1)
    hardware = Hardware(train.spec(RunSpec, numbers))
    model = load_model(Path(job["model"]))
    adapter = attach(model, numbers.lora_config, seed=0)
    load_adapter(adapter, Path(job["adapter"]))
    parameters = {f"{index}.lora_": parameter for index, parameter in enumerate(adapter.trainable_parameters())}
    documents = [document for unit in units for document in unit.documents]
    forward, _ = choose_forward(model, documents, hardware.device)
    optimization = Optimization(
        TrainedModel(model, parameters, "adapter", lambda target: None),
        numbers,
        dpo,
        forward,
        hardware,
        RunState(token_budget=hardware.token_budget),
        dpo.blind_loss(units),
        lambda code, message: None,
        lambda: None,
    )
    schedule = Schedule(numbers)
    begun = time.process_time()
    optimization.note_reference(units, lambda: False)
    steps: list[dict[str, float]] = []
    for step in range(1, schedule.total_steps + 1):
        start = (step - 1) * job["batch_size"] % len(units)
        result = optimization.step(units[start : start + job["batch_size"]], schedule.learning_rate(step))
        steps.append({"loss": result.loss, "margin": result.measured["reward_margin"], "norm": result.gradient_norm})
    print(json.dumps({"steps": steps, "seconds": time.process_time() - begun, "peak_bytes": train.peak_bytes()}))


def measure(engine: str, folder: Path, trl_python: str) -> dict[str, Any]:
    """Run one engine in a process of its own."""
    script = Path(__file__).with_name("preferences_trl.py")
    rose = [sys.executable, "-m", "benchmarks.preferences", str(folder)]
    command = rose if engine == "rose" else [trl_python, str(script), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run both in turn, print the table, and fail where they did not train the same."""
    trl_python = os.environ.get("ROSE_BENCH_TRL_PYTHON", "")
    engines = ("trl", "rose") if trl_python else ("rose",)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_job(folder)
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for _ in range(train.REPEATS):
            for engine in engines:
                found[engine].append(measure(engine, folder, trl_python))
    seconds = {engine: statistics.median(run["seconds"] for run in runs) for engine, runs in found.items()}
    rows: list[list[str]] = []
    for engine, runs in found.items():
        first, last = runs[0]["steps"][0], runs[0]["steps"][-1]
        rows.append(
            [
                engine,
                f"{PAIRS * train.EPOCHS / seconds[engine]:.1f}",
                f"{seconds[engines[0]] / seconds[engine]:.2f}",
                f"{max(run['peak_bytes'] for run in runs) / 1e6:.0f}",
                f"{first['loss']:.6f}",
                *(f"{last[name]:.6f}" for name in ("loss", "margin", "norm")),
            ]
        )
    apart = {
        name: max(
            abs(a[name] - b[name])
            for a, b in zip(found["rose"][0]["steps"], found[engines[0]][0]["steps"], strict=True)
        )
        for name in ("loss", "margin", "norm")
    }
    told = ", ".join(f"{name} {number:.1e}" for name, number in apart.items())
    what = f"{(__doc__ or '').splitlines()[0]} Largest differences of a step: {told}."
    print("written to", record("preferences", what, COLUMNS, rows))
    if max(apart.values()) > TOLERANCE:
        raise SystemExit(f"They differ by more than {TOLERANCE}: the two did not train the same.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_rose(Path(sys.argv[1]))
    else:
        main()
