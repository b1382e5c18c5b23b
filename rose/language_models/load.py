"""Load a base model's weights for training or answering: frozen, in evaluation mode, attention through SDPA."""

from __future__ import annotations

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

    Raises: InvalidRequest (`model_not_available`) when transformers cannot load it.
    """
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InvalidRequest(
            f"The model in {path} cannot be loaded: {reason}",
            code="model_not_available",
            hint="It must be a causal language model that transformers knows, with safetensors weights.",
        ) from error
    model.requires_grad_(False)
    model.eval()
    return model.to(device)
