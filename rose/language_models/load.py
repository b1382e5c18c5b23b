"""Load a base model's weights for training or answering: frozen, in evaluation mode, complete or not at all."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from rose.errors import InvalidRequest

SMALL_PARAMETERS = 50_000_000
"""Below this a model stays in fp32 on a CPU: it fits anywhere, and exactness is worth more than speed."""


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes the first there is.

    Raises: InvalidRequest when the wanted device does not exist here.
    """
    has_mps = torch.backends.mps.is_available()
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(wanted)
    if (device.type == "cuda" and not torch.cuda.is_available()) or (device.type == "mps" and not has_mps):
        raise InvalidRequest(
            f"The device {wanted!r} does not exist on this machine.",
            code="device_not_available",
            param="device",
            hint="Set ROSE_DEVICE to auto or cpu.",
        )
    return device


def choose_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """Return bf16 on CUDA and on CPUs that multiply it natively (a large model only), else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and parameters >= SMALL_PARAMETERS and _cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def load_model(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return the causal language model in `path`: all weights frozen, evaluation mode, on `device` in `dtype`.

    Only files of the folder are read, and no code from it is run.

    Raises: InvalidRequest (`model_not_available`) when transformers cannot load it, or only a part of it.
    """
    transformers_logging.disable_progress_bar()
    try:
        # Attention is transformers' choice: SDPA, and its own where a model caps its scores (Gemma 2).
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that it tells which, below
            output_loading_info=True,
        )
    except Exception as error:  # the boundary to transformers, which raises whatever its models and quantizers do
        if is_out_of_memory(error):
            raise
        raise _not_loadable(path, (" ".join(str(error).split()) or type(error).__name__)[:300]) from error
    model, found = loaded
    # transformers fills such weights with random numbers, others at each load.
    for kind, reason in (("missing_keys", "not in its files"), ("mismatched_keys", "of another shape than expected")):
        if found[kind]:
            first = min(str(key if isinstance(key, str) else key[0]) for key in found[kind])
            raise _not_loadable(path, f"{len(found[kind])} of its weights are {reason}, first {first}")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _not_loadable(path, "it keeps no keys and values of what it has read (Mamba and the like)")
    model.requires_grad_(False)
    model.eval()
    return model.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator and MPS raise a plain RuntimeError, which says it nowhere but in its text.
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _not_loadable(path: Path, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The model in {path} cannot be loaded: {reason.rstrip('.')}.",
        code="model_not_available",
        hint="It must be a causal language model that transformers knows, with complete safetensors weights.",
    )
