"""One measured run of TRL's DPOTrainer, for benchmarks.preferences; runs in TRL's own environment, without ROSE.

`python preferences_trl.py JOB_FOLDER` reads job.json (model, adapter, pairs, numbers) and prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from train_trl import peak_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Clock(TrainerCallback):
    """Notes what was logged of every step, and processor time."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.ended = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.process_time()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.steps.append({"loss": logs["loss"], "margin": logs["rewards/margins"], "norm": logs["grad_norm"]})


class Exact(DPOTrainer):
    """Takes the tokens as they are and in their order, and logs all digits."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main(folder: Path) -> None:
    """Train and print what was measured."""
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=job["batch_size"],
        beta=job["beta"],
        max_length=None,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=job["epochs"],
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )
    rows = {f"{name}_ids": [pair[name] for pair in job["pairs"]] for name in ("prompt", "chosen", "rejected")}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    tuned = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    clock = Clock()
    begun = time.process_time()
    trainer = Exact(
        model=tuned,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[clock],
    )
    trainer.train()
    print(json.dumps({"steps": clock.steps, "seconds": clock.ended - begun, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
