"""One measured run of TRL's SFTTrainer, for benchmarks.train; runs in TRL's own environment, without ROSE.

`python train_trl.py JOB_FOLDER default|best` reads job.json (model, adapter, documents, numbers), prints one JSON line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Notes wall and processor time at the end of every step, and the loss that was logged."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.note()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.note()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def note(self) -> None:
        self.steps.append((time.perf_counter(), time.process_time()))


class InOrder(SFTTrainer):
    """Takes the examples in the order of the file, which is the order in which ROSE trained on them."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def peak_bytes() -> int:
    """Return the most memory this program ever held; `getrusage` would count the process that started it, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main(folder: Path, kind: str) -> None:
    """Train and print what was measured."""
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    best = kind == "best"
    packing = {"packing": True, "per_device_train_batch_size": job["packed_rows"]} if best else {}
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        **{"per_device_train_batch_size": job["batch_size"], **packing},
        max_length=job["longest"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=job["epochs"],
        gradient_checkpointing=not best,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )
    rows = {
        "input_ids": [document["ids"] for document in job["documents"]],
        "labels": [
            [token if weight else -100 for token, weight in zip(document["ids"], document["weights"], strict=True)]
            for document in job["documents"]
        ],
    }
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    tuned = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    clock = Clock()
    trainer = InOrder(
        model=tuned,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[clock],
    )
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"]) * job["epochs"]
    trainer.train()
    print(
        json.dumps(
            {
                "wall": [moment for moment, _ in clock.steps],
                "processor": [moment for _, moment in clock.steps],
                "losses": clock.losses,
                "tokens": tokens,
                "peak_bytes": peak_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
