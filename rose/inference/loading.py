"""Bring models and adapters from disk into memory: find, prove, load. Slow and blocking; has a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.errors import InvalidRequest, NotFound, Unavailable
from rose.inference.request import Target
from rose.inference.resident import Resident
from rose.language_models.adapters import read_adapter
from rose.language_models.load import choose_device, choose_dtype, is_out_of_memory, load_model
from rose.language_models.locate import LocatedBase, ModelNotAvailable, check_base, describe, locate
from rose.language_models.template import load_template

log = logging.getLogger(__name__)

LOADING_SHARE = 1.2
"""Memory taken while loading, as a share of the weights' own size."""


class NotEnoughMemory(Unavailable):
    """The model does not fit beside what is loaded."""

    default_code: str = "not_enough_memory"


class Loader:
    """Knows where models lie and on which device they belong."""

    def __init__(
        self,
        blobs: Blobs,
        *,
        models_dir: Path,
        offline: bool,
        device: str = "auto",
        free_bytes: Callable[[torch.device], int | None] | None = None,
    ) -> None:
        self._blobs = blobs
        self._models_dir = models_dir
        self._offline = offline
        self._free_bytes = free_bytes or free_memory_bytes
        self.device = choose_device(device)

    def load(self, target: Target, resident: Resident | None) -> Resident:
        """Return `resident` (or the model that `target` needs, loaded) with the target's adapter on it.

        Raises: NotFound when the base is not available; BaseChanged when base and adapter do not belong together;
        BlobMismatch; NotEnoughMemory.
        """
        if resident is None:
            located = self.locate(target)
            whole = target.adapter if target.kind == "full" else None
            resident = self._load(full_key(whole) if whole else located.fingerprint, located, target)
        adapter = target.adapter
        if target.kind == "adapter" and adapter is not None and adapter.sha256 not in resident.slots:
            self._load_adapter(resident, target, adapter)
        return resident

    def locate(self, target: Target) -> LocatedBase:
        """Find the base, or the whole model, that `target` needs. Raises: as `load`."""
        if target.kind == "full":
            assert target.adapter is not None
            self._blobs.verify(target.adapter)
            return describe(self._blobs.path(target.adapter.path), source=target.model, revision=None)
        base = target.base
        try:
            located = locate(base.source, revision=base.revision, models_dir=self._models_dir, offline=self._offline)
        except ModelNotAvailable as error:
            raise _not_available(target, error) from error
        if base.fingerprint:
            check_base(located, base, f"the model '{target.model}'")
        return located

    def _load(self, key: str, located: LocatedBase, target: Target) -> Resident:
        dtype = choose_dtype(self.device, located.parameters)
        self._check_memory(located, dtype)
        try:
            model = load_model(located.path, device=self.device, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise NotEnoughMemory(f"{self.device} has too little free memory for {located.source!r}.") from error
        except InvalidRequest as error:
            raise _not_available(target, error) from error
        log.info("loaded %s (%s, %s) from %s", located.source, self.device, dtype, located.path)
        return Resident(key, located, model, load_template(located.path, rows=located.embedding_rows))

    def _check_memory(self, located: LocatedBase, dtype: torch.dtype) -> None:
        needed = int(located.parameters * dtype.itemsize * LOADING_SHARE)
        free = self._free_bytes(self.device)
        if free is not None and needed > free:
            raise NotEnoughMemory(
                f"{located.source!r} needs about {needed / 2**30:.1f} GiB on {self.device}, {free / 2**30:.1f} GiB "
                "are free.",
                hint="Use a smaller base model, or end what else uses the memory.",
            )

    def _load_adapter(self, resident: Resident, target: Target, adapter: Artifact) -> None:
        self._blobs.verify(adapter)
        resident.slots.add(adapter.sha256, read_adapter(self._blobs.path(adapter.path), target.base))
        log.info("loaded adapter %s of %s", adapter.sha256[:12], target.model)


def full_key(artifact: Artifact) -> str:
    """Return the key of a full model."""
    return f"full:{artifact.sha256}"


def free_memory_bytes(device: torch.device) -> int | None:
    """Return the free memory of `device`, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *_container_free_bytes()], default=None)


def _container_free_bytes() -> list[int]:
    """Return what a memory limit of the container (cgroup 2) leaves."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit reads "max"
        return []
    return [max(0, limit - used)]


def _not_available(target: Target, error: InvalidRequest) -> NotFound:
    return NotFound(
        f"The model '{target.model}' cannot answer. {error.message}",
        code="model_not_available",
        param="model",
        hint=error.hint,
    )
