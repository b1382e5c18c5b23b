"""Training speed beside TRL's SFTTrainer on the same model, adapter, examples and order; one thread, fp32.

TRL lives in an environment of its own, named by ROSE_BENCH_TRL_PYTHON:

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0
    ROSE_BENCH_TRL_PYTHON=/tmp/trl/bin/python python -m benchmarks train

`trl default` is what SFTConfig does by itself (padding, gradient checkpointing), `trl best` its fastest setting on a
CPU (packing, no checkpointing; one step is then a number of packed rows, so that its losses are not comparable).
Ratios are of tokens per second of processor time, which a busy neighbour disturbs less than wall time.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

from benchmarks.record import record

REPEATS = int(os.environ.get("ROSE_BENCH_REPEATS", "2"))
WARM_STEPS = 2
EXAMPLES = 40
EPOCHS = 2
BATCH = 8
LONGEST = 512
WIDTH, LAYERS, VOCABULARY = 256, 4, 4096
LEARNING_RATE = 1e-3
SEED = 1
TOLERANCE = 1e-3
ENGINES = ("trl default", "rose", "trl best")


def make_job(folder: Path) -> None:
    """Write a random model of Qwen3's shape, an untrained adapter, and examples in the order of training."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3 import Qwen3Config

    from rose.domain.hyperparameters import LoraSettings
    from rose.domain.job_values import BaseModel
    from rose.language_models.lora import attach
    from rose.language_models.tiny import build_tokenizer, shipped_texts

    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 128,
        head_dim=64,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    build_tokenizer(shipped_texts()).save_pretrained(folder / "model")
    lora = LoraSettings(r=16, lora_alpha=32.0, lora_dropout=0.0, target_modules=("all-linear",))
    attach(model, lora, SEED).save(
        folder / "adapter", BaseModel(source=str(folder / "model"), revision=None, fingerprint="benchmark")
    )
    draw = random.Random(SEED)
    lengths = [min(LONGEST, max(16, round(draw.lognormvariate(4.5, 0.75)))) for _ in range(EXAMPLES)]
    # Half the tokens are learned. They come from a small part of the vocabulary, so that there is something to learn.
    documents = [
        {"ids": [draw.randrange(200) for _ in range(n)], "weights": [0.0] * (n // 2) + [1.0] * (n - n // 2)}
        for n in lengths
    ]
    job = {
        "model": str(folder / "model"),
        "adapter": str(folder / "adapter"),
        "documents": documents,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "longest": LONGEST,
        "packed_rows": max(1, round(sum(lengths) / EXAMPLES * BATCH / LONGEST)),
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
    }
    (folder / "job.json").write_text(json.dumps(job))


def run_rose(folder: Path) -> None:
    """Train as a run does, on the job's documents in their order, and print what was measured."""
    import torch

    from rose.domain.hyperparameter_requests import HyperparametersRequest
    from rose.domain.hyperparameters import DataFacts, resolve
    from rose.language_models.load import load_model
    from rose.language_models.lora import attach, load_adapter
    from rose.methods import supervised
    from rose.methods.method import Document, Unit
    from trainer.batches import Schedule
    from trainer.forward import choose_forward
    from trainer.hardware import Hardware
    from trainer.optimization import Optimization
    from trainer.protocol import RunSpec
    from trainer.recovery import RunState
    from trainer.trained_model import TrainedModel

    job = json.loads((folder / "job.json").read_text())
    documents = [Document(ids=array("q", d["ids"]), weights=array("f", d["weights"])) for d in job["documents"]]
    units = [Unit((document,)) for document in documents]
    facts = DataFacts(
        examples=len(documents),
        validation_file_examples=None,
        hidden_size=WIDTH,
        model_type="qwen3",
        context_tokens=LONGEST,
        base_learning_rate=job["learning_rate"],
    )
    asked = {"n_epochs": job["epochs"], "batch_size": job["batch_size"], "warmup_ratio": 0.0}
    numbers = resolve(HyperparametersRequest(**asked), facts, job["seed"])
    assert numbers.lora_config is not None
    torch.set_num_threads(1)
    hardware = Hardware(spec(RunSpec, numbers))
    model = load_model(Path(job["model"]))
    adapter = attach(model, numbers.lora_config, seed=0)
    load_adapter(adapter, Path(job["adapter"]))
    parameters = {f"{index}.lora_": parameter for index, parameter in enumerate(adapter.trainable_parameters())}
    forward, _ = choose_forward(model, documents, hardware.device)
    optimization = Optimization(
        TrainedModel(model, parameters, "adapter", lambda target: None),
        numbers,
        supervised,
        forward,
        hardware,
        RunState(token_budget=hardware.token_budget),
        supervised.blind_loss(units),
        lambda code, message: None,
        lambda: None,
    )
    schedule = Schedule(numbers)
    moments = [(time.perf_counter(), time.process_time())]
    losses: list[float] = []
    for step in range(1, schedule.total_steps + 1):
        start = (step - 1) * BATCH % len(documents)
        result = optimization.step(units[start : start + BATCH], schedule.learning_rate(step))
        losses.append(result.loss)
        moments.append((time.perf_counter(), time.process_time()))
    measured = {
        "wall": [moment for moment, _ in moments],
        "processor": [moment for _, moment in moments],
        "losses": losses,
        "tokens": sum(len(document) for document in documents) * job["epochs"],
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(measured))


def peak_bytes() -> int:
    """Return the most memory this program ever held; `getrusage` would count the process that started it, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def spec(kind: Any, numbers: Any) -> Any:
    from rose.domain.job_values import BaseModel

    return kind(
        job_id="ftjob_benchmark",
        epoch=1,
        model_name="benchmark",
        base=BaseModel(source="benchmark", revision=None, fingerprint="benchmark"),
        parent=None,
        blob_root="/nonexistent",
        training_file="/nonexistent",
        validation_file=None,
        hyperparameters=numbers,
        models_dir="/nonexistent",
        device="cpu",
        threads=1,
    )


def measure(engine: str, folder: Path, trl_python: str) -> dict[str, Any]:
    """Run one engine in a process of its own; return tokens per second and losses without the warm steps."""
    if engine == "rose":
        command = [sys.executable, "-m", "benchmarks.train", str(folder)]
    else:
        script = Path(__file__).with_name("train_trl.py")
        command = [trl_python, str(script), str(folder), engine.removeprefix("trl ")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    share = 1 - WARM_STEPS / (len(found["wall"]) - 1)
    return {
        "wall": found["tokens"] * share / (found["wall"][-1] - found["wall"][WARM_STEPS]),
        "processor": found["tokens"] * share / (found["processor"][-1] - found["processor"][WARM_STEPS]),
        "losses": found["losses"],
        "peak_bytes": found["peak_bytes"],
    }


def main() -> None:
    """Run the engines in turn and print the table. Without TRL's environment only ROSE is measured."""
    trl_python = os.environ.get("ROSE_BENCH_TRL_PYTHON", "")
    engines = ENGINES if trl_python else ("rose",)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_job(folder)
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for _ in range(REPEATS):
            for engine in engines:
                found[engine].append(measure(engine, folder, trl_python))
    rows: list[list[str]] = []
    standard = statistics.median(run["processor"] for run in found[engines[0]])
    for engine, runs in found.items():
        rate = statistics.median(run["processor"] for run in runs)
        losses = runs[0]["losses"]
        rows.append(
            [
                engine,
                f"{rate:.0f}",
                f"{statistics.median(run['wall'] for run in runs):.0f}",
                f"{rate / standard:.2f}",
                f"{max(run['peak_bytes'] for run in runs) / 1e6:.0f}",
                *(f"{losses[step]:.4f}" for step in (0, len(losses) // 2, -1)),
            ]
        )
    columns = ("engine", "tokens/cpu s", "tokens/s", "ratio", "peak MB", "loss first", "middle", "last")
    print("written to", record("train", (__doc__ or "").splitlines()[0], columns, rows))
    if trl_python:
        apart = max(
            abs(a - b) for a, b in zip(found["rose"][0]["losses"], found["trl default"][0]["losses"], strict=True)
        )
        print(f"largest difference of a step's loss, rose and trl default: {apart:.1e}")
        if apart > TOLERANCE:
            raise SystemExit(f"The losses differ by more than {TOLERANCE}: the two did not train the same.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_rose(Path(sys.argv[1]))
    else:
        main()
