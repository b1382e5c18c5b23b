"""Bring models and adapters from disk into memory: find, prove, load. Slow and blocking; has a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.errors import InvalidRequest, NotFound, Unavailable
from rose.inference.batching.building import NotBatchable, NotInFp16, build
from rose.inference.batching.linear import fastest_form, has_fp16
from rose.inference.one_by_one import OneByOne
from rose.inference.request import Target
from rose.inference.resident import FULL, Resident
from rose.inference.rows import Runner
from rose.language_models.adapters import StoredAdapter, read_adapter
from rose.language_models.load import SMALL_PARAMETERS, choose_device, choose_dtype, is_out_of_memory, load_model
from rose.language_models.locate import LocatedBase, ModelNotAvailable, check_base, describe, locate
from rose.language_models.template import load_template

log = logging.getLogger(__name__)

LOADING_SHARE = 1.2
"""Memory taken while loading, as a share of the weights' own size."""


AUTO = "auto"
CACHE_SHARE = 0.25
"""Of the memory that is free once a model is loaded, for keys and values."""
DEFAULT_CACHE_BYTES = 2 << 30
"""Where the system does not say what is free."""


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
        weights: str = AUTO,
        cache_bytes: int | None = None,
        free_bytes: Callable[[torch.device], int | None] | None = None,
    ) -> None:
        """`weights`: the form of linear layers on a CPU, `auto` for the fastest; `cache_bytes`: for keys and values.

        The default is a share of what is free once the model is loaded.
        """
        self._blobs = blobs
        self._models_dir = models_dir
        self._offline = offline
        self._weights = weights
        self._cache_bytes = cache_bytes
        self._free_bytes = free_bytes or free_memory_bytes
        self.device = choose_device(device)

    def load(self, target: Target, resident: Resident | None) -> tuple[Resident, StoredAdapter | None]:
        """Return `resident` (or the model that `target` needs, loaded), and the target's adapter if it has none of it.

        Raises: NotFound when the base is not available; BaseChanged when base and adapter do not belong together;
        BlobMismatch; NotEnoughMemory.
        """
        if resident is None:
            located = self.locate(target)
            whole = target.adapter if target.kind == "full" else None
            resident = self._load(full_key(whole) if whole else located.fingerprint, located, target)
        adapter = target.adapter
        if target.kind != "adapter" or adapter is None or adapter.sha256 in resident.runner.adapters():
            return resident, None
        self._blobs.verify(adapter)
        return resident, read_adapter(self._blobs.path(adapter.path), target.base)

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
        form = self._form(located)
        try:
            runner = self._runner(located, target, form)
        except NotInFp16 as error:
            log.info("%s keeps its weights in fp32: %s", located.source, error)
            runner = self._runner(located, target, "fp32")
        log.info(
            "loaded %s (%s, %s%s%s) from %s",
            located.source,
            self.device,
            runner.weights,
            ", batched" if runner.batched else "",
            ", batch-invariant" if runner.batch_invariant else "",
            located.path,
        )
        return Resident(key, located, runner, load_template(located.path, rows=located.embedding_rows))

    def _form(self, located: LocatedBase) -> str:
        """Return the form of the linear layers' weights."""
        if self.device.type != "cpu":
            return "bf16" if choose_dtype(self.device, located.parameters) == torch.bfloat16 else "fp32"
        if self._weights != AUTO:
            return self._weights
        if located.parameters < SMALL_PARAMETERS:
            return "fp32"
        candidates = ["fp16"] if has_fp16() else []
        if choose_dtype(self.device, located.parameters) == torch.bfloat16:
            candidates.append("bf16")
        return fastest_form(located.linear_layers.values(), [*candidates, "fp32"])

    def _runner(self, located: LocatedBase, target: Target, form: str) -> Runner:
        """Load the weights; answer in batches if the model allows it."""
        model = self._model(located, target, torch.bfloat16 if form == "bf16" else torch.float32)
        try:
            return build(
                model,
                form=form,
                limit_bytes=self._cache_limit(),
                context_tokens=located.context_tokens,
            )
        except NotBatchable as error:
            log.info("%s answers row by row: %s", located.source, error)
            return OneByOne(model, context_tokens=located.context_tokens)

    def _cache_limit(self) -> int:
        if self._cache_bytes is not None:
            return self._cache_bytes
        free = self._free_bytes(self.device)
        return DEFAULT_CACHE_BYTES if free is None else int(free * CACHE_SHARE)

    def _model(self, located: LocatedBase, target: Target, dtype: torch.dtype) -> Any:
        self._check_memory(located, dtype)
        try:
            return load_model(located.path, device=self.device, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise NotEnoughMemory(f"{self.device} has too little free memory for {located.source!r}.") from error
        except InvalidRequest as error:
            raise _not_available(target, error) from error

    def _check_memory(self, located: LocatedBase, dtype: torch.dtype) -> None:
        needed = int(located.parameters * dtype.itemsize * LOADING_SHARE)
        free = self._free_bytes(self.device)
        if free is not None and needed > free:
            raise NotEnoughMemory(
                f"{located.source!r} needs about {needed / 2**30:.1f} GiB on {self.device}, {free / 2**30:.1f} GiB "
                "are free.",
                hint="Use a smaller base model, or end what else uses the memory.",
            )


def full_key(artifact: Artifact) -> str:
    """Return the key of a full model."""
    return FULL + artifact.sha256


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
