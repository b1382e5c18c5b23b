"""Learning quality: held-out questions of three tasks, SmolLM2-135M before and after.

The base is the model of `rose models pull smollm2`, which is fetched once (93 MB) into a folder of its own. Each run is
a process that trains by the trainer's own code and then answers, at temperature 0, questions that were not in its file.
`--quick` takes one seed and leaves the whole model's training out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs

from benchmarks.quality_tasks import tasks
from benchmarks.record import record

SEEDS = (1, 2, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, rate x 0.5": {"learning_rate_multiplier": 0.5},
    "LoRA, rate x 2": {"learning_rate_multiplier": 2.0},
    "whole model": {"use_lora": False},
}
"""Name in the table -> hyperparameters of the request; everything else is `auto`."""
DEFAULT = "LoRA"
WORKERS = int(os.environ.get("ROSE_BENCH_WORKERS", str(os.cpu_count() or 1)))
COLUMNS = (
    "task",
    "trained",
    "right, of the questions",
    "each seed",
    "held-out loss",
    "training loss",
    "rate",
    "seconds",
)


def main() -> None:
    """Run all of it and print the table."""
    quick = "--quick" in sys.argv
    seeds = SEEDS[:1] if quick else SEEDS
    variants = {name: asked for name, asked in VARIANTS.items() if asked.get("use_lora", True) or not quick}
    models = bases()
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        waiting = {
            (task.name, variant): [
                pool.submit(train, Path(folder) / f"{task.name}-{number}-{seed}", task.name, asked, seed, models)
                for seed in seeds
            ]
            for number, (variant, asked) in enumerate(variants.items())
            for task in tasks()
        }
        for (task, variant), runs in waiting.items():
            found[task, variant] = [run.result() for run in runs]
            print(f"{task}, {variant}: {[round(run['right'], 2) for run in found[task, variant]]}", flush=True)
    seeded = "Seed 1 alone, without the whole model (--quick)" if quick else "Three seeds"
    what = f"{(__doc__ or '').splitlines()[0]} {seeded}."
    sizes = ", ".join(f"{task.name}: {len(task.training)} trained, {len(task.questions)} asked" for task in tasks())
    print("written to", record("quality", f"{what} {sizes}.", COLUMNS, rows(found, variants)))
    judge(found, variants)


def bases() -> Path:
    """Return a folder with the base, fetched if it is not there."""
    models = platformdirs.user_cache_path("rose-benchmarks") / "models"
    command = [sys.executable, "-m", "rose.language_models.imports", "--smollm2", "--models", str(models)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return models


def train(folder: Path, task: str, asked: dict[str, Any], seed: int, models: Path) -> dict[str, Any]:
    """Train and ask in a process of its own, with one thread, and return what it measured."""
    folder.mkdir(parents=True)
    spec = {
        "task": task,
        "asked": asked,
        "seed": seed,
        "models": str(models),
        "folder": str(folder),
        "threads": 1,
        "asks_base": seed == SEEDS[0] and asked == VARIANTS[DEFAULT],
    }
    path = folder / "training.json"
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "benchmarks.quality_run", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows(found: dict[tuple[str, str], list[dict[str, Any]]], variants: Iterable[str]) -> list[list[str]]:
    """Return the table: each task's base, then what became of it."""
    made: list[list[str]] = []
    for task in tasks():
        for variant in variants:
            runs = found[task.name, variant]
            if variant == DEFAULT:
                base = runs[0]
                made.append(
                    [task.name, "nothing", _share(base["base_right"]), "", f"{base['base_loss']:.2f}", "", "", ""]
                )
            made.append(
                [
                    task.name,
                    variant,
                    _share(_mean(runs, "right")),
                    " ".join(_share(run["right"]) for run in runs),
                    f"{_mean(runs, 'loss'):.3f}",
                    f"{_mean(runs, 'training_loss'):.3f}",
                    f"{runs[0]['learning_rate']:.1e}",
                    f"{_mean(runs, 'seconds'):.0f}",
                ]
            )
    return made


def judge(found: dict[tuple[str, str], list[dict[str, Any]]], variants: Iterable[str]) -> None:
    """Say how the default stands beside half and double its rate, over all tasks and seeds."""
    totals = {
        variant: statistics.fmean(_mean(found[task.name, variant], "right") for task in tasks()) for variant in variants
    }
    for variant, total in totals.items():
        print(f"{variant}: {_share(total)} right over all tasks")


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(float(run[name]) for run in runs)


def _share(number: float) -> str:
    return f"{number:.0%}"


if __name__ == "__main__":
    main()
