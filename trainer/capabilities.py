"""What this machine can run, found without torch (the supervisor never loads it), and whether that fits a job.

The training child looks at the device itself; this only keeps a worker from claiming what it cannot run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import msgspec

from rose import integrations
from rose.domain.jobs import JobState

PROBE_SECONDS = 10.0
UNLIMITED_BYTES = 1 << 60
"""Control groups without a limit name a number above this."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has."""

    device: str
    """cpu, cuda or mps, perhaps with a number: `cuda:1`."""
    memory_bytes: int
    """Of the device; of the machine (or container) when the device is a CPU or shares it."""
    cores: int
    integrations: tuple[str, ...] = ()
    """Services to which it can log a run."""

    @property
    def device_kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]


def detect(device: str, environ: Mapping[str, str] = os.environ) -> Capabilities:
    """Return what this machine has; `device` is the setting, `auto` takes the best. Blocking: it asks a program."""
    gpu_bytes = _cuda_memory_bytes(environ) if device == "auto" or device.startswith("cuda") else None
    if device == "auto":
        device = "cuda" if gpu_bytes else "mps" if _has_mps() else "cpu"
    memory = gpu_bytes if device.startswith("cuda") and gpu_bytes else machine_memory_bytes()
    return Capabilities(device=device, memory_bytes=memory, cores=usable_cores(), integrations=integrations.installed())


def missing_base(state: JobState) -> str | None:
    """Return the base model's folder when the job names one that does not exist on this machine. Looks at the disk."""
    source = state.base.source if state.base else state.base_request.source if state.base_request else ""
    return source if source.startswith("/") and not Path(source).is_dir() else None


def unsuitable(state: JobState, capabilities: Capabilities) -> str | None:
    """Return what the job needs and this worker lacks, or None. Pure."""
    integration = integrations.missing(state.integrations, capabilities.integrations)
    if integration is not None:
        return f"it logs to {integration}, which is not installed for this worker"
    device = state.needs.get("device")
    if device not in (None, "any", "auto", "cpu") and device != capabilities.device_kind:
        return f"it needs the device {device}, and this worker has {capabilities.device}"
    memory = state.needs.get("memory_bytes")
    if isinstance(memory, int) and memory > capabilities.memory_bytes:
        return f"it needs {memory} bytes of memory, and this worker has {capabilities.memory_bytes}"
    return None


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory_bytes() -> int:
    """Return the memory of the machine, or of the container when that has less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < UNLIMITED_BYTES:
            return min(physical, int(text))
    return physical


def _cuda_memory_bytes(environ: Mapping[str, str]) -> int | None:
    """Return the memory of the first CUDA device that this process may use; None without one that torch could use."""
    program = shutil.which("nvidia-smi")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or visible in ("", "-1", "NoDevFiles") or not _torch_has_cuda():
        return None
    wanted = [f"--id={visible.split(',')[0]}"] if visible else []
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits", *wanted]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    mebibytes = [line.strip() for line in answer.stdout.splitlines() if line.strip().isdigit()]
    return int(mebibytes[0]) << 20 if mebibytes else None


def _torch_has_cuda() -> bool:
    """Tell from the installed version alone: builds without CUDA name themselves `+cpu`."""
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _has_mps() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"
