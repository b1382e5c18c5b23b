"""What the run computes on: device, threads, memory figures, and how many tokens go through it at once."""

from __future__ import annotations

import os
import resource
import sys

import torch

from rose.errors import RoseError
from rose.language_models.load import choose_device, choose_dtype
from trainer.protocol import RunSpec

CPU_TOKEN_BUDGET = 2048
"""Tokens per micro-batch on a CPU: over about 2k tokens nothing is gained there, memory only grows:
docs/hyperparameters.md, "How much goes through the model at once"."""
ACCELERATOR_TOKEN_BUDGET = 16384
"""Where an accelerator starts; running out of memory halves it, which changes no gradient."""


class OutOfMemory(RoseError):
    """The model, or one example beside it, does not fit into memory."""

    default_code = "out_of_memory"


class Hardware:
    """The device of one run. Making it sets the process up: threads, and exact arithmetic on a CPU."""

    def __init__(self, spec: RunSpec) -> None:
        self.threads = spec.threads or default_threads()
        torch.set_num_threads(self.threads)
        self.device = choose_device(spec.device)
        if self.device.type == "cpu":
            # The promise that a resumed run equals an uninterrupted one bit for bit. Operations without a
            # deterministic form only warn; fresh memory need not be filled, since nothing here reads it unwritten.
            torch.use_deterministic_algorithms(True, warn_only=True)
            setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # torch lacks the type

    @property
    def token_budget(self) -> int:
        """Tokens per micro-batch to start with."""
        return CPU_TOKEN_BUDGET if self.device.type == "cpu" else ACCELERATOR_TOKEN_BUDGET

    def dtype(self, parameters: int, *, trains_weights: bool) -> torch.dtype:
        """Return the dtype of the base's weights: fp32 when they are trained, else what the device does best."""
        return torch.float32 if trains_weights else choose_dtype(self.device, parameters)

    def autocast(self, *, trains_weights: bool) -> torch.autocast:
        """Return the context of a forward pass: bf16 arithmetic on fp32 weights when CUDA trains all of them."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocasts(trains_weights))

    def _autocasts(self, trains_weights: bool) -> bool:
        return trains_weights and self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    def precision(self, weights: torch.dtype, *, trains_weights: bool) -> str:
        """Return the coarsest numbers of a forward pass: fp32, fp16 or bf16."""
        if self._autocasts(trains_weights):
            return "bf16"
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(weights, "fp32")

    def peak_memory_bytes(self) -> int:
        """Return the peak memory of the device, on a CPU that of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def total_memory_bytes(self) -> int:
        """Return the memory of the device, on a CPU that of the machine."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def release_cache(self) -> None:
        """Give cached device memory back after an allocation failed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def random_state(self) -> dict[str, torch.Tensor]:
        """Return the state of torch's generators that a run draws from."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return states

    def set_random_state(self, states: dict[str, torch.Tensor]) -> None:
        """Set torch's generators back; states of another kind of device are left out."""
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)
        elif self.device.type == "mps" and "mps" in states:
            torch.mps.set_rng_state(states["mps"])

    def describe(self) -> str:
        """Return device and threads for a log line."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {self.threads} threads"


def default_threads() -> int:
    """Return the usable cores minus one, which stays free for the API, and at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)
